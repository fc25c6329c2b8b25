"""Settings of the step `filter`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sft.recipe.problems import KeyProblem, raise_problems
from sft.recipe.steps.settings import Loc, StepSettings

FIELDS = ("domain", "source", "answer")
"""Columns of the record itself."""


class FilterStep(StepSettings):
    """Keep rows by what a column says: `{column: problem_is_valid, one_of: ["Yes"]}`, `{column: n, min: 2}`."""

    column: str = Field(min_length=1, description="`domain`, `source`, `answer`, or a carried column.")
    one_of: list[str | int | float | bool] | None = Field(
        default=None, min_length=1, description="Values that go on; a text is compared without case and outer spaces."
    )
    none_of: list[str | int | float | bool] | None = Field(
        default=None, min_length=1, description="Values that don't go on."
    )
    min: float | None = Field(default=None, description="Smallest number that goes on.")
    max: float | None = Field(default=None, description="Largest number that goes on.")
    missing: Literal["keep", "drop"] = Field(
        default="drop", description="Rows where it is null, or no number where `min` or `max` wants one."
    )

    @model_validator(mode="after")
    def _check(self) -> FilterStep:
        problems = []
        if all(limit is None for limit in (self.one_of, self.none_of, self.min, self.max)):
            problems.append(KeyProblem((), "keeps everything: give one_of, none_of, min or max", None))
        if self.min is not None and self.max is not None and self.min > self.max:
            problems.append(KeyProblem(("max",), f"is {self.max:g}, less than min, which is {self.min:g}", self.max))
        if problems:
            raise_problems("filter", problems)
        return self

    def columns(self) -> dict[Loc, str]:
        """The column, unless the record has it itself."""
        return {} if self.column in FIELDS else {("column",): self.column}

    def roles(self) -> dict[Loc, str]:
        """The column, where the source must say what it is."""
        wanted = self.column in ("answer", "domain") and self.missing == "drop"
        return {("column",): self.column} if wanted else {}
