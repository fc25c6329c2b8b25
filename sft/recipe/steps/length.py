"""Settings of the step `length`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.steps.settings import StepSettings


class LengthStep(StepSettings):
    """Drop rows that are too short or too long, in tokens under the chat template."""

    min_tokens: int = Field(default=0, ge=0, description="Fewest tokens of a row.")
    max_tokens: int | None = Field(default=None, gt=0, description="Most tokens of a row.")
    of: Literal["all", "trained"] = Field(default="all", description="Count all tokens, or those that are learned.")

    def needs_answers(self) -> bool:
        """Rows without one are dropped."""
        return True
