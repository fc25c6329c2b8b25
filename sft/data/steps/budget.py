"""Filling budgets of rows and tokens: in order, and a row that doesn't fit makes way for later, smaller ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from sft.data.steps.tables import batches
from sft.utils.errors import UserError

if TYPE_CHECKING:
    import duckdb

BATCH_ROWS = 10_000


@dataclass
class Budget:
    """What may be taken of a group; it is used up while rows are taken.

    Attributes:
        rows, tokens: what is left, None where it isn't limited.
        name: of the group, for the detail of what is refused.
    """

    rows: int | None = None
    tokens: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        both = ((self.rows, "rows"), (self.tokens, "tokens"))
        limits = [f"{limit} {unit}" for limit, unit in both if limit is not None]
        self._limits = f"{self.name}: {' and '.join(limits)}" if self.name else " and ".join(limits)

    def refuses(self, tokens: int) -> tuple[str, str] | None:
        """Take a row of so many tokens and return None; or say which of `rows` and `tokens` it doesn't fit into, and
        the numbers."""
        if self.rows is not None and self.rows < 1:
            return "rows", f"{self._limits} are taken"
        if self.tokens is not None and (tokens > self.tokens or not self.tokens):
            return "tokens", f"{self._limits}; {self.tokens} tokens were left, and this row has {tokens}"
        if self.rows is not None:
            self.rows -= 1
        if self.tokens is not None:
            self.tokens -= tokens
        return None


def fill(
    db: duckdb.DuckDBPyConnection, query: str, budgets: Mapping[str, Budget], reasons: Mapping[str, str], target: Path
) -> None:
    """Take rows as long as they fit, and write those refused to the parquet file `target`: row, reason, detail.

    A row is skipped only if it is larger than what is left, and what is left only shrinks: in the end the budget is
    missed by less than the smallest row refused.

    Args:
        query: gives (row, name of its group, tokens or null), in the order in which rows may be taken.
        budgets: by group; groups without one are taken as they are.
        reasons: `rows` and `tokens` -> the reason noted for rows that these refuse.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())])
    with pq.ParquetWriter(target, schema) as writer:
        for batch in batches(db, query, target.with_suffix(".order.parquet"), BATCH_ROWS):
            refused = list(_refused(batch, budgets, reasons))
            if refused:
                writer.write_table(pa.table([list(column) for column in zip(*refused, strict=True)], schema=schema))


def _refused(
    batch: Sequence[tuple[int, str, int | None]], budgets: Mapping[str, Budget], reasons: Mapping[str, str]
) -> Iterator[tuple[int, str, str]]:
    for row, group, tokens in batch:
        budget = budgets.get(group)
        refusal = budget.refuses(tokens or 0) if budget is not None else None
        if refusal is not None:
            yield row, reasons[refusal[0]], refusal[1]


def exact_shares(weights: Sequence[float]) -> list[Fraction]:
    """The weights over their sum, as the decimal numbers that were written: 0.1 is a tenth."""
    fractions = [Fraction(str(weight)) for weight in weights]
    return [fraction / sum(fractions) for fraction in fractions]


def apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers nearest to `total * shares` that sum to `total` (largest remainders; the first of equals wins)."""
    parts = [int(total * share) for share in shares]
    remainders = [total * share - part for share, part in zip(shares, parts, strict=True)]
    for index in sorted(range(len(parts)), key=lambda index: -remainders[index])[: total - sum(parts)]:
        parts[index] += 1
    return parts


def largest_total(available: Mapping[str, int], shares: Mapping[str, Fraction]) -> int:
    """The largest total of which every group can give its share. Groups of share 0 don't count."""
    return min(int(available.get(name, 0) / share) for name, share in shares.items() if share)


def no_such(step: str, what: str, unknown: Sequence[str], known: Sequence[str | None]) -> UserError:
    """The error that a recipe names groups which no row belongs to."""
    names = ", ".join(sorted(name for name in known if name is not None)) or "none"
    return UserError(
        f"{step}: no row has the {what} {', '.join(map(repr, unknown))}; there are: {names}. Where there were any, "
        "steps before it have dropped them all: `sft prepare --explain FILE:LINE` tells why."
    )
