"""Makes the shards of a plan, pass by pass: looks up what is there, continues what was begun, proves that none is lost.

<root>/steps/<key>/manifest.json    when the pass is whole: what made it, its shards, the sum of their accounts
<root>/steps/<key>/...              its shards (see shards.py)
<root>/steps/<key>/work/            what steps keep while they work
<root>/journal/                     what was paid for: answers, scores (by what was asked or scored)
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sft
from sft.data import store
from sft.data.engine import worker
from sft.data.engine.bad import bad_rows, first_bad, refuse_bad_rows, where_bad, write_bad_rows
from sft.data.engine.local import Engine
from sft.data.engine.passes import Pass, make_passes
from sft.data.engine.plan import Node
from sft.data.engine.shards import kept_path, merged, read_marker, read_whole
from sft.data.read.row import Part, Row
from sft.data.steps import TableStep, step_class
from sft.data.steps.context import Context
from sft.utils.errors import UserError
from sft.utils.files import read_sealed, write_sealed

log = logging.getLogger(__name__)

SHARD_ROWS = 1024
"""Large enough that a million rows are few files, small enough that processes end together. A pass over no more is done
in this process, however many sources and files its rows come from: to start others takes longer."""
STEPS_FOLDER, JOURNAL = "steps", "journal"
Progress = Callable[[str, int, int | None], None]
"""Called as progress(phase, done, total): shards of a pass by its title, then rows as "packs"."""


@dataclass(frozen=True)
class Built:
    """A pass that is whole. `shards`: rows and checksum of each; `accounts`: of its nodes, in order; `texts`: of each
    shard the file with the rows themselves, where its own only says which of them go on."""

    made: Pass
    folder: Path
    shards: list[dict[str, Any]]
    accounts: list[dict[str, Any]]
    texts: list[Path | None]

    def inputs(self, rename: str | None) -> list[worker.Input]:
        """Its rows as a next pass reads them."""
        return [worker.Input(kept_path(self.folder, number), texts, rename) for number, texts in enumerate(self.texts)]


class Builder:
    """Builds the passes of one plan.

    Args:
        root: the folder of prepared data.
        engine: who works on the shards.
        tokenizer_path: folder of the tokenizer that the stage trains with.
        seed: the data section's.
        max_bad_fraction: the run stops when a source has more bad rows than this.
        progress: see `Progress`.
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

    def build(self, ends: Sequence[Node]) -> list[Built]:
        """Make all passes up to the last nodes `ends`; every pass, in the order in which they ran."""
        for made in make_passes(ends):
            self.built[made.key] = self._pass(made)
        return list(self.built.values())

    def _pass(self, made: Pass) -> Built:
        folder = self.root / STEPS_FOLDER / made.key
        manifest = read_whole(folder / store.MANIFEST_FILE)
        if manifest is None:
            with store.locked(self.root, made.key), store.writable(self.root):
                manifest = read_whole(folder / store.MANIFEST_FILE) or self._make(made, folder)
        texts: list[Path | None] = [None] * len(manifest["shards"])
        if made.only_judges:
            texts = [given.texts or given.path for given in self._inputs(made, folder)]
        built = Built(made, folder, manifest["shards"], manifest["accounts"], texts)
        self._check_rows(built)
        return built

    def _make(self, made: Pass, folder: Path) -> dict[str, Any]:
        (folder / "work").mkdir(parents=True, exist_ok=True)
        inputs = self._inputs(made, folder)
        todo = self._tasks(made, folder, inputs)
        title = made.nodes[-1].title
        if made.decides and not (folder / worker.VERDICTS).is_file():
            for done, _ in enumerate(self.engine.run(worker.run_sketch, todo), start=1):
                self._progress(f"{made.first.title} (sketch)", done, len(todo))
            self._decide(made.first, todo, folder / worker.VERDICTS)
        markers = self._spread(todo, title, ahead=not made.parallel)
        if made.first.opened is not None:
            made.first.opened.unchanged()
        accounts = [merged(list(parts)) for parts in zip(*(marker["accounts"] for marker in markers), strict=True)]
        usage = folder / "work" / "usage.json"
        if usage.is_file():
            accounts[0]["usage"] = read_sealed(usage)
        self._check_passed_on(made, accounts[0])
        manifest = {
            "key": made.key,
            "nodes": [{"key": node.key, "title": node.title, "step": node.step} for node in made.nodes],
            "sambay_sft": sft.__version__,
            "shards": [marker["accounts"][-1]["kept"] for marker in markers],
            "files": {name: content for marker in markers for name, content in marker["files"].items()},
            "accounts": accounts,
        }
        write_bad_rows(folder, {node.title: node.step for node in made.nodes})
        # First, so that no kill leaves them beside a manifest that says that nothing is to be done.
        for pattern in ("sketch-*", ".*.tmp"):
            for path in folder.glob(pattern):
                path.unlink()
        shutil.rmtree(folder / "work", ignore_errors=True)
        write_sealed(folder / store.MANIFEST_FILE, manifest)
        return manifest

    # ---- what a pass reads ----

    def _inputs(self, made: Pass, folder: Path) -> list[worker.Input]:
        """Where the rows of each shard come from."""
        first = made.first
        if not made.reads:
            pairs = zip(first.inputs, first.rename, strict=True)
            return [found for node, name in pairs for found in self.built[node.key].inputs(name)]
        assert first.opened is not None and first.reading is not None
        spool, columns = folder / "work" / "spool", first.reading.columns
        parts = first.opened.parts(SHARD_ROWS, spool, columns) or [Part(_nothing, 0)]
        if len(parts) > 1 and made.parallel and sum(part.rows for part in parts) > SHARD_ROWS:
            self.engine.warm_up()
        return [worker.Input(part=part, reading=first.reading, title=first.title) for part in parts]

    def _tasks(self, made: Pass, folder: Path, inputs: list[worker.Input]) -> list[worker.Task]:
        workers = self.engine.workers if made.parallel and self._rows(made, inputs) > SHARD_ROWS else 1
        steps = []
        for place, node in enumerate(made.nodes[1:] if made.reads else made.nodes):
            # Of the first node's inputs each has a name of its own, which the input says.
            rename = node.rename[0] if node is not made.first else None
            work = folder / "work" if len(made.nodes) == 1 else folder / "work" / str(place)
            work.mkdir(exist_ok=True)
            context = Context(self.tokenizer_path, node.templates, self.seed, work, self.root / JOURNAL, workers)
            steps.append(worker.StepTask(node.step, node.title, node.config, context, rename))
        return [
            worker.Task(
                *(folder, number, found, tuple(steps), workers),
                decides=made.decides,
                documents=made.makes_documents,
                only_judges=made.only_judges,
            )
            for number, found in enumerate(inputs)
        ]

    def _rows(self, made: Pass, inputs: list[worker.Input]) -> int:
        """How many rows a pass gets."""
        if made.reads:
            return sum(given.part.rows for given in inputs if given.part is not None)
        return sum(shard["rows"] for node in made.first.inputs for shard in self.built[node.key].shards)

    # ---- work ----

    def _decide(self, node: Node, todo: list[worker.Task], verdicts: Path) -> None:
        """Decide on all rows at once, in this process."""
        scratch = verdicts.parent / "work" / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        temporary = verdicts.with_name(f".{verdicts.name}.tmp")
        step = step_class(node.step)(node.config, todo[0].steps[0].context)
        assert isinstance(step, TableStep)
        try:
            step.decide([worker.sketch_path(task.folder, task.number) for task in todo], temporary, scratch)
        finally:
            step.close()
        os.replace(temporary, verdicts)

    def _spread(self, todo: list[worker.Task], title: str, *, ahead: bool) -> list[dict[str, Any]]:
        """Have every shard done that isn't yet; returns all markers in order."""
        markers = {task.number: read_marker(task.folder, task.number) for task in todo}
        missing = [task for task in todo if markers[task.number] is None]
        done = len(todo) - len(missing)
        if done:
            log.info("%s: %d of %d shards were done already", title, done, len(todo))
        if missing:
            self._progress(title, done, len(todo))
        if ahead and missing:
            worker.begin(missing)
        for task, marker in self.engine.run(worker.run_pass, missing):
            markers[task.number] = marker
            done += 1
            self._progress(title, done, len(todo))
        return [marker for _, marker in sorted(markers.items()) if marker is not None]

    # ---- what must hold ----

    def _check_passed_on(self, made: Pass, account: dict[str, Any]) -> None:
        """A pass must have taken exactly the rows that the passes before it let go on."""
        if made.reads:
            return
        given = [shard for node in made.first.inputs for shard in self.built[node.key].shards]
        rows, checksum = sum(shard["rows"] for shard in given), sum(int(shard["checksum"], 16) for shard in given)
        taken = account["taken"]
        if taken["rows"] != rows or (int(taken["checksum"], 16) - checksum) % (1 << 128):
            raise AssertionError(
                f"{made.first.title}: {rows} rows went in, {taken['rows']} were looked at: one was lost"
            )

    def _check_rows(self, built: Built) -> None:
        """Refuse a source that is empty, or a step that can't use too many of its rows."""
        for node, account in zip(built.made.nodes, built.accounts, strict=True):
            rows, bad = account["taken"]["rows"], bad_rows(node.step, account["reasons"])
            name = node.opened.name if node.opened else node.title
            if node.opened is not None and rows == 0:
                raise UserError(f"{name}: the data is empty, there is no row in it.")
            look = f"{first_bad(node.step, bad, account['examples'])}{where_bad([built.folder], sum(bad.values()))}"
            refuse_bad_rows(name, bad, rows, self.max_bad_fraction, look)


def _nothing() -> Iterator[Row]:
    return iter(())
