"""Settings of the step `top_logprobs`."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sft.recipe.problems import KeyProblem, raise_problems
from sft.recipe.steps.settings import DataSet, Loc, StepSettings
from sft.recipe.values import PathText

OF_MODEL = ("revision", "dtype", "k", "batch_tokens")
"""Keys of a teacher in this process."""


class TopLogprobsStep(StepSettings):
    """Learn from what a teacher found likeliest at each token of the last answer, not from its tokens alone.

    The column holds the `logprobs` of an OpenAI chat answer ({content: [{token, bytes, logprob, top_logprobs}]}), or
    {tokens, ids, logprobs}: the teacher's n token ids of the answer, and at each the k likeliest ids and their natural
    log probabilities, n lists of k. A teacher's token is ours where both spell the same bytes. With `model` no
    column is needed: a teacher that reads our ids is asked here.
    """

    column: str | None = Field(
        default=None,
        description="Column that holds them. Default: the written tokens' own, as `join` or `generate` noted (k = 1).",
    )
    tokenizer: PathText | None = Field(
        default=None,
        description="Folder or Hub id of the tokenizer whose ids they are. Default: that of the model that is trained.",
    )
    model: PathText | None = Field(
        default=None, description="Checkpoint folder or Hub id of a teacher that is asked here; its ids must be ours."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a Hub checkpoint.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="What the weights are held in on a GPU; without one it is float32."
    )
    k: int = Field(default=64, gt=0, description="How many tokens `model` names at each place, the likeliest first.")
    batch_tokens: int = Field(default=32768, gt=0, description="Tokens of one packed forward pass.")
    missing: Literal["drop", "keep"] = Field(
        default="drop", description="Rows without them; kept ones are learned from as ever."
    )

    @field_validator("tokenizer", "model")
    @classmethod
    def _at_home(cls, path: str | None) -> str | None:
        return os.path.expanduser(path) if path is not None else None

    @model_validator(mode="after")
    def _check(self) -> TopLogprobsStep:
        if self.model is not None:
            keys = [key for key in ("column", "tokenizer") if getattr(self, key) is not None]
            reason = "goes with a teacher that was asked elsewhere, and `model` is asked here: leave one of them out"
        else:
            keys = [key for key in OF_MODEL if self.changed(key)]
            reason = "has no effect without `model`, the teacher that is asked here"
        if keys:
            raise_problems("top_logprobs", [KeyProblem((key,), reason, getattr(self, key)) for key in keys])
        return self

    def needs_answers(self) -> bool:
        """Only an answer has tokens."""
        return True

    def columns(self) -> dict[Loc, str]:
        """The column with the teacher's tokens."""
        return {} if self.column is None else {("column",): self.column}

    def behind(self) -> dict[Loc, tuple[str, ...]]:
        """What notes a teacher's tokens where no column holds them."""
        return {} if self.column is not None or self.model is not None else {(): ("join", "generate")}

    def places(self) -> dict[Loc, DataSet | str]:
        """The teacher, or its tokenizer."""
        named = {"model": self.model, "tokenizer": self.tokenizer}
        return {(key,): place for key, place in named.items() if place is not None}
