"""Settings of the step `quality`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.problems import Section


class QualityStep(Section):
    """Drop traces that would teach bad habits: cut off, looping, in a mix of languages, without an answer."""

    think: Literal["required", "optional"] = Field(
        default="required", description="Whether the answer must begin with a closed <think> block."
    )
    answer: Literal["boxed", "any", "none"] = Field(
        default="any", description="What must follow the thinking: a boxed answer, any text, nothing in particular."
    )
    max_repetition: float = Field(
        default=0.2, gt=0, le=1, description="Largest share of the text that repeated n-grams may cover."
    )
    max_loop: int = Field(default=8, gt=1, description="A text that ends in this many copies of one passage is a loop.")
    max_foreign: float = Field(
        default=0.02, ge=0, le=1, description="Largest share of letters in another script than the prompt's."
    )
    min_characters: int = Field(default=1, ge=0, description="Shortest completion.")
