"""The step `mix`: sources in given proportions of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from sft.data.read.record import Record, fingerprint
from sft.data.steps.base import TableStep
from sft.data.steps.budget import Budget, exact_shares, fill, largest_total, no_such
from sft.data.steps.sql import connect
from sft.data.steps.tables import parquet, write_parquet, write_verdicts
from sft.recipe.steps.mix import MixStep
from sft.utils.errors import UserError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


class Mix(TableStep):
    """Takes of each source its share of the tokens: whole epochs of all rows, then a part drawn by the seed.

    Each source ends below its share by less than its smallest row. Reasons: over_budget, no_conversation (a problem
    without an answer has no length).
    """

    config: MixStep
    only_judges = True
    version = 2
    reads_tokens = True

    def sketch(self, batch: list[Record]) -> pa.Table:
        """The row's source, its tokens, and the number that it draws (`tie`: should two draw the same)."""
        import pyarrow as pa

        schema = pa.schema(
            [
                ("source", pa.string()),
                ("tokens", pa.int64()),
                ("draw", pa.float64()),
                ("tie", pa.int64()),
            ]
        )
        rows = [
            {
                "source": record.source,
                "tokens": record.tokens,
                "draw": self.context.draw("mix", record),
                "tie": fingerprint(record) >> 65,
            }
            for record in batch
        ]
        return pa.Table.from_pylist(rows, schema=schema)

    def decide(self, sketches: Sequence[Path], verdicts: Path, scratch: Path) -> None:
        """Raises UserError when the sources aren't those that the weights name, or can't give what is asked."""
        with connect(scratch) as db:
            db.execute(f"CREATE VIEW sketches AS SELECT * FROM {parquet(sketches)}")
            sizes = db.execute("SELECT source, coalesce(sum(tokens), 0)::BIGINT FROM sketches GROUP BY 1").fetchall()
            budgets = token_budgets(self.config, dict(sizes)) if sizes else {}
            _write(db, budgets, dict(sizes), verdicts, scratch)


def token_budgets(config: MixStep, available: dict[str, int]) -> dict[str, int]:
    """Tokens that each source gets of `available` ones (by source).

    Raises UserError, with the sources there are, when one isn't named or one named isn't there; and when `tokens` is
    more than the repeats allow.
    """
    _check_names(config, available)
    shares = dict(zip(config.weights, exact_shares(list(config.weights.values())), strict=True))
    most = {name: tokens * config.repeats(name) for name, tokens in available.items()}
    empty = sorted(name for name, share in shares.items() if share and not most.get(name))
    if empty:
        raise UserError(f"mix: the rows of the source {empty[0]!r} have no answers, and so no tokens to take.")
    largest = largest_total(most, shares)
    if config.tokens is not None and config.tokens > largest:
        raise UserError(_too_many(config.tokens, largest, most, available, shares))
    total = config.tokens if config.tokens is not None else largest
    return {name: int(total * share) for name, share in shares.items()}


def _check_names(config: MixStep, available: dict[str, int]) -> None:
    unnamed = sorted(set(available) - set(config.weights))
    if unnamed:
        names = ", ".join(sorted(available))
        raise UserError(
            f"mix: no weight for the source {', '.join(map(repr, unnamed))}; the sources are: {names}. "
            "Give every source a weight (0 drops it)."
        )
    missing = sorted(name for name, weight in config.weights.items() if weight and name not in available)
    if missing:
        raise no_such("mix", "source", missing, list(available))


def _too_many(
    tokens: int, largest: int, most: dict[str, int], available: dict[str, int], shares: dict[str, Fraction]
) -> str:
    scarcest = min((name for name, share in shares.items() if share), key=lambda name: most[name] / shares[name])
    return (
        f"mix: {tokens} tokens need {int(tokens * shares[scarcest])} of the source {scarcest!r}, which has "
        f"{available[scarcest]}, and max_repeats allows {most[scarcest]}; set tokens to {largest} or less, "
        "raise max_repeats, or lower its weight."
    )


def _write(
    db: duckdb.DuckDBPyConnection, budgets: dict[str, int], available: dict[str, int], verdicts: Path, scratch: Path
) -> None:
    import pyarrow as pa

    epochs = {name: budgets[name] // max(tokens, 1) for name, tokens in available.items()}
    parts = {name: Budget(tokens=budgets[name] - epochs[name] * available[name]) for name in available}
    asked = pa.table(
        {
            "source": pa.array(list(available), pa.string()),
            "epochs": pa.array([epochs[name] for name in available], pa.int32()),
            "said": pa.array(
                [f"{name}: {budgets[name]} of {available[name]} tokens" for name in available], pa.string()
            ),
        }
    )
    db.register("asked", asked)
    path = scratch / "refused.parquet"
    query = 'SELECT "row", source, tokens FROM sketches WHERE tokens IS NOT NULL ORDER BY source, draw, tie'
    fill(db, query, parts, {"tokens": "over_budget"}, path)
    db.execute(
        'CREATE VIEW mixed AS SELECT "row", tokens, said, epochs + (refused.reason IS NULL)::INTEGER AS copies'
        f' FROM sketches JOIN asked USING (source) LEFT JOIN {parquet([path])} AS refused USING ("row")'
    )
    detail = "said || printf(' are taken; this row has %d', tokens)"
    dropped = (
        "SELECT \"row\", if(tokens IS NULL, 'no_conversation', 'over_budget') AS reason,"
        f" if(tokens IS NULL, 'a problem without an answer has no length', {detail}) AS detail"
        " FROM mixed WHERE tokens IS NULL OR copies = 0"
    )
    repeated = 'SELECT "row", copies, NULL::VARCHAR AS facts FROM mixed WHERE tokens IS NOT NULL AND copies > 1'
    write_parquet(db, dropped, scratch / "dropped.parquet")
    write_parquet(db, repeated, scratch / "repeated.parquet")
    write_verdicts(db, [scratch / "dropped.parquet"], scratch / "repeated.parquet", verdicts)
