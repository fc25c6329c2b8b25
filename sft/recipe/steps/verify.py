"""Settings of the step `verify`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.problems import Section


class VerifyStep(Section):
    """Check each row's final answer against the gold answer."""

    kind: Literal["auto", "math", "choice", "exact", "number"] = Field(
        default="auto", description="How answers are compared; `auto` goes by the gold answer."
    )
    gold: str = Field(
        default="answer", description="Where the gold answer is: `answer` (the source's column), or a carried column."
    )
    keep: list[Literal["right", "wrong", "undecided"]] = Field(default=["right"], description="Verdicts that go on.")
    missing_gold: Literal["keep", "drop"] = Field(default="drop", description="Rows without a gold answer.")
    timeout: float = Field(default=5.0, gt=0, description="Seconds one comparison may take before it is killed.")
