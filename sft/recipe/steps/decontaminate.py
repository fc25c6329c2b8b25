"""Settings of the step `decontaminate`."""

from __future__ import annotations

from pydantic import Field, model_validator

from sft.recipe.problems import KeyProblem, Section, raise_problems
from sft.recipe.steps.settings import DataSet, Loc, StepSettings
from sft.recipe.values import Name, PathText


class Benchmark(Section):
    """A set of problems that must not be trained on."""

    name: Name = Field(description="How reports call it.")
    path: PathText = Field(description="Hub id, or local files.")
    config: str | None = Field(default=None, description="Configuration (subset) of a Hub data set.")
    split: str = Field(default="test", description="Its split.")
    revision: str | None = Field(default=None, description="Revision of a Hub data set.")
    column: str | None = Field(
        default=None, description="The column with the problem. Default: problem, question, Question or prompt."
    )


class DecontaminateStep(StepSettings):
    """Drop rows whose problem is one of a benchmark's, or nearly, or half of one: another number or name is still a
    match.

    Compared are words and numbers of what is asked, however they are written (LaTeX, Unicode, case, punctuation,
    spacing, `two` for 2) and whatever instructions stand around it. A row is dropped when its problem, or a passage of
    it, is a benchmark's problem but for a few words (`similarity`), or repeats enough of it (`overlap`). Benchmark
    problems of fewer than `ngram` words match whole problems only, never passages.
    """

    against: list[Benchmark] = Field(min_length=1)
    similarity: float = Field(
        default=0.75,
        ge=0.6,
        le=1,
        description="Share of the benchmark problem's words that need no edit, from which a row is a match.",
    )
    ngram: int = Field(default=8, gt=1, description="Words of an n-gram.")
    overlap: float = Field(
        default=0.4,
        gt=0,
        le=1,
        description="Share of the benchmark problem's words in n-grams that the row has too, from which it is a match.",
    )
    also_text: bool = Field(
        default=False,
        description="Look for the n-grams in the whole row too: a benchmark problem quoted in a trace, or answered in "
        "a later turn.",
    )

    @model_validator(mode="after")
    def _check(self) -> DecontaminateStep:
        names = [benchmark.name for benchmark in self.against]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            reason = f"two benchmarks are called {repeated[0]!r}; give each its own name"
            raise_problems("decontaminate", [KeyProblem(("against",), reason, repeated[0])])
        return self

    def places(self) -> dict[Loc, DataSet | str]:
        """The benchmarks."""
        return {("against", i, "path"): DataSet(b.path, b.split, b.config) for i, b in enumerate(self.against)}
