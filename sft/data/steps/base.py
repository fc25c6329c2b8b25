"""What a step is. Two kinds: one that looks at each row by itself, and one that must see all rows to decide on any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sft.data.read.outcomes import Outcome
from sft.data.read.record import Record

if TYPE_CHECKING:
    import pyarrow as pa

    from sft.data.steps.context import Context


class Step:
    """What both kinds have. Made once in each process that works on the step.

    Class attributes:
        version: raised whenever the same input would give other rows; part of the key of what the step made.
        uses_tokenizer: the result depends on the tokenizer (it reads `context.tokenizer`).
        reads_tokens: it reads `tokens` or `trained`: conversations are tokenised before it, if they aren't yet.
        changes_text: it makes conversations, or changes them: their tokens aren't known after it.
        only_judges: it lets rows go on or not and notes facts, and changes nothing else: texts need no new file.
    """

    version: ClassVar[int] = 1
    uses_tokenizer: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False
    changes_text: ClassVar[bool] = False
    only_judges: ClassVar[bool] = False

    def __init__(self, config: Any, context: Context) -> None:
        self.config = config
        self.context = context

    @classmethod
    def identity(cls, config: Any) -> dict[str, Any]:
        """JSON that changes with whatever else decides the result: content hashes of files the settings name.

        Called once, before anything runs: the place to raise UserError for what can't be found.
        """
        return {}

    @classmethod
    def settings(cls, config: Any) -> dict[str, Any]:
        """The settings that decide the result, as JSON: not those that say how fast it is reached."""
        settings: dict[str, Any] = config.model_dump(mode="json")
        return settings

    @classmethod
    def parallel(cls, config: Any) -> bool:
        """Whether several processes may work on it at once. Not where one process fills the machine by itself."""
        return True

    @classmethod
    def carried(cls, config: Any) -> set[str]:
        """Columns of the source that the step reads from `record.carried`: the source must carry them."""
        return set(config.columns().values())

    def close(self) -> None:
        """Give back what the step holds (processes, connections)."""


class RowStep(Step):
    """A step that decides on each row by itself."""

    def ahead(self, batches: Iterable[list[Record]]) -> None:
        """Begin what may take long. Of a step that isn't `parallel`, called once with all rows before the first."""

    def __call__(self, batch: list[Record]) -> Iterable[Outcome]:
        """One outcome for each record, in their order. The step may change the records in place."""
        raise NotImplementedError


class TableStep(Step):
    """A step that decides when it has seen all rows, by a small sketch of each.

    The sketches may be larger than memory: `decide` reads them through DuckDB (`sft.data.steps.sql`), which spills
    to disk. What it decides must not depend on the order of the rows, nor on how they are spread over shards.
    """

    def sketch(self, batch: list[Record]) -> pa.Table:
        """What `decide` has to know of each record, one row each in their order."""
        raise NotImplementedError

    def decide(self, sketches: Sequence[Path], verdicts: Path, scratch: Path) -> None:
        """Write `verdicts`, a parquet file of `verdict_schema()`, sorted by `row`.

        `sketches` are parquet files of what `sketch` returned, with a first column `row` (int64, number of the row in
        the whole table). `scratch` is an empty folder for whatever doesn't fit into memory.
        """
        raise NotImplementedError


def verdict_schema() -> pa.Schema:
    """What a TableStep says of a row; rows that it doesn't mention are kept as they are.

    row: its number. copies: how often it goes on, 0 = dropped. reason, detail: of a dropped row (else null).
    facts: JSON mapping that is noted under the step's name in the record's facts, or null.
    """
    import pyarrow as pa

    return pa.schema(
        [
            ("row", pa.int64()),
            ("copies", pa.int32()),
            ("reason", pa.string()),
            ("detail", pa.string()),
            ("facts", pa.string()),
        ]
    )
