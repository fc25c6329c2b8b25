"""Settings of the step `mix`."""

from __future__ import annotations

from pydantic import Field

from sft.recipe.problems import Section


class MixStep(Section):
    """Take sources in given proportions."""

    weights: dict[str, float] = Field(description="Share of the tokens that each source gets, by its name.")
    tokens: int | None = Field(default=None, gt=0, description="Tokens in all. None: as many as repeats allow.")
    max_repeats: int = Field(default=1, gt=0, description="How often a row may be taken.")
