"""One preparation: all that decides its outcome, and what is counted while rows pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sft.data.engine.run_steps import Stepped
from sft.data.read.sources import OpenSource
from sft.data.tokenize.render import Renderer
from sft.recipe.schema import DataSection


@dataclass
class Job:
    """All that decides the content of a store."""

    data: DataSection
    sources: list[OpenSource]
    columns: list[dict[str, str] | None]  # of each source, as the recipe names them
    stepped: Stepped | None  # where the sources went through steps: then `sources` is what came out
    max_length: int | None
    packing: bool
    renderer: Renderer
    tokenizer: Any
    identity: dict[str, Any]
    key: str


@dataclass
class Tally:
    """Counts while rows pass."""

    rows: int = 0
    supervised: int = 0
    lengths: list[int] = field(default_factory=list)  # of the documents kept
    shortest: int | None = None  # of all documents, kept or not
    longest: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
