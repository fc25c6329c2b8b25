"""Rows that can't be used at all: how many there are, when they stop a run, and where they can be looked at.

<pass>/bad-rows.jsonl     the first of them, a line each: place, step, reason, detail, and the row as it was found
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sft.data.read.records import BAD
from sft.data.steps import TOKENIZE
from sft.utils.errors import UserError
from sft.utils.files import atomic_open

BAD_ROWS = "bad-rows.jsonl"
MOST_ROWS = 1000
MOST_CHARACTERS = 20_000
"""Of one row, which may be of any size."""


def bad_rows(step: str, reasons: Mapping[str, int]) -> dict[str, int]:
    """Of the rows that ended at a step, those that couldn't be used at all, by reason."""
    if step == TOKENIZE:
        return dict(reasons)
    return {reason[len(BAD) :]: count for reason, count in reasons.items() if reason.startswith(BAD)}


def refuse_bad_rows(name: str, bad: Mapping[str, int], rows: int, limit: float, look: str) -> None:
    """Raise UserError where more than `limit` of the rows are bad; `look`: what is seen of them, and where."""
    if sum(bad.values()) > limit * rows:
        counted = ", ".join(f"{reason}: {count}" for reason, count in bad.items())
        raise UserError(
            f"{name}: {sum(bad.values())} of {rows} rows are bad ({counted}), more than data.max_bad_fraction "
            f"{limit:g} allows. {look}, then mend the data or raise the limit."
        )


def first_bad(step: str, bad: Mapping[str, int], examples: Mapping[str, list[dict[str, str]]]) -> str:
    """Of the most frequent reason the first row, and what is wrong with it."""
    if not bad:
        return ""
    reason = max(bad, key=lambda name: bad[name])
    row = examples[reason if step == TOKENIZE else f"{BAD}{reason}"][0]
    return f"{row['id']}: {row['detail']}; "


def write_bad_rows(folder: Path, steps: Mapping[str, str]) -> None:
    """Write the pass's bad rows, where it has some, as JSON Lines that anybody can open. `steps`: name by title."""
    rows = islice(_found(folder, steps), MOST_ROWS)
    first = next(rows, None)
    if first is None:
        return
    with atomic_open(folder / BAD_ROWS, "wb") as handle:
        for row in (first, *rows):
            # Half of a surrogate pair becomes JSON's escape.
            handle.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def where_bad(folders: Sequence[Path], count: int) -> str:
    """What is said of where bad rows can be looked at."""
    found = ", ".join(str(folder / BAD_ROWS) for folder in folders if (folder / BAD_ROWS).is_file())
    return f"the first {MOST_ROWS:,} are in {found}" if count > MOST_ROWS else f"see {found}"


def _found(folder: Path, steps: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for path in sorted(folder.glob("aside-*.parquet")):
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                why = file.read_row_group(group, columns=["step", "reason"]).to_pylist()
                bad = [place for place, row in enumerate(why) if bad_rows(steps[row["step"]], {row["reason"]: 1})]
                if bad:
                    yield from map(_told, file.read_row_group(group).take(bad).to_pylist())


def _told(row: dict[str, Any]) -> dict[str, Any]:
    told = {key: row[key] for key in ("place", "id", "step")}
    told |= {"reason": row["reason"].removeprefix(BAD), "detail": row["detail"]}
    carried = json.loads(row["carried"])
    found = carried["raw"] if "raw" in carried else {key: row[key] for key in ("messages", "tools") if row[key]}
    text = json.dumps(found, ensure_ascii=False)
    if len(text) <= MOST_CHARACTERS:
        return {**told, "row": found}
    return {**told, "row": f"{text[:MOST_CHARACTERS]} ... {len(text) - MOST_CHARACTERS:,} characters more"}
