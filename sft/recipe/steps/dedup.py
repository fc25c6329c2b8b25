"""Settings of the step `dedup`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.problems import Section


class DedupStep(Section):
    """Drop copies and near-copies, within and across sources."""

    by: Literal["problem", "text"] = Field(
        default="problem",
        description="Compare problems (all answers of the preferred source's problem stay) or whole rows.",
    )
    method: Literal["exact", "minhash"] = Field(default="minhash")
    threshold: float = Field(default=0.8, gt=0, lt=1, description="Jaccard similarity from which two are one.")
    prefer: list[str] = Field(
        default_factory=list,
        description="Sources in the order of preference; then `longest` or `shortest`. Ties by content.",
    )
