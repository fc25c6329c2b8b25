"""The step `select`: which rows, of all that could be trained on, are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.read.record import Record, fingerprint, text_hash
from sft.data.steps.base import TableStep
from sft.data.steps.select.clusters import word_slots
from sft.data.steps.select.selection import Selection
from sft.data.steps.sql import connect
from sft.recipe.steps.select import STUDENT_VIEWS, SelectStep
from sft.utils.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


class Select(TableStep):
    """Chooses rows by difficulty, by problem, by quota, by length and in all, each from what the one before left.

    Reasons: no_conversation (no length, where lengths are asked for), pass_rate, no_pass_rate, verdict,
    over_per_problem, quota, length_bucket, over_rows, over_tokens.
    Facts: pass_rate of the problem, cluster (its number), where the settings ask for them.
    """

    config: SelectStep
    only_judges = True
    version = 2
    reads_tokens = True

    def sketch(self, batch: list[Record]) -> pa.Table:
        """The row's groups, sizes and scores; with `diversity` the slots of its problem's words too.

        Problems are numbers of 63 bits: of ten million, two are the same with a probability of 5e-6.
        """
        import pyarrow as pa

        schema = pa.schema(
            [
                ("source", pa.string()),
                ("domain", pa.string()),
                ("problem", pa.int64()),
                ("tokens", pa.int64()),
                ("draw", pa.float64()),
                ("tie", pa.int64()),
                ("pass_rate", pa.float64()),
                ("verdict", pa.string()),
                ("teacher", pa.float64()),
                ("teacher_tokens", pa.float64()),
                *((name, pa.float64()) for name in self._views),
                ("problem_draw", pa.float64()),
                ("words", pa.list_(pa.uint16())),
            ]
        )
        return pa.Table.from_pylist([self._sketch(record) for record in batch], schema=schema)

    @property
    def _views(self) -> list[str]:
        """The student's views that are preferred."""
        return [name for name in STUDENT_VIEWS if name in self.config.prefer]

    def _sketch(self, record: Record) -> dict[str, Any]:
        score = record.facts.get("score") or {}
        # A row without a problem's name is a problem of its own.
        problem = record.problem_id or f"\0{record.place}\0{record.id}"
        sketch = {
            "source": record.source,
            "domain": record.domain,
            "problem": text_hash(f"{record.source}\0{problem}") >> 65,
            "tokens": record.tokens,
            "draw": self.context.draw("select", record),
            "tie": fingerprint(record) >> 65,
            "pass_rate": self._pass_rate(record),
            "verdict": (record.facts.get("verify") or {}).get("verdict"),
            "teacher": score.get("teacher_share"),
            "teacher_tokens": score.get("teacher_token_share"),
            **{name: score.get(name) for name in self._views},
        }
        if self.config.diversity is not None:
            sketch["problem_draw"] = self.context.uniform("select problem", record.source, problem)
            sketch["words"] = word_slots(record.problem if record.problem is not None else record.text)
        return sketch

    def _pass_rate(self, record: Record) -> float | None:
        settings = self.config.pass_rate
        if settings is None or settings.of == "verdicts":
            return None
        if settings.of == "rollouts":
            rate: float | None = (record.facts.get("explode_rollouts") or {}).get("pass_rate")
            return rate
        assert settings.column is not None
        return _rate(record.carried.get(settings.column), f"{record.place}: {settings.column}")

    def decide(self, sketches: Sequence[Path], verdicts: Path, scratch: Path) -> None:
        """Raises UserError where the rows lack what the settings ask for: see `Selection`."""
        with connect(scratch) as db:
            selection = Selection(db, self.config, self.context, scratch)
            selection.read(sketches)
            selection.run()
            selection.write(verdicts)


# What data sets write where a problem has no pass rate.
_NO_RATE = {"", "n/a", "na", "nan", "none", "null"}


def _rate(value: Any, where: str) -> float | None:
    if value is None or (isinstance(value, str) and value.strip().lower() in _NO_RATE) or value != value:
        return None
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = -1.0
    if isinstance(value, bool) or not 0 <= rate <= 1:
        raise UserError(f"{where} is {str(value)[:40]!r}; a pass rate is a number from 0 to 1, or 'n/a'.")
    return rate
