"""A shard: up to a few thousand rows of a step's output in one parquet file, with the rows it dropped beside it.

<step>/kept-00000.parquet       rows that go on
<step>/dropped-00000.parquet    rows that end here, each with its reason
<step>/done-00000.json          the marker: written last, so a shard with one is whole
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sft.data.read.outcomes import Dropped, Kept, Outcome, Replaced
from sft.data.read.record import Record, dropped_schema, fingerprint, from_table, schema, to_table
from sft.utils.files import read_sealed, sha256_file, write_sealed
from sft.utils.hashes import folder_hashes

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS = 256  # rows that are in memory at once
GROUP_CHARACTERS = 8_000_000
EXAMPLES = 3  # of each reason
EXCERPT = 200
_MODULUS = 1 << 128


class Counts:
    """How many rows, tokens and characters passed, and the sum of their fingerprints."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.unmeasured = self.checksum = 0

    def add(self, record: Record) -> None:
        """Count a row. `unmeasured`: rows whose length in tokens isn't known yet."""
        self.rows += 1
        self.tokens += record.tokens or 0
        self.unmeasured += record.tokens is None
        self.checksum = (self.checksum + fingerprint(record)) % _MODULUS

    def described(self) -> dict[str, Any]:
        """As JSON."""
        counts = {"rows": self.rows, "tokens": self.tokens, "unmeasured": self.unmeasured}
        return {**counts, "checksum": f"{self.checksum:032x}"}


def sum_counts(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several shards together."""
    total: dict[str, Any] = {key: sum(part[key] for part in parts) for key in ("rows", "tokens", "unmeasured")}
    total["checksum"] = f"{sum(int(part['checksum'], 16) for part in parts) % _MODULUS:032x}"
    return total


class Groups:
    """Writes records to a parquet file in groups that fit into memory, under a temporary name until `finish`."""

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        self.path, self._schema = path, columns
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._writer: Any = None
        self._rows: list[tuple[Record, str | None, str | None]] = []
        self._characters = 0

    def add(self, record: Record, reason: str | None = None, detail: str | None = None) -> None:
        """Add a row; `reason` and `detail` where it is a dropped one."""
        self._rows.append((record, reason, detail))
        self._characters += _size(record)
        if len(self._rows) >= GROUP_ROWS or self._characters >= GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd", compression_level=1)
        if not self._rows:
            return
        table = to_table([record for record, _, _ in self._rows])
        if "reason" in self._schema.names:
            table = table.append_column("reason", pa.array([reason for _, reason, _ in self._rows], pa.string()))
            table = table.append_column("detail", pa.array([detail for _, _, detail in self._rows], pa.large_string()))
        self._writer.write_table(table)
        self._rows, self._characters = [], 0

    def finish(self) -> None:
        """Write what is left, bring it to disk, and give the file its name."""
        self._flush()
        self._writer.close()
        descriptor = os.open(self._temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(self._temporary, self.path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            self._writer.close()
        self._temporary.unlink(missing_ok=True)


def _size(record: Record) -> int:
    """About how many bytes the row takes."""
    size = len(record.text) + 12 * len(record.teacher_ids or ())
    return size + sum(len(str(value)) for value in record.carried.values())


class ShardWriter:
    """Takes the outcomes of a step for one shard, and writes what became of every row."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._kept = Groups(folder / f"kept-{number:05d}.parquet", schema())
        self._dropped = Groups(folder / f"dropped-{number:05d}.parquet", dropped_schema())
        self._counts = {name: Counts() for name in ("taken", "kept", "dropped", "replaced", "made")}
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, list[dict[str, str]]] = {}
        self._lengths: Counter[int] = Counter()
        self._sources: dict[str, Counter[str]] = {}
        self._pass_rates: Counter[float] = Counter()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._kept.abandon()
            self._dropped.abandon()

    @property
    def rows(self) -> int:
        """Rows that were taken so far."""
        return self._counts["taken"].rows

    def add(self, outcome: Outcome) -> None:
        """What became of one row of the input."""
        self._counts["taken"].add(outcome.record)
        if isinstance(outcome, Kept):
            self._keep(outcome.record)
        elif isinstance(outcome, Dropped):
            self._drop(outcome)
        else:
            self._replace(outcome)

    def _replace(self, outcome: Replaced) -> None:
        self._counts["replaced"].add(outcome.record)
        for record in outcome.kept:
            self._counts["made"].add(record)
            self._keep(record)
        for dropped in outcome.dropped:
            self._counts["made"].add(dropped.record)
            self._drop(dropped)

    def _keep(self, record: Record) -> None:
        self._counts["kept"].add(record)
        if record.tokens is not None:
            self._lengths[length_bin(record.tokens)] += 1
        self._sources.setdefault(record.source, Counter()).update(rows=1, tokens=record.tokens or 0)
        rate = pass_rate(record)
        if rate is not None:
            self._pass_rates[math.floor(10 * rate) / 10] += 1
        self._kept.add(record)

    def _drop(self, outcome: Dropped) -> None:
        self._counts["dropped"].add(outcome.record)
        self._reasons[outcome.reason] += 1
        examples = self._examples.setdefault(outcome.reason, [])
        if len(examples) < EXAMPLES:
            text = " ".join(outcome.record.text.split())
            examples.append({"id": outcome.record.id, "detail": outcome.detail[:EXCERPT], "text": text[:EXCERPT]})
        self._dropped.add(outcome.record, outcome.reason, outcome.detail)

    def finish(self, seconds: float) -> dict[str, Any]:
        """Make the shard whole; returns its marker."""
        self._kept.finish()
        self._dropped.finish()
        marker = {
            **{name: counts.described() for name, counts in self._counts.items()},
            "reasons": dict(sorted(self._reasons.items())),
            "examples": dict(sorted(self._examples.items())),
            "lengths": {str(edge): count for edge, count in sorted(self._lengths.items())},
            "sources": {name: dict(counts) for name, counts in sorted(self._sources.items())},
            "pass_rates": {str(edge): count for edge, count in sorted(self._pass_rates.items())},
            "files": {path.name: _content(path) for path in (self._kept.path, self._dropped.path)},
            "seconds": round(seconds, 3),
        }
        _check_balance(marker, self._kept.path)
        write_sealed(marker_path(self._folder, self._number), marker)
        return marker


