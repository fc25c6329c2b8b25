"""Settings of the step `join`."""

from __future__ import annotations

from pydantic import Field

from sft.recipe.problems import Section


class JoinStep(Section):
    """Add columns of another data set to rows of the same id: the teacher's published log probabilities."""

    path: str = Field(description="Hub id, or local files.")
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    on: str = Field(default="sample_uuid", description="The other set's column that holds the row's id.")
    teacher_ids: str = Field(default="token_ids", description="Its column with the teacher's tokens.")
    teacher_logprobs: str = Field(default="logprobs", description="Its column with their log probabilities.")
    required: bool = Field(default=True, description="Drop rows that aren't in the other set.")
