"""The step `dedup`: of copies and near-copies, within and across sources, the preferred one stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from sft.data.read.record import Record, text_hash
from sft.data.steps.base import TableStep
from sft.data.steps.context import Context
from sft.data.steps.dedup import minhash
from sft.data.steps.dedup.decision import decide
from sft.data.steps.dedup.same_problem import formulas
from sft.data.text.normalize import as_spelled
from sft.data.text.question import core
from sft.data.text.spelling import plain_words
from sft.recipe.steps.dedup import DedupStep

_PROBLEM_CHARACTERS = 5
_TEXT_WORDS = 5


class Dedup(TableStep):
    """Drops copies (reason: duplicate) and near-copies (near_duplicate).

    Facts of a dropped row: kept (`source id (place)` of what stays in its stead), similarity. Of a row that stays for
    others: copies, how many problems (or rows) it stands for beside its own. Rows without a problem, or whose text has
    neither words nor signs, are not compared by it and stay.
    """

    version = 3
    config: DedupStep
    only_judges = True

    def __init__(self, config: DedupStep, context: Context) -> None:
        super().__init__(config, context)
        self.bands = minhash.bands_for(config.threshold)
        self.ranks = {source: rank for rank, source in enumerate(config.prefer)}

    @classmethod
    def identity(cls, config: DedupStep) -> dict[str, Any]:
        """The version of the signatures, on which it depends which near-copies are found."""
        import rensa

        return {"minhash": int(rensa.RMinHash.ALGORITHM_VERSION)} if config.method == "minhash" else {}

    def sketch(self, batch: list[Record]) -> pa.Table:
        """Columns as in `sketch_schema`; of rows with one text only one in the batch carries its shingles."""
        texts = [self._text(record) for record in batch]
        contents = [text_hash(text.content) if text.content else None for text in texts]
        forms = [text_hash(text.form) >> 64 for text in texts]
        carriers: dict[int, int] = {}
        for place in sorted(range(len(batch)), key=forms.__getitem__):
            if (content := contents[place]) is not None and self.config.method == "minhash":
                carriers.setdefault(content, place)
        near = dict(zip(carriers.values(), self._near([texts[place] for place in carriers.values()]), strict=True))
        rows = []
        for place, (record, content) in enumerate(zip(batch, contents, strict=True)):
            row = {
                "unit": _bytes(text_hash(self._unit(record))),
                "name": f"{record.source} {record.id} ({record.place})",
                "rank": self.ranks.get(record.source, len(self.ranks)),
                "length": len(record.text) * (-1 if self.config.then == "longest" else 1),
                "content": None if content is None else _bytes(content),
                "form": forms[place],
            }
            rows.append({**row, **near.get(place, {})})
        return pa.Table.from_pylist(rows, schema=sketch_schema())

    def decide(self, sketches: Sequence[Path], verdicts: Path, scratch: Path) -> None:
        """As TableStep says; the work is in `sft.data.steps.dedup.decision`."""
        threshold = self.config.threshold if self.config.method == "minhash" else None
        decide(sketches, verdicts, scratch, threshold)

    def _text(self, record: Record) -> _Text:
        spelled = as_spelled(core(record.problem or "") if self.config.by == "problem" else record.text)
        tokens = plain_words(spelled)
        return _Text(tokens, " ".join(tokens), " ".join(spelled))

    def _unit(self, record: Record) -> str:
        """What stays or goes together."""
        if self.config.by == "problem" and record.problem is not None and record.problem_id:
            return f"{record.source}\0{record.problem_id}"
        return f"{record.source}\0{record.place}\0{record.id}"

    def _near(self, texts: list[_Text]) -> list[dict[str, Any]]:
        """What is needed to find and confirm near-copies of each text."""
        whole = self.config.by == "text"
        wording = not whole and self.config.differences == "wording"
        units = [minhash.word_hashes(text.tokens) if whole else minhash.characters(text.content) for text in texts]
        sets = minhash.shingles_of(units, _TEXT_WORDS if whole else _PROBLEM_CHARACTERS)
        # Problems with other formulas need not meet at all: of one template there may be very many.
        salts = [text_hash(" ".join(sorted(formulas(text.tokens)))) >> 64 if wording else 0 for text in texts]
        keys = minhash.band_keys(sets, self.bands, salts)
        return [
            {"bands": key, "shingles": minhash.kept_shingles(item), "text": text.form if wording else None}
            for key, item, text in zip(keys, sets, texts, strict=True)
        ]


class _Text(NamedTuple):
    """What is compared of a row: tokens in one spelling, as list and as text, and as spelled, with sentences' ends."""

    tokens: list[str]
    content: str
    form: str


def sketch_schema() -> pa.Schema:
    """What `decide` has to know of a row.

    unit: hash of what stays or goes together. name: for messages. rank: of the source, 0 = preferred. length: smaller
    = preferred. content: hash of the text without layout, null for rows that are not compared. form: of rows with one
    content the one with the smallest form carries the rest, wherever it stands. bands, shingles: keys and set as in
    `minhash`; text: tokens of problems that may differ in wording only. These three are null in rows whose text another
    row of the batch carries.
    """
    return pa.schema(
        [
            ("unit", pa.binary(16)),
            ("name", pa.string()),
            ("rank", pa.int32()),
            ("length", pa.int64()),
            ("content", pa.binary(16)),
            ("form", pa.uint64()),
            ("bands", pa.list_(pa.uint64())),
            ("shingles", pa.list_(pa.uint32())),
            ("text", pa.large_string()),
        ]
    )


def _bytes(value: int) -> bytes:
    return value.to_bytes(16, "big")
