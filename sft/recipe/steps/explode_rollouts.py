"""Settings of the step `explode_rollouts`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.problems import Section


class ExplodeRolloutsStep(Section):
    """One row a rollout, from a row that holds several."""

    column: str = Field(description="The carried column with the rollouts: a list of texts, or of conversations.")
    flags: dict[str, str] = Field(
        default_factory=dict,
        description="Name -> carried column with a list aligned to the rollouts: {complete: is_reasoning_complete}.",
    )
    require: list[str] = Field(default_factory=list, description="Flags of which at least one must be true.")
    require_all: list[str] = Field(default_factory=list, description="Flags that must all be true.")
    missing_flag: Literal["keep", "drop"] = Field(
        default="drop", description="A rollout whose flag is null, or beyond the end of a shorter list of flags."
    )
    max_rollouts: int | None = Field(
        default=None, gt=0, description="At most this many of each row, chosen by the seed."
    )
