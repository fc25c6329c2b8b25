"""Settings of the step `select`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.problems import Section


class SelectStep(Section):
    """Choose rows: by problem, by difficulty, by length, by domain, for diversity."""

    per_problem: int | None = Field(default=None, gt=0, description="At most this many answers of each problem.")
    prefer: list[Literal["shortest", "longest", "teacher", "random"]] = Field(
        default=["random"], description="Which answers of a problem go first: `teacher` by teacher sentences (score)."
    )
    pass_rate: list[float] | None = Field(
        default=None, min_length=2, max_length=2, description="Lowest and highest pass rate of the problem's rollouts."
    )
    pass_rate_column: str | None = Field(default=None, description="A carried column with the pass rate.")
    quotas: dict[str, int] | None = Field(default=None, description="Most rows of each domain.")
    rows: int | None = Field(default=None, gt=0, description="Most rows in all.")
    tokens: int | None = Field(default=None, gt=0, description="Most tokens in all.")
