"""One generated problem, and the chain of calculations that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft.data.read.generated.numbers import compute


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution and its answer.

    `canonical` is the problem without its names and wording: two problems with the same calculations have the same one.
    `steps` is how many calculations lead to the answer.
    """

    canonical: str
    prompt: str
    solution: str
    answer: int
    steps: int


@dataclass(frozen=True)
class Move:
    """One calculation on the value before it, e.g. `+ 4`."""

    operator: str
    operand: int

    def __str__(self) -> str:
        return f"{self.operator} {self.operand}"


@dataclass(frozen=True)
class Chain:
    """A first value and the moves made from it, all of them once or, in a long problem, `rounds` times over."""

    start: int
    moves: tuple[Move, ...]
    rounds: int = 1

    @property
    def steps(self) -> int:
        """How many calculations the chain takes."""
        return len(self.moves) * self.rounds

    def tell(self, moves: Sequence[str]) -> list[str]:
        """The moves as lines of a question, each behind its mark; the last one says that it is the last.

        It says so right behind its mark, so that knowing when to stop is the same look-up as knowing what to do.
        """
        *others, last = moves
        return [f" ({number}) {move}" for number, move in enumerate([*others, f"last {last}"], start=1)]

    @property
    def canonical(self) -> str:
        """The calculations alone."""
        return f"{self.rounds}x {self.start} {' '.join(map(str, self.moves))}"

    def pose(self, opening: str, told: Sequence[str], question: str, so: Sequence[str] | None = None) -> Problem:
        """The problem that tells each move as `told` says (with its mark), and its solution.

        A line of the solution is the value so far, the move as the question tells it, and the value it makes (after
        `so[i]`, default ` =`): what has to be looked up far away continues words just read, and all that goes on from
        one line to the next stands close by.

        Rounds are counted down, from the number in the question: the mark on a round's first line says how many are
        left, this one included. What a round needs is then always the last mark that there was, be it the question's or
        the solution's. (On every line, marks would be read from the line before, which teaches nothing about the
        question's; counted up, its number would be needed once only, at the end.)
        """
        head = [opening, "Repeat in rounds up to", f" [{self.rounds}] last"] if self.rounds > 1 else [opening]
        lines, value = [], self.start
        for left in range(self.rounds, 0, -1):
            for index, move in enumerate(self.moves):
                result = compute(value, move.operator, move.operand)
                mark = f" [{left}]" if self.rounds > 1 and index == 0 else ""
                lines.append(f"{value}{mark}{told[index]}{so[index] if so else ' ='} {result}")
                value = result
        prompt = "\n".join([*head, *told, question])
        return Problem(self.canonical, prompt, "\n".join(lines), value, self.steps)
