"""Makes the shards of a plan, node by node: looks up what is there, continues what was begun, proves that none is lost.

<root>/steps/<key>/manifest.json    when the node is whole: what made it, its shards, the sum of their markers
<root>/steps/<key>/...              its shards (see shard.py)
<root>/steps/<key>/work/            what the step itself keeps while it works
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sft
from sft.data import store
from sft.data.engine import worker
from sft.data.engine.local import Engine
from sft.data.engine.plan import MEASURE, Node
from sft.data.engine.shards import EXAMPLES, read_marker, read_whole, sum_counts
from sft.data.read.records import BAD, read_outcomes
from sft.data.steps import TableStep, step_class
from sft.data.steps.context import Context
from sft.utils.errors import UserError
from sft.utils.files import read_sealed, write_sealed

log = logging.getLogger(__name__)

SHARD_ROWS = 2048  # large enough that a million rows are few files, small enough that processes end together
STEPS_FOLDER = "steps"
Progress = Callable[[str, int, int | None], None]
"""Called as progress(phase, done, total): shards of a node by its title, "rows" (total unknown: None), then "packs"."""


@dataclass(frozen=True)
class Shard:
    """One file of rows: where it is, how many it has, the sum of their fingerprints, and what their source is called
    from here on (None: as they say themselves)."""

    path: Path
    rows: int
    checksum: str
    name: str | None = None


@dataclass(frozen=True)
class Built:
    """A node that is whole. `entry` is its line of the funnel; None for a concatenation."""

    node: Node
    shards: list[Shard]
    entry: dict[str, Any] | None


class Builder:
    """Builds the nodes of one plan.

    Args:
        root: the folder of prepared data.
        engine: who works on the shards.
        tokenizer_path: folder of the tokenizer that the stage trains with.
        seed: the data section's.
        max_bad_fraction: the run stops when a source has more bad rows than this.
        progress: called as progress(title, done, total).
    """

    def __init__(
        self,
        root: Path,
        engine: Engine,
        tokenizer_path: str,
        seed: int,
        max_bad_fraction: float = 1.0,
        progress: Progress | None = None,
    ) -> None:
        self.root, self.engine, self.tokenizer_path, self.seed = root, engine, tokenizer_path, seed
        self.max_bad_fraction, self._progress = max_bad_fraction, progress or (lambda *_: None)
        self.built: dict[str, Built] = {}

    def build(self, root: Node) -> Built:
        """Make all nodes up to `root`; returns its shards. `built` then holds every node by its key."""
        for node in root.walk():
            if node.key not in self.built:
                self.built[node.key] = self._concatenated(node) if node.step == "concatenate" else self._node(node)
        return self.built[root.key]

    def _inputs(self, node: Node) -> list[Shard]:
        return [shard for child in node.inputs for shard in self.built[child.key].shards]

    def _read_from(self, node: Node) -> list[str]:
        """Keys of the nodes whose rows go into this one; a concatenation stands for what meets there."""
        keys = []
        for child in node.inputs:
            keys += self._read_from(child) if child.step == "concatenate" else [child.key]
        return keys

    def _concatenated(self, node: Node) -> Built:
        shards = [
            replace(shard, name=name)
            for child, name in zip(node.inputs, node.names, strict=True)
            for shard in self.built[child.key].shards
        ]
        return Built(node, shards, None)

    def _node(self, node: Node) -> Built:
        folder = self.root / STEPS_FOLDER / node.key
        manifest = read_whole(folder / store.MANIFEST_FILE)
        if manifest is None:
            with store.locked(self.root, node.key), store.writable(self.root):
                manifest = read_whole(folder / store.MANIFEST_FILE) or self._make(node, folder)
        self._check_source(node, manifest, folder)
        shards = [
            Shard(folder / f"kept-{number:05d}.parquet", kept["rows"], kept["checksum"])
            for number, kept in enumerate(manifest["shards"])
        ]
        return Built(node, shards, manifest["entry"])

    def _make(self, node: Node, folder: Path) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        if node.step == "read":
            markers = self._read(node, folder)
        elif node.step != MEASURE and issubclass(step_class(node.step), TableStep):
            markers = self._table_step(node, folder)
        else:
            markers = self._row_step(node, folder)
        entry = _entry(node, self._read_from(node), markers, folder, time.monotonic() - started)
        self._check_passed_on(node, entry)
        manifest = {
            "key": node.key,
            "title": node.title,
            "step": node.step,
            "config": node.config.model_dump(mode="json") if node.config is not None else None,
            "inputs": [child.key for child in node.inputs],
            "sambay_sft": sft.__version__,
            "shards": [marker["kept"] for marker in markers],
            "files": {name: content for marker in markers for name, content in marker["files"].items()},
            "entry": entry,
        }
        write_sealed(folder / store.MANIFEST_FILE, manifest)
        for pattern in ("sketch-*", ".*.tmp"):
            for path in folder.glob(pattern):
                path.unlink()
        shutil.rmtree(folder / "work", ignore_errors=True)
        return manifest

    # ---- the kinds of node ----

    def _read(self, node: Node, folder: Path) -> list[dict[str, Any]]:
        opened, source = node.opened, node.source
        assert opened is not None and source is not None
        task = worker.ReadTask(lambda: read_outcomes(opened, source, node.templates), folder, SHARD_ROWS)

        def progress(rows: int) -> None:
            if rows > SHARD_ROWS:
                self.engine.warm_up()
            self._progress(node.title, rows, None)

        return worker.run_read(task, progress)

    def _row_step(self, node: Node, folder: Path) -> list[dict[str, Any]]:
        return self._spread(node, worker.run_rows, self._tasks(node, folder), node.title)

    def _table_step(self, node: Node, folder: Path) -> list[dict[str, Any]]:
        todo = self._tasks(node, folder)
        verdicts = folder / worker.VERDICTS
        if not verdicts.is_file():
            for done, _ in enumerate(self.engine.run(worker.run_sketch, todo), start=1):
                self._progress(f"{node.title} (sketch)", done, len(todo))
            self._decide(node, todo, verdicts)
        return self._spread(node, worker.run_apply, todo, node.title)

    def _decide(self, node: Node, todo: list[worker.Task], verdicts: Path) -> None:
        """Decide on all rows at once, in this process."""
        scratch = verdicts.parent / "work" / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        temporary = verdicts.with_name(f".{verdicts.name}.tmp")
        step = step_class(node.step)(node.config, todo[0].context)
        assert isinstance(step, TableStep)
        try:
            step.decide([worker.sketch_path(task.folder, task.number) for task in todo], temporary, scratch)
        finally:
            step.close()
        os.replace(temporary, verdicts)

    def _tasks(self, node: Node, folder: Path) -> list[worker.Task]:
        work = folder / "work"
        work.mkdir(exist_ok=True)
        parallel = node.step == MEASURE or step_class(node.step).parallel
        workers = self.engine.workers if parallel else 1
        context = Context(self.tokenizer_path, node.templates, self.seed, work, workers)
        todo, row = [], 0
        for number, shard in enumerate(self._inputs(node)):
            todo.append(worker.Task(node.step, node.config, context, folder, shard.path, shard.name, number, row))
            row += shard.rows
        return todo

    def _spread(
        self, node: Node, work: Callable[[worker.Task], dict[str, Any]], todo: list[worker.Task], title: str
    ) -> list[dict[str, Any]]:
        """Have every shard done that isn't yet; returns all markers in order."""
        markers = {task.number: read_marker(task.folder, task.number) for task in todo}
        missing = [task for task in todo if markers[task.number] is None]
        done = len(todo) - len(missing)
        if done:
            log.info("%s: %d of %d shards were done already", node.title, done, len(todo))
        for task, marker in self.engine.run(work, missing):
            markers[task.number] = marker
            done += 1
            self._progress(title, done, len(todo))
        return [marker for _, marker in sorted(markers.items()) if marker is not None]

    # ---- what must hold ----

    def _check_passed_on(self, node: Node, entry: dict[str, Any]) -> None:
        """A step must have taken exactly the rows that the steps before it let go on."""
        if node.step == "read":
            return
        given = self._inputs(node)
        rows, checksum = sum(shard.rows for shard in given), sum(int(shard.checksum, 16) for shard in given)
        taken = entry["taken"]
        if taken["rows"] != rows or (int(taken["checksum"], 16) - checksum) % (1 << 128):
            raise AssertionError(f"{node.title}: {rows} rows went in, {taken['rows']} were looked at: one was lost")

    def _check_source(self, node: Node, manifest: dict[str, Any], folder: Path) -> None:
        """Refuse a source that is empty, or has too many bad rows."""
        if node.step != "read":
            return
        entry = manifest["entry"]
        rows, name = entry["taken"]["rows"], node.opened.name if node.opened else node.title
        if rows == 0:
            raise UserError(f"{name}: the data is empty, there is no row in it.")
        bad = {reason[len(BAD) :]: count for reason, count in entry["reasons"].items() if reason.startswith(BAD)}
        counted = ", ".join(f"{reason}: {count}" for reason, count in bad.items())
        if sum(bad.values()) > self.max_bad_fraction * rows:
            raise UserError(
                f"{name}: {sum(bad.values())} of {rows} rows are bad ({counted}), more than data.max_bad_fraction "
                f"{self.max_bad_fraction:g} allows; see them in {folder}/dropped-*.parquet, then mend the data or "
                "raise it."
            )
        if bad:
            log.warning("%s: %d of %d rows are bad (%s)", name, sum(bad.values()), rows, counted)


