"""What the processes of an evaluation take from each other's reach: the samples of one prompt, or a part of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sft.evaluate.sharing import NOBODY, Crew

UNITS = 4
"""How many units there are at least for each process, so that all are busy: prompts with many samples are split."""


@dataclass(frozen=True)
class Task:
    """One sample to make: `number` is its place among all samples of the suite."""

    number: int
    problem: int
    sample: int


def units_of(tasks: Sequence[Task], lengths: Sequence[int], processes: int) -> list[list[Task]]:
    """The tasks in units, those of the longest prompts first.

    A prompt's tasks stay together, since the engine runs it once for them all, unless that would leave processes idle.
    Args:
        tasks: ordered by problem.
        lengths: of the prompts, by problem.
    """
    by_problem: dict[int, list[Task]] = {}
    for task in tasks:
        by_problem.setdefault(task.problem, []).append(task)
    parts = 1 if processes == 1 else math.ceil(UNITS * processes / max(len(by_problem), 1))
    units = []
    for problem in sorted(by_problem, key=lambda problem: (-lengths[problem], problem)):
        found = by_problem[problem]
        size = math.ceil(len(found) / parts)
        units += [found[start : start + size] for start in range(0, len(found), size)]
    return units


class Share:
    """One suite's units, as this process takes them: never more than its part of what is left, so that all end at once.

    Args:
        crew: who takes them.
        name: the suite's.
        units: the same on all processes.
        recorded: the (problem, sample) pairs that are on the disk, of whichever process.
    """

    def __init__(
        self, crew: Crew, name: str, units: list[list[Task]], recorded: Callable[[], set[tuple[int, int]]]
    ) -> None:
        self.crew, self.name, self.units, self.recorded = crew, name, units, recorded
        self._next, self._left = 0, sum(map(len, units))
        self._making = 0
        self._open: dict[Task, int] = {}
        self._looks = 0

    def claim(self, room: int) -> list[Task]:
        """Tasks for about `room` free places; none where nothing is left, or others should have it."""
        self.crew.step()
        found: list[Task] = []
        while len(found) < room and self._is_due():
            unit, self._next = self._next, self._next + 1
            self._left -= len(self.units[unit])
            if self.crew.take(self._claim(unit, 0)):
                found += self._begin(unit, self.units[unit])
        return found or (self._take_over() if room and self._next == len(self.units) else [])

    def made(self) -> None:
        """A task that was claimed is generated."""
        self._making -= 1

    def record(self, task: Task, secure: Callable[[], None]) -> None:
        """A task is recorded; with the last one of its unit `secure` is called, then the unit counts as done."""
        unit = self._open.pop(task)
        if unit not in self._open.values():
            secure()
            self.crew.finish(self.name, unit)

    def is_done(self) -> bool:
        """Whether every unit is done, by whichever process."""
        return len(self.crew.finished(self.name)) == len(self.units)

    def _is_due(self) -> bool:
        living = 1 + len(self.crew.others) - len(self.crew.lost)
        return self._left > 0 and self._making < math.ceil((self._left + self._making) / living)

    def _begin(self, unit: int, tasks: list[Task]) -> list[Task]:
        self._making += len(tasks)
        self._open.update(dict.fromkeys(tasks, unit))
        return tasks

    def _take_over(self) -> list[Task]:
        """What is left of a unit that a process has died with."""
        if not self.crew.lost or self._looks == self.crew.looks:
            return []
        finished, self._looks = self.crew.finished(self.name), self.crew.looks
        for unit in set(range(len(self.units))) - finished:
            attempt = 0
            while self.crew.owner(self._claim(unit, attempt + 1)) is not None:
                attempt += 1
            if self.crew.owner(self._claim(unit, attempt)) not in {*self.crew.lost, NOBODY}:
                continue
            if self.crew.take(self._claim(unit, attempt + 1)):
                recorded = self.recorded()
                if tasks := [task for task in self.units[unit] if (task.problem, task.sample) not in recorded]:
                    return self._begin(unit, tasks)
                self.crew.finish(self.name, unit)
        return []

    def _claim(self, unit: int, attempt: int) -> str:
        return f"{self.name}.{unit}.{attempt}"
