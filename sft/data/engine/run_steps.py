"""The steps of a section, from its sources to rows that look like a source themselves."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.data.engine.builder import STEPS_FOLDER, Builder, Built, Progress
from sft.data.engine.local import Engine
from sft.data.engine.plan import Node, make_plan
from sft.data.engine.shards import read_records
from sft.data.read.row import Row
from sft.data.read.sources import OpenSource
from sft.recipe.schema import DataSection

COLUMNS = {"messages": "messages", "id": "id"}  # of the rows that come out


@dataclass(frozen=True)
class Stepped:
    """What the steps of a section made.

    Attributes:
        source: the rows, to be read like any source.
        plan: the root of the tree.
        entries: the funnel, a line for each node in the order in which they run.
        leaves: of each source: name, what its content is keyed by, its licence, rows read.
    """

    source: OpenSource
    plan: Node
    entries: list[dict[str, Any]]
    leaves: list[dict[str, Any]]


def run_steps(
    data: DataSection,
    root: Path,
    tokenizer: Any,
    digest: str,
    engine: Engine,
    progress: Progress | None = None,
) -> Stepped:
    """Run the steps of `data`, or look up what is there already. `digest`: the hash of tokenizer and chat template.

    Raises UserError or UsageError in one sentence for what is wrong with the recipe or the data.
    """
    plan = make_plan(data, digest)
    path = saved_tokenizer(root, tokenizer, digest)
    builder = Builder(root, engine, path, data.seed, data.max_bad_fraction, progress)
    built = builder.build(plan)
    nodes = {node.key: node for node in plan.walk()}
    made = [builder.built[key] for key in nodes]
    entries = [item.entry for item in made if item.entry is not None]
    return Stepped(_as_source(built), plan, entries, [_leaf(item) for item in made if item.node.step == "read"])


def saved_tokenizer(root: Path, tokenizer: Any, digest: str) -> str:
    """The folder under `root` where the tokenizer is saved, for worker processes to load."""
    folder = root / STEPS_FOLDER / "tokenizers" / digest[:32]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
        tokenizer.save_pretrained(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was faster
            shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)


def _as_source(built: Built) -> OpenSource:
    def read() -> Iterator[Row]:
        for shard in built.shards:
            for batch in read_records(shard.path):
                for record in batch:
                    file, _, line = record.place.rpartition(":")
                    yield Row(file, int(line), {"id": record.id, "messages": record.messages})

    return OpenSource("steps", {"steps": built.node.key}, read)


def _leaf(item: Built) -> dict[str, Any]:
    node, entry = item.node, item.entry or {}
    assert node.opened is not None and node.source is not None
    return {
        "source": node.opened.name,
        **node.opened.identity,
        "license": node.source.license,
        "columns": node.source.columns or {},
        "rows": entry["taken"]["rows"],
    }
