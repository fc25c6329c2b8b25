"""Settings of the step `quality`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sft.recipe.problems import KeyProblem, raise_problems
from sft.recipe.steps.settings import Loc, StepSettings


class QualityStep(StepSettings):
    """Drop traces that would teach bad habits: cut off, looping, in a mix of languages, without an answer."""

    think: Literal["required", "optional"] = Field(
        default="required", description="Whether the answer must begin with a closed <think> block."
    )
    answer: Literal["boxed", "any", "none"] = Field(
        default="any", description="What must follow the thinking: a boxed answer, any text, nothing in particular."
    )
    finish_reason: str | None = Field(
        default=None, description="A carried column that says why the generation ended; null says nothing."
    )
    finished: list[str] = Field(
        default=["stop"], min_length=1, description="Its values for generations that ended by themselves."
    )
    max_repetition: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="Largest share of the words that stand in an n-gram which stood there before.",
    )
    ngram: int = Field(default=20, gt=1, description="Words of such an n-gram.")
    max_loop: int = Field(default=8, gt=1, description="A text that ends in this many copies of one passage is a loop.")
    max_foreign: float = Field(
        default=0.02, ge=0, le=1, description="Largest share of letters in another script than the prompt's."
    )
    min_characters: int = Field(default=1, ge=0, description="Shortest completion.")

    @model_validator(mode="after")
    def _check(self) -> QualityStep:
        if self.changed("finished") and self.finish_reason is None:
            reason = "needs `finish_reason`, the column whose values these are"
            raise_problems("quality", [KeyProblem(("finished",), reason, self.finished)])
        return self

    def needs_answers(self) -> bool:
        """Rows without one are dropped."""
        return True

    def columns(self) -> dict[Loc, str]:
        """The column that says why a generation ended."""
        return {} if self.finish_reason is None else {("finish_reason",): self.finish_reason}
