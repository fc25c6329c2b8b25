"""Settings of the step `score`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.problems import Section


class ScoreStep(Section):
    """The student's probability of each sentence beside the teacher's (divergence-aware sampling, arXiv 2601.09088)."""

    model: str = Field(description="The student: a checkpoint folder or Hub id.")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch_tokens: int = Field(default=32768, gt=0, description="Tokens of one packed forward pass.")
    margin: float = Field(
        default=0.2,
        gt=0,
        description="A sentence is the teacher's when its probability there is higher by this, else the student's.",
    )
