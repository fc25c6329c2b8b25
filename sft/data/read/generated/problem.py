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

    def mark(self, turn: int) -> str:
        """The mark of a round; like a move, the last one says so behind its mark. Empty if there is one round only."""
        if self.rounds == 1:
            return ""
        return f" [{turn}] last" if turn == self.rounds else f" [{turn}]"

    @property
    def canonical(self) -> str:
        """The calculations alone."""
        return f"{self.rounds}x {self.start} {' '.join(map(str, self.moves))}"

    def pose(self, opening: str, told: Sequence[str], question: str, so: Sequence[str] | None = None) -> Problem:
        """The problem that tells each move as `told` says (with its mark), and its solution.

        A line of the solution is the value so far, the mark of the round if there are several, the move as the
        question tells it, and the value it makes (after `so[i]`, default ` =`): what has to be looked up far away
        continues words just read, and all that goes on from one line to the next stands close by.
        """
        head = [opening, "Repeat in rounds up to", self.mark(self.rounds)] if self.rounds > 1 else [opening]
        lines, value = [], self.start
        for turn in range(1, self.rounds + 1):
            for index, move in enumerate(self.moves):
                result = compute(value, move.operator, move.operand)
                lines.append(f"{value}{self.mark(turn)}{told[index]}{so[index] if so else ' ='} {result}")
                value = result
        prompt = "\n".join([*head, *told, question])
        return Problem(self.canonical, prompt, "\n".join(lines), value, self.steps)
