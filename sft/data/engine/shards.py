"""One shard of a pass: its rows in one file, those that ended beside it, and an account of every step.

<pass>/kept-00000.parquet         rows that go on (of the last pass: documents-00000.arrow, see pack/)
<pass>/aside-00000.parquet        rows that ended here, each with its step and reason; and those that were cut
<pass>/tokens-00000-0.arrow       ids and masks of the conversations tokenised here (see pack/tokens.py)
<pass>/done-00000.json            the marker: written last, so a shard with one is whole
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sft.data.read.message import spelled
from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record, aside_schema, fingerprint, from_table, renewed, schema, to_table
from sft.data.read.row import characters_in, shortened
from sft.utils.files import PartFile, read_sealed, sha256_file, write_sealed
from sft.utils.hashes import folder_hashes

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS = 256  # rows that are in memory at once
GROUP_CHARACTERS = 8_000_000
EXAMPLES = 3  # of each reason
EXCERPT = 200
CUT = "cut at max_length"
COUNTED = ("taken", "kept", "dropped", "replaced", "made")
_MODULUS = 1 << 128
_ALIKE = ("source", "domain", "step", "reason", "messages.list.element.role")


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


def sum_counts(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several shards together."""
    parts = list(parts)
    total: dict[str, Any] = {key: sum(part[key] for part in parts) for key in ("rows", "tokens", "unmeasured")}
    total["checksum"] = f"{sum(int(part['checksum'], 16) for part in parts) % _MODULUS:032x}"
    return total


class Account:
    """What became of the rows that one step took from one shard."""

    def __init__(self, title: str, aside: Groups) -> None:
        self.title, self._aside = title, aside
        self.counts = {name: Counts() for name in COUNTED}
        self.seconds = 0.0
        self.cut = 0
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, list[dict[str, str]]] = {}
        self._lengths: Counter[int] = Counter()
        self._sources: dict[str, Counter[str]] = {}
        self._pass_rates: Counter[float] = Counter()

    def add(self, outcome: Outcome) -> list[Record]:
        """Note what became of one row; the rows that go on."""
        self.counts["taken"].add(outcome.record)
        if isinstance(outcome, Kept):
            if outcome.cut is not None:
                self.cut += 1
                self._aside.add(outcome.record, self.title, CUT, outcome.cut)
            return [self._keep(outcome.record)]
        if isinstance(outcome, Dropped):
            self._drop(outcome)
            return []
        self.counts["replaced"].add(outcome.record)
        for record in (*outcome.kept, *(dropped.record for dropped in outcome.dropped)):
            self.counts["made"].add(record)
        for dropped in outcome.dropped:
            self._drop(dropped)
        return [self._keep(record) for record in outcome.kept]

    def _keep(self, record: Record) -> Record:
        self.counts["kept"].add(record)
        if record.tokens is not None:
            self._lengths[length_bin(record.tokens)] += 1
        source = self._sources.setdefault(record.source, Counter())
        source["rows"] += 1
        source["tokens"] += record.tokens or 0
        rate = pass_rate(record)
        if rate is not None:
            self._pass_rates[math.floor(10 * rate) / 10] += 1
        return record

    def _drop(self, outcome: Dropped) -> None:
        record, detail = outcome.record, _writable(outcome.detail)
        self.counts["dropped"].add(record)
        self._reasons[outcome.reason] += 1
        examples = self._examples.setdefault(outcome.reason, [])
        if len(examples) < EXAMPLES:
            text = _writable(" ".join(_beginning(record).split())[:EXCERPT])
            examples.append({"id": record.id, "detail": detail[:EXCERPT], "text": text})
        self._aside.add(record, self.title, outcome.reason, detail)

    def described(self) -> dict[str, Any]:
        """As JSON. Raises AssertionError unless every row taken is in exactly one place, and none from nowhere."""
        told = {name: counts.described() for name, counts in self.counts.items()}
        for key in ("rows", "checksum"):
            value = {name: getattr(counts, key) for name, counts in self.counts.items()}
            out = value["kept"] + value["dropped"] + value["replaced"] - value["made"]
            if (value["taken"] - out) % _MODULUS:
                raise AssertionError(f"{self.title}: {key} of rows taken and of what became of them differ: {told}")
        return {
            **told,
            "reasons": dict(sorted(self._reasons.items())),
            "examples": dict(sorted(self._examples.items())),
            "lengths": {str(edge): count for edge, count in sorted(self._lengths.items())},
            "sources": {name: dict(counts) for name, counts in sorted(self._sources.items())},
            "pass_rates": {str(edge): count for edge, count in sorted(self._pass_rates.items())},
            "cut": self.cut,
            "seconds": round(self.seconds, 3),
        }


def _beginning(record: Record) -> str:
    """What the row says at its beginning; of one that couldn't be read, what was found there. It may be of any size."""
    most = 4 * EXCERPT  # some of it may be spaces
    said = "\n".join(map(spelled, shortened(record.messages, most))) if record.messages else record.problem or ""
    return (said or str(shortened(record.carried.get("raw", ""), most)))[:most]


