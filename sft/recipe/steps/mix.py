"""Settings of the step `mix`."""

from __future__ import annotations

from pydantic import Field, model_validator

from sft.recipe.problems import KeyProblem, raise_problems
from sft.recipe.steps.settings import Loc, StepSettings


class MixStep(StepSettings):
    """Take sources in given proportions of tokens, repeating the rows of small ones."""

    names_all = True

    weights: dict[str, float] = Field(
        min_length=1,
        description="Share of the tokens that each source gets, by its name; normalised to a sum of 1. Every source "
        "must be named: 0 drops it.",
    )
    tokens: int | None = Field(
        default=None, gt=0, description="Tokens in all. None: as many as the scarcest source allows."
    )
    max_repeats: int | dict[str, int] = Field(
        default=1, description="How often a row may be taken, of all sources or by name (others: once)."
    )

    @model_validator(mode="after")
    def _check(self) -> MixStep:
        problems = [
            KeyProblem(("weights", name), "must be a positive number or 0", weight)
            for name, weight in self.weights.items()
            if not 0 <= weight < float("inf")
        ]
        if not problems and not sum(self.weights.values()):
            problems.append(KeyProblem(("weights",), "can't all be 0", self.weights))
        repeats = self.max_repeats if isinstance(self.max_repeats, dict) else {"": self.max_repeats}
        for name, times in repeats.items():
            where = ("max_repeats", name) if name else ("max_repeats",)
            if name and name not in self.weights:
                problems.append(KeyProblem(where, f"{name!r} is no source named in weights", times))
            elif times < 1:
                problems.append(KeyProblem(where, "must be 1 or more", times))
        if problems:
            raise_problems("mix", problems)
        return self

    def repeats(self, source: str) -> int:
        """How often a row of `source` may be taken."""
        return self.max_repeats.get(source, 1) if isinstance(self.max_repeats, dict) else self.max_repeats

    def needs_answers(self) -> bool:
        """Rows without one are dropped."""
        return True

    def sources(self) -> dict[Loc, str]:
        """Those that have a weight."""
        return {("weights", name): name for name in self.weights}