def _entry(
    node: Node, inputs: list[str], markers: list[dict[str, Any]], folder: Path, seconds: float
) -> dict[str, Any]:
    """A node's line of the funnel: the sum of its shards' markers."""
    names = ("taken", "kept", "dropped", "replaced", "made")
    reasons: Counter[str] = Counter()
    lengths: Counter[str] = Counter()
    pass_rates: Counter[str] = Counter()
    sources: dict[str, Counter[str]] = {}
    examples: dict[str, list[dict[str, str]]] = {}
    for marker in markers:
        reasons.update(marker["reasons"])
        lengths.update(marker["lengths"])
        pass_rates.update(marker["pass_rates"])
        for name, counts in marker["sources"].items():
            sources.setdefault(name, Counter()).update(counts)
        for reason, found in marker["examples"].items():
            examples.setdefault(reason, []).extend(found)
    usage = folder / "work" / "usage.json"
    return {
        "title": node.title,
        "step": node.step,
        "key": node.key,
        "inputs": inputs,
        **{name: sum_counts([marker[name] for marker in markers]) for name in names},
        "reasons": dict(sorted(reasons.items())),
        "examples": {reason: found[:EXAMPLES] for reason, found in sorted(examples.items())},
        "lengths": dict(sorted(lengths.items(), key=lambda item: int(item[0]))),
        "sources": {name: dict(counts) for name, counts in sorted(sources.items())},
        "pass_rates": dict(sorted(pass_rates.items(), key=lambda item: float(item[0]))),
        "shards": len(markers),
        "seconds": round(seconds, 3),
        "shard_seconds": round(sum(marker["seconds"] for marker in markers), 3),
        **({"usage": read_sealed(usage)} if usage.is_file() else {}),
    }
