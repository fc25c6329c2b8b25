"""Settings of the step `dedup`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sft.recipe.problems import KeyProblem, raise_problems
from sft.recipe.steps.settings import Loc, StepSettings


class DedupStep(StepSettings):
    """Drop copies and near-copies, within and across sources, however they are written (LaTeX, case, `$5` or 5 dollars)
    and whatever instructions stand around a problem.

    Of copies the preferred one stays: by `prefer`, then by `then`; what is still equal is decided by content, never by
    the order of rows. A near-copy goes only when what it is near to stays.
    """

    by: Literal["problem", "text"] = Field(
        default="problem",
        description="Compare problems (all rows that answer one problem of one source stay or go together), or whole "
        "rows, row by row.",
    )
    method: Literal["exact", "minhash"] = Field(
        default="minhash", description="Drop equal ones only, or near ones too. Both ignore how things are written."
    )
    threshold: float = Field(
        default=0.65,
        ge=0.5,
        lt=1,
        description="Jaccard similarity from which two are near: of 5-character shingles of problems, of 5-word "
        "shingles of whole rows.",
    )
    differences: Literal["wording", "any"] = Field(
        default="wording",
        description="What near-copies of problems may differ in. `wording`: a typo, a synonym, a name throughout, the "
        "order of sentences; within them numbers, formulas, units and words like more, not, first must be the same and "
        "in the same order, and no word of the text may have taken another's place, since all that makes another "
        "problem. `any`: whatever the "
        "threshold allows, so of problems made from one template one stays. Whole rows may always differ in anything.",
    )
    prefer: list[str] = Field(
        default_factory=list, description="Names of sources, the preferred first; those not named come last."
    )
    then: Literal["longest", "shortest"] = Field(
        default="longest",
        description="Of equally preferred sources, the one with the longest (shortest) row, in characters.",
    )

    @model_validator(mode="after")
    def _check(self) -> DedupStep:
        problems = []
        for name in sorted({name for name in self.prefer if self.prefer.count(name) > 1}):
            problems.append(KeyProblem(("prefer",), f"names the source {name!r} twice", name))
        for name in {"longest", "shortest"} & set(self.prefer):
            problems.append(KeyProblem(("prefer",), f"lists sources; write `then: {name}` instead", name))
        if problems:
            raise_problems("dedup", problems)
        return self

    def sources(self) -> dict[Loc, str]:
        """Those that are preferred."""
        return {("prefer", index): name for index, name in enumerate(self.prefer)}
