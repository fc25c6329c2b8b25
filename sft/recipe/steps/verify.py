"""Settings of the step `verify`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.steps.settings import Loc, StepSettings


class VerifyStep(StepSettings):
    """Check each row's final answer against the gold answer."""

    kind: Literal["auto", "math", "choice", "exact", "number"] = Field(
        default="auto",
        description="How answers are compared: by math-verify, as a letter A to J or a choice's text, as texts, or as"
        " plain numbers (fractions, percent, 3e5, units). `auto` goes by each gold answer.",
    )
    gold: str = Field(
        default="answer",
        min_length=1,
        description="Where the gold answer is: `answer` (the source's column), or a carried column. Of a solution, what"
        " is in \\boxed{} or after ####; of a list, its only entry.",
    )
    choices: str | None = Field(
        default=None,
        min_length=1,
        description="A carried column with the choices (a list of texts). None: those that the problem lists.",
    )
    free_form: bool = Field(
        default=True,
        description="Look for the answer in the text where none is in \\boxed{}, after #### or `A:`; not in a trace"
        " that is cut off while thinking.",
    )
    keep: list[Literal["right", "wrong", "undecided"]] = Field(
        default=["right"],
        min_length=1,
        description="Verdicts that go on; all are noted as `verify` in the row's facts.",
    )
    missing_gold: Literal["keep", "drop"] = Field(default="drop", description="Rows without a gold answer.")
    timeout: float = Field(
        default=5.0, gt=0, le=600, description="Seconds of computing that one comparison may take before it is killed."
    )

    def needs_answers(self) -> bool:
        """Rows without one are dropped."""
        return True

    def columns(self) -> dict[Loc, str]:
        """The columns with gold answers and choices."""
        named: dict[Loc, str | None] = {("gold",): self.gold, ("choices",): self.choices}
        return {loc: name for loc, name in named.items() if name is not None and (name != "answer" or loc != ("gold",))}

    def roles(self) -> dict[Loc, str]:
        """The gold answer, where it is the source's own."""
        return {("gold",): "answer"} if self.gold == "answer" and self.missing_gold == "drop" else {}
