"""What is known of a stage's rows before it runs: what has been prepared, else what the recipe says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.utils.files import read_sealed

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import DataSource, Stage

DOCUMENT = 4096
"""Tokens of a document of packed rows of which nothing is known."""
SETTINGS = {"prompt_template", "completion_template", "system_prompt", "over_length", "mask_history"}


@dataclass(frozen=True)
class Rows:
    """A stage's rows. `known`: from where; empty where nobody knows how many there are.

    Attributes:
        rows, tokens: of an epoch. document: tokens of a document, on average. supervised: the share that has a loss.
    """

    known: str = ""
    rows: int | None = None
    tokens: int | None = None
    document: float | None = None
    supervised: float = 1.0


@dataclass(frozen=True)
class Told:
    """What a user says of rows that aren't prepared: tokens of an epoch, and of a document of packed ones."""

    tokens: int | None = None
    document: int = DOCUMENT


def rows_of(paths: RunPaths, stage: Stage, told: Told) -> Rows:
    """The prepared rows of a stage; else what is told of them."""
    manifest = _prepared(paths, stage)
    if manifest is not None:
        documents = max(1, manifest["documents"])
        share = manifest["supervised_tokens"] / max(1, manifest["tokens"])
        return Rows(
            f"prepared ({manifest['key'][:8]})",
            manifest["packs"],
            manifest["tokens"],
            manifest["tokens"] / documents,
            share,
        )
    length, document = stage.train.max_length, float(told.document) if stage.train.packing else None
    if told.tokens is None or length is None:
        return Rows(document=document)
    return Rows("as --epoch_tokens says", max(1, math.ceil(told.tokens / length)), told.tokens, document)


def _prepared(paths: RunPaths, stage: Stage) -> dict[str, Any] | None:
    """The manifest of a stage's prepared rows: by its key where the stage is done, else the only one that was prepared
    with its settings from as many sources. The key itself follows from the tokenizer, which isn't loaded here."""
    done = read_sealed(paths.stage_manifest(stage.name)) or {}
    key = (done.get("parts") or {}).get("data")
    if key:
        return read_sealed(paths.prepared / str(key) / "manifest.json")
    wanted = stage.data.model_dump(include=SETTINGS)
    wanted |= {"max_length": stage.train.max_length, "packing": stage.train.packing}
    found = []
    for file in sorted(Path(paths.prepared).glob("*/manifest.json")):
        manifest = read_sealed(file)
        if manifest is None or len(manifest.get("inputs", ())) != _sources(stage.data.sources):
            continue
        said = manifest.get("recipe", {})
        if all(said.get(name) == value for name, value in wanted.items()):
            found.append(manifest)
    if stage.data.validation is not None and len(found) == 2:
        found = [max(found, key=lambda manifest: int(manifest["documents"]))]  # the other holds the rows held out
    return found[0] if len(found) == 1 else None


def _sources(sources: list[DataSource]) -> int:
    return sum(_sources(source.sources) if source.sources else 1 for source in sources)