def pass_rate(record: Record) -> float | None:
    """The share of the answers to the row's problem that are right, where a step found it out."""
    for step in ("select", "explode_rollouts"):
        rate: float | None = (record.facts.get(step) or {}).get("pass_rate")
        if rate is not None:
            return rate
    return None


def length_bin(tokens: int) -> int:
    """Lower edge of the bin of a length: powers of two, each cut in two halves."""
    if tokens < 2:
        return tokens
    edge = 1 << (tokens.bit_length() - 1)
    return edge + edge // 2 if tokens >= edge + edge // 2 else edge


def _content(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _check_balance(marker: dict[str, Any], path: Path) -> None:
    """Every row taken is in exactly one place: it goes on, ends, or became others; and nothing came from nowhere."""
    for key in ("rows", "checksum"):
        value = {
            name: int(marker[name][key], 16) if key == "checksum" else marker[name][key]
            for name in ("taken", "kept", "dropped", "replaced", "made")
        }
        out = value["kept"] + value["dropped"] + value["replaced"] - value["made"]
        if (value["taken"] - out) % _MODULUS:
            raise AssertionError(f"{path}: {key} of the rows taken and of what became of them differ: {value}")


def marker_path(folder: Path, number: int) -> Path:
    """Where the marker of a shard is."""
    return folder / f"done-{number:05d}.json"


def read_marker(folder: Path, number: int) -> dict[str, Any] | None:
    """The marker of a whole shard, else None."""
    return read_whole(marker_path(folder, number))


def read_whole(path: Path) -> dict[str, Any] | None:
    """The sealed mapping in `path`, or None unless all the `files` that it lists beside it are there as written."""
    told = read_sealed(path)
    if told is None:
        return None
    files = {name: file["sha256"] for name, file in told["files"].items()}
    return told if files.items() <= folder_hashes(path.parent, tuple(files)).items() else None


def read_records(path: Path) -> Iterator[list[Record]]:
    """The records of a shard's file in the groups that they were written in."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            yield from_table(file.read_row_group(group))
