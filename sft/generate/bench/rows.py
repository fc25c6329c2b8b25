"""What is found, one side on one workload at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

ENGINE, INNER, OWN, LLAMA, GRAPH = "engine", "engine, inner", "own-generate", "llama", "llama-graph"
"""The sides; INNER: the engine without the layers whose attention sees everything."""


@dataclass(frozen=True)
class Row:
    """A line of the table. None: not measured, or (with `full`) there was no memory for it.

    Attributes:
        what: the workload.
        seconds: of all of it.
        first_token: seconds until a request's first token, the mean.
        token: seconds between a request's tokens, the mean.
        growth: how many times as long a token takes at the end as at the beginning.
        memory: bytes at the peak, the model itself not counted.
        times: how many times as fast the engine is.
        bandwidth: the bytes that a step has to read, over what the memory can be read in the time.
        full: whether memory ran out.
        length: tokens before the one that a step makes; None where whole answers were made.
        rounds: seconds of each round.
    """

    what: str
    side: str
    requests: int
    seconds: float | None = None
    tokens_per_second: float | None = None
    first_token: float | None = None
    token: float | None = None
    growth: float | None = None
    memory: int | None = None
    times: float | None = None
    bandwidth: float | None = None
    full: bool = False
    length: int | None = None
    rounds: tuple[float, ...] = ()


def beside_engine(rows: Iterable[Row]) -> list[Row]:
    """The rows of one workload, each of another side with how many times as fast the engine is."""
    found = list(rows)
    own = next((row.tokens_per_second for row in found if row.side == ENGINE), None)
    return [
        replace(row, times=own / row.tokens_per_second)
        if own and row.tokens_per_second and row.side not in (ENGINE, INNER)
        else row
        for row in found
    ]
