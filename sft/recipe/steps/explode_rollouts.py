"""Settings of the step `explode_rollouts`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sft.recipe.problems import KeyProblem, nearest, raise_problems
from sft.recipe.steps.settings import Loc, StepSettings


class ExplodeRolloutsStep(StepSettings):
    """One row a rollout, from a row that holds several."""

    gives_answers = True

    column: str = Field(
        description="The carried column with the rollouts: a list of texts, of assistant messages, or of conversations."
    )
    key: str | None = Field(
        default=None, description="Where rollouts are mappings: the key that holds the text or the conversation."
    )
    flags: dict[str, str] = Field(
        default_factory=dict,
        description="Name -> carried column with a list of true/false aligned to the rollouts, "
        "{complete: is_reasoning_complete}; a column that begins with a dot is a key of the rollouts' own mappings.",
    )
    aligned: list[str] = Field(
        default_factory=list,
        description="Other carried columns with a list aligned to the rollouts; each row gets its own value.",
    )
    require: list[str] = Field(default_factory=list, description="Flags of which at least one must be true.")
    require_all: list[str] = Field(default_factory=list, description="Flags that must all be true.")
    missing_flag: Literal["keep", "drop"] = Field(
        default="drop",
        description="A rollout that is undecided because a flag is null or beyond the end of a shorter list of flags.",
    )
    max_rollouts: int | None = Field(
        default=None, gt=0, description="At most this many of each row, chosen by the seed."
    )

    @model_validator(mode="after")
    def _check(self) -> ExplodeRolloutsStep:
        problems = [
            KeyProblem((key, index), f"no flag {name!r} in `flags`{nearest(name, self.flags)}", name)
            for key in ("require", "require_all")
            for index, name in enumerate(getattr(self, key))
            if name not in self.flags
        ]
        own = f"{self.column!r} is the column of the rollouts themselves"
        problems += [KeyProblem(("flags", name), own, at) for name, at in self.flags.items() if at == self.column]
        problems += [KeyProblem(("aligned", i), own, at) for i, at in enumerate(self.aligned) if at == self.column]
        if problems:
            raise_problems("explode_rollouts", problems)
        return self

    @property
    def flag_columns(self) -> dict[str, str]:
        """The flags that are columns, by name."""
        return {name: column for name, column in self.flags.items() if not column.startswith(".")}

    @property
    def aligned_columns(self) -> list[str]:
        """All carried columns that are lists aligned to the rollouts, each once."""
        return list(dict.fromkeys([*self.flag_columns.values(), *self.aligned]))

    def columns(self) -> dict[Loc, str]:
        """The rollouts, their flags, and what else is aligned to them."""
        flags: dict[Loc, str] = {("flags", name): column for name, column in self.flag_columns.items()}
        return {("column",): self.column, **flags, **{("aligned", i): at for i, at in enumerate(self.aligned)}}
