"""Settings of the step `join`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.steps.settings import DataSet, Loc, StepSettings
from sft.recipe.values import PathText


class JoinStep(StepSettings):
    """Add the teacher's tokens and their log probabilities, which another data set holds, to rows of the same id.

    A row's id is that of its source (`columns: {id: uuid}`). Copies and rollouts have ids of their own, so `join` comes
    before the steps that make them.
    """

    not_behind = ("explode_rollouts", "generate")

    path: PathText = Field(
        description="Hub id, or a local file, folder or glob of .jsonl, .parquet, .json or .csv files."
    )
    config: str | None = Field(default=None, description="Configuration (subset) of a Hub data set.")
    split: str = Field(default="train", description="Its split.")
    revision: str | None = Field(default=None, description="Revision of a Hub data set.")
    on: str = Field(default="sample_uuid", description="The other set's column that holds the row's id.")
    teacher_ids: str = Field(default="token_ids", description="Its column with the teacher's tokens.")
    teacher_logprobs: str = Field(default="logprobs", description="Its column with their natural log probabilities.")
    missing: Literal["drop", "keep"] = Field(default="drop", description="Rows that aren't in the other set.")

    def places(self) -> dict[Loc, DataSet | str]:
        """The other set."""
        return {("path",): DataSet(self.path, self.split, self.config)}
