"""What the settings of a step say of the rows that come to it, so that a recipe is checked before there are any."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from sft.recipe.problems import Section

Loc = tuple[str | int, ...]


class DataSet(NamedTuple):
    """A set of rows beside the recipe's own: a Hub id or local files, as a source names them."""

    path: str
    split: str
    config: str | None


class StepSettings(Section):
    """A step's settings. What its methods return goes by the key, counted from the settings, that asks for it.

    Class attributes:
        gives_answers: problems come out with answers.
        not_behind: steps that must not come before.
        names_all: the settings must speak of every source that the step gets.
    """

    gives_answers: ClassVar[bool] = False
    not_behind: ClassVar[tuple[str, ...]] = ()
    names_all: ClassVar[bool] = False

    def needs_answers(self) -> bool:
        """Whether a row without an answer would be dropped, or chosen for no reason."""
        return False

    def columns(self) -> dict[Loc, str]:
        """Columns that sources must carry."""
        return {}

    def roles(self) -> dict[Loc, str]:
        """Of `answer` and `domain` those that sources must say in `columns`, since rows without them are dropped."""
        return {}

    def sources(self) -> dict[Loc, str]:
        """Names of sources that the settings speak of."""
        return {}

    def behind(self) -> dict[Loc, tuple[str, ...]]:
        """Steps, or what steps note, of which one must come before."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What the step notes of rows only where it is asked to: `step.key`, which `behind` may name."""
        return ()

    def places(self) -> dict[Loc, DataSet | str]:
        """Other sets of rows that are read, and folders or Hub ids of models and tokenizers that are loaded."""
        return {}
