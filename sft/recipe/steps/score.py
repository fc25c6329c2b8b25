"""Settings of the step `score`."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, field_validator

from sft.recipe.problems import Section
from sft.recipe.steps.settings import DataSet, Loc, StepSettings
from sft.recipe.values import PathText


class RankSurprisal(Section):
    """Note `rank_surprisal`, an answer's mean rank over its mean surprisal (arXiv 2601.14249); low is good."""

    max_rank: int = Field(default=100, gt=1, le=1_000_000, description="Ranks count as this at most.")


class LocalNaturalness(Section):
    """Note `local_naturalness`, the likelihood of each sentence after the few before it alone (arXiv 2510.03988).

    High is good. Each sentence is read again with those before it, which takes (context + 1) / every times the answer's
    tokens in a forward pass of their own: `every: 50` makes that about a tenth for answers of many sentences.
    """

    context: int = Field(default=4, gt=0, description="Sentences before each; nothing else is read.")
    every: int = Field(default=1, gt=0, description="Score one sentence of so many, evenly spaced; 1: each.")


class ScoreStep(StepSettings):
    """The student's probability of each sentence beside the teacher's (divergence-aware sampling, arXiv 2601.09088)."""

    model: PathText = Field(description="The student before training: a checkpoint folder or Hub id.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a Hub checkpoint.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="What the weights are held in on a GPU; without one it is float32."
    )
    batch_tokens: int = Field(default=32768, gt=0, description="Tokens of one packed forward pass.")
    max_tokens: int | None = Field(default=None, gt=0, description="Drop conversations with more tokens unscored.")
    margin: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="A sentence is the teacher's when its probability there is higher by more than this, the student's "
        "when it is lower by more, else shared.",
    )
    teacher_tokenizer: PathText | None = Field(
        default=None,
        description="Folder or Hub id of the teacher's tokenizer. Default: its ids are those of the tokenizer that is "
        "trained with, as gpt-oss's are those of Phi-4-mini.",
    )
    required: bool = Field(
        default=True, description="Drop rows that can't be compared; else they keep the student's figures alone."
    )
    keep_sentences: bool = Field(default=False, description="Note both probabilities of each sentence too.")

    rank_surprisal: RankSurprisal | None = Field(default=None, description=RankSurprisal.__doc__)
    local_naturalness: LocalNaturalness | None = Field(default=None, description=LocalNaturalness.__doc__)

    @field_validator("model", "teacher_tokenizer")
    @classmethod
    def _at_home(cls, path: str | None) -> str | None:
        return os.path.expanduser(path) if path is not None else None

    def needs_answers(self) -> bool:
        """Rows without one are dropped."""
        return True

    def behind(self) -> dict[Loc, tuple[str, ...]]:
        """What gives the teacher's log probabilities."""
        return {("required",): ("join", "generate")} if self.required else {}

    def notes(self) -> tuple[str, ...]:
        """The student's views."""
        views = {"rank_surprisal": self.rank_surprisal, "local_naturalness": self.local_naturalness}
        return tuple(f"score.{name}" for name, settings in views.items() if settings is not None)

    def places(self) -> dict[Loc, DataSet | str]:
        """The student's checkpoint and the teacher's tokenizer."""
        tokenizer: dict[Loc, DataSet | str] = (
            {} if self.teacher_tokenizer is None else {("teacher_tokenizer",): self.teacher_tokenizer}
        )
        return {("model",): self.model, **tokenizer}