def _writable(text: str) -> str:
    """`text`, where it quotes half a surrogate pair as an escape: no file can hold one."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The accounts of one step's shards as one."""
    summed: dict[str, Counter[str]] = {key: Counter() for key in ("reasons", "lengths", "pass_rates")}
    sources: dict[str, Counter[str]] = {}
    examples: dict[str, list[dict[str, str]]] = {}
    for part in parts:
        for key, counter in summed.items():
            counter.update(part[key])
        for name, counts in part["sources"].items():
            sources.setdefault(name, Counter()).update(counts)
        for reason, found in part["examples"].items():
            examples.setdefault(reason, []).extend(found)
    return {
        **{name: sum_counts(part[name] for part in parts) for name in COUNTED},
        "reasons": dict(sorted(summed["reasons"].items())),
        "examples": {reason: found[:EXAMPLES] for reason, found in sorted(examples.items())},
        "lengths": dict(sorted(summed["lengths"].items(), key=lambda item: int(item[0]))),
        "sources": {name: dict(counts) for name, counts in sorted(sources.items())},
        "pass_rates": dict(sorted(summed["pass_rates"].items(), key=lambda item: float(item[0]))),
        "cut": sum(part["cut"] for part in parts),
        "seconds": round(sum(part["seconds"] for part in parts), 3),
    }


class Groups(PartFile):
    """Writes records to a parquet file in groups that fit into memory, under a temporary name until `finish`."""

    def __init__(self, path: Path, columns: pa.Schema) -> None:
        super().__init__(path)
        self._schema = columns
        self._rows: list[tuple[Record, tuple[str, ...]]] = []
        self._characters = 0

    def add(self, record: Record, *why: str) -> None:
        """Add a row; of one put aside also its step, reason and detail."""
        self._rows.append((record, why))
        self._characters += size_of(record)
        if len(self._rows) >= GROUP_ROWS or self._characters >= GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            # Dictionaries and statistics of texts that are all different would be copies of them.
            self._writer = pq.ParquetWriter(
                self.temporary,
                self._schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=list(_ALIKE),
                write_statistics=False,
            )
        if not self._rows:
            return
        own = self._schema.names.index("step") if "step" in self._schema.names else len(self._schema)
        table = to_table([record for record, _ in self._rows], pa.schema(list(self._schema)[:own]))
        for place, name in enumerate(self._schema.names[len(table.column_names) :]):
            values = pa.array([why[place] for _, why in self._rows], self._schema.field(name).type)
            table = table.append_column(name, values)
        self._writer.write_table(table)
        self._rows, self._characters = [], 0


def size_of(record: Record) -> int:
    """About how many bytes the row takes."""
    said: Any = record.messages or record.problem
    teacher = 12 * len(record.teacher_ids or ())
    teacher += 6 * record.teacher_top.top.ids.size if record.teacher_top is not None else 0
    return characters_in([said, record.tools, record.carried]) + teacher


class ShardWriter:
    """Takes what comes out of a pass for one shard, and the accounts of its steps.

    `target` writes the rows that are left: anything with `path`, `add(record)`, `finish()` and `abandon()`.
    """

    def __init__(self, folder: Path, number: int, titles: list[str], target: Any = None) -> None:
        self._folder, self._number = folder, number
        self._started = time.monotonic()
        aside = Groups(folder / f"aside-{number:05d}.parquet", aside_schema())
        self._target = target or Groups(kept_path(folder, number), schema())
        self.files: list[Any] = [self._target, aside]
        self.accounts = [Account(title, aside) for title in titles]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for file in self.files:
                file.abandon()

    def add(self, record: Record) -> None:
        """A row that has come through all steps."""
        self._target.add(record)

    def finish(self) -> dict[str, Any]:
        """Make the shard whole; returns its marker."""
        for file in self.files:
            file.finish()
        accounts = [account.described() for account in self.accounts]
        for before, after in pairwise(accounts):
            if any(before["kept"][key] != after["taken"][key] for key in ("rows", "checksum")):
                raise AssertionError(f"{self._folder}: a row was lost between two steps: {before} {after}")
        marker = {
            "accounts": accounts,
            "files": {file.path.name: content_of(file.path) for file in self.files},
            "seconds": round(time.monotonic() - self._started, 3),
        }
        write_sealed(marker_path(self._folder, self._number), marker)
        return marker


def content_of(path: Path) -> dict[str, Any]:
    """What a file is known by."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


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


def kept_path(folder: Path, number: int) -> Path:
    """Where the rows of a shard are that go on."""
    return folder / f"kept-{number:05d}.parquet"


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


def read_records(path: Path, texts: Path | None = None) -> Iterator[list[Record]]:
    """The records of a shard's file in groups that fit into memory.

    `texts`: the file with the rows themselves, where `path` only says which of them go on (`thin_schema`).
    """
    import pyarrow.parquet as pq

    chosen = _chosen(path) if texts is not None else None
    with pq.ParquetFile(texts or path, pre_buffer=False) as file:
        row = 0
        for group in range(file.num_row_groups):
            records = from_table(file.read_row_group(group))
            for number, record in enumerate(records, start=row):
                record.row = number
            if chosen is not None:
                records = [renewed(records[new["row"] - row], new) for new in chosen(row + len(records))]
            row += file.metadata.row_group(group).num_rows
            if records:
                yield records


def _chosen(path: Path) -> Callable[[int], list[dict[str, Any]]]:
    """What a thin file says of the rows up to a number, asked with ascending ones."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    place = 0

    def up_to(end: int) -> list[dict[str, Any]]:
        nonlocal place
        begin = place
        while place < len(rows) and rows[place]["row"] < end:
            place += 1
        return rows[begin:place]

    return up_to
