"""What a stage does about steps whose numbers are no numbers, or far from those of the steps before."""

from __future__ import annotations

from pydantic import Field

from sft.recipe.problems import Section


class GuardSection(Section):
    """Steps that are left out because they would do harm; then a return to a checkpoint; then the end."""

    spike: float | None = Field(
        default=8.0,
        gt=0,
        description="Leave out a step whose loss or gradient norm lies so many robust deviations above the median of "
        "those before, both in logarithms. null: only numbers that aren't finite.",
    )
    window: int = Field(default=64, ge=8, description="Steps that median and deviation are of; half as many at first.")
    max_skipped: int = Field(
        default=3,
        ge=0,
        description="Steps that may be left out, of the last `window`. One more, and the stage returns to its last "
        "checkpoint's weights and goes on with the rows that come next.",
    )
    rollbacks: int = Field(default=1, ge=0, description="How often it returns; after that the stage stops.")
