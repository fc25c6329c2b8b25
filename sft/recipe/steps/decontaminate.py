"""Settings of the step `decontaminate`."""

from __future__ import annotations

from pydantic import Field

from sft.recipe.problems import Section


class Benchmark(Section):
    """A set of problems that must not be trained on."""

    name: str
    path: str = Field(description="Hub id, or local files.")
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    column: str = Field(default="problem", description="The column with the problem.")


class DecontaminateStep(Section):
    """Drop rows whose problem is one of a benchmark's, or nearly."""

    against: list[Benchmark] = Field(min_length=1)
    ngram: int = Field(default=8, gt=1, description="Words in a row that must be the same.")
    overlap: float = Field(
        default=0.5, gt=0, le=1, description="Share of the benchmark problem's n-grams that makes a match."
    )
