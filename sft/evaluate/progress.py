"""How far an evaluation is, on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft.utils.progress import ProgressLine

if TYPE_CHECKING:
    from sft.recipe.schema import SuiteSection


class SuiteLines:
    """Call it with (suite, samples done, samples in all, right ones so far)."""

    def __init__(self, point: str, suites: Sequence[SuiteSection], processes: int = 1) -> None:
        self._lines = {
            suite.name: ProgressLine(f"{point}/{suite.name}", "answers", together=suite.batch_size * processes)
            for suite in suites
        }

    def __call__(self, suite: str, done: int, total: int, right: int) -> None:
        """Show the state if it is time to, and always the end."""
        self._lines[suite](done, total, [f"{right / done:.1%} right"] if done else [])
