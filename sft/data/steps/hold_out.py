"""The step that no recipe names by itself: `data.validation` holds rows out, so that their loss can be watched.

It runs twice on the same rows: once for what is trained, once for what is held out. Both decide by what rows say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sft.data.read.record import Record, fingerprint, text_hash
from sft.data.steps.base import TableStep
from sft.data.steps.sql import connect
from sft.data.steps.tables import parquet, write_parquet, write_verdicts
from sft.utils.errors import UserError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

Part = Literal["training", "validation"]
HELD_OUT = "held_out"
OWN_SOURCE = "validation/"
"""What the rows of `data.validation.sources` say as their source: nothing that a recipe could call one."""


@dataclass(frozen=True)
class HoldOutSettings:
    """`size`: a share (under 1) or a number of rows; None: the rows of validation's own sources. `part`: what goes on.
    `limit`: tokens beyond which a row will be dropped (None: never)."""

    size: float | None
    part: Part
    limit: int | None


class HoldOut(TableStep):
    """Holds out rows, and keeps what says the very same from being trained.

    Which are held out follows from the seed and from what the rows say: each conversation draws a number, and the
    smallest are held out. Reasons: held_out, same_as_held_out; of the other part not_held_out, same_as_held_out.
    """

    config: HoldOutSettings
    only_judges = True
    reads_tokens = True

    @classmethod
    def settings(cls, config: HoldOutSettings) -> dict[str, Any]:
        """All of them."""
        return asdict(config)

    def sketch(self, batch: list[Record]) -> pa.Table:
        """What the row says, as a number; what that draws; whether it may be held out, and is in any case."""
        import pyarrow as pa

        kinds = {"content": pa.string(), "draw": pa.float64(), "tie": pa.int64(), "own": pa.bool_(), "fit": pa.bool_()}
        return pa.Table.from_pylist([self._sketch(record) for record in batch], schema=pa.schema(list(kinds.items())))

    def _sketch(self, record: Record) -> dict[str, Any]:
        content, limit = f"{text_hash(record.text):032x}", self.config.limit
        return {
            "content": content,
            "draw": self.context.uniform("hold_out", content),
            "tie": fingerprint(record) >> 65,
            "own": record.source == OWN_SOURCE,
            "fit": bool(record.trained) and (limit is None or (record.tokens or 0) <= limit),
        }

    def decide(self, sketches: Sequence[Path], verdicts: Path, scratch: Path) -> None:
        """Raises UserError when nothing could be held out, or nothing would be left to train on."""
        with connect(scratch) as db:
            db.execute(f"CREATE VIEW sketches AS SELECT * FROM {parquet(sketches)}")
            size = self.config.size
            if size is None:
                held, which = "SELECT DISTINCT content FROM sketches WHERE own", "own"
            else:
                some = "SELECT DISTINCT content, draw FROM sketches WHERE fit ORDER BY draw, content"
                held = f"SELECT content FROM ({some} LIMIT {_count(db, size)})"
                which = 'row_number() OVER (PARTITION BY content ORDER BY NOT fit, tie, "row") = 1'
            db.execute(
                "CREATE VIEW fates AS SELECT \"row\", CASE WHEN held.content IS NULL THEN 'not_held_out'"
                f" WHEN {which} THEN '{HELD_OUT}' ELSE 'same_as_held_out' END AS reason"
                f" FROM sketches LEFT JOIN ({held}) AS held USING (content)"
            )
            goes_on = "not_held_out" if self.config.part == "training" else HELD_OUT
            dropped = f"SELECT \"row\", reason, '' AS detail FROM fates WHERE reason <> '{goes_on}'"
            none = 'SELECT "row", 1 AS copies, NULL::VARCHAR AS facts FROM sketches WHERE false'
            write_parquet(db, dropped, scratch / "dropped.parquet")
            write_parquet(db, none, scratch / "kept.parquet")
            write_verdicts(db, [scratch / "dropped.parquet"], scratch / "kept.parquet", verdicts)


def _count(db: duckdb.DuckDBPyConnection, size: float) -> int:
    """How many conversations to hold out."""
    (found,) = db.execute("SELECT count(DISTINCT content) FROM sketches WHERE fit").fetchall()[0]
    if not found:
        return 0  # that no row is left, and why, is told once all steps have run
    count = int(size) if size >= 1 else max(1, round(size * found))
    if count >= found:
        raise UserError(
            f"data.validation.size {size:g} would hold out {count} of {found} different rows that can be trained on, "
            "and leave none: lower it, or leave data.validation out."
        )
    return count
