"""Settings of the step `top_logprobs`."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, field_validator

from sft.recipe.steps.settings import DataSet, Loc, StepSettings
from sft.recipe.values import PathText


class TopLogprobsStep(StepSettings):
    """Learn from what a teacher found likeliest at each token of the last answer, not from its tokens alone.

    The column holds the `logprobs` of an OpenAI chat answer ({content: [{token, bytes, logprob, top_logprobs}]}), or
    {tokens, ids, logprobs}: the teacher's n token ids of the answer, and at each the k likeliest ids and their natural
    log probabilities, n lists of k. A teacher's token is ours where both spell the same bytes.
    """

    column: str | None = Field(
        default=None,
        description="Column that holds them. Default: the written tokens' own, as `join` or `generate` noted (k = 1).",
    )
    tokenizer: PathText | None = Field(
        default=None,
        description="Folder or Hub id of the tokenizer whose ids they are. Default: that of the model that is trained.",
    )
    missing: Literal["drop", "keep"] = Field(
        default="drop", description="Rows without them; kept ones are learned from as ever."
    )

    @field_validator("tokenizer")
    @classmethod
    def _at_home(cls, path: str | None) -> str | None:
        return os.path.expanduser(path) if path is not None else None

    def needs_answers(self) -> bool:
        """Only an answer has tokens."""
        return True

    def columns(self) -> dict[Loc, str]:
        """The column with the teacher's tokens."""
        return {} if self.column is None else {("column",): self.column}

    def behind(self) -> dict[Loc, tuple[str, ...]]:
        """What notes a teacher's tokens where no column holds them."""
        return {} if self.column is not None else {(): ("join", "generate")}

    def places(self) -> dict[Loc, DataSet | str]:
        """The teacher's tokenizer."""
        return {} if self.tokenizer is None else {("tokenizer",): self.tokenizer}
