"""Rows of local .jsonl, .parquet, .json and .csv files: one file, a folder, or a glob."""

from __future__ import annotations

import glob
import gzip
import json
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from sft.data.read.arrow_rows import parquet_batches, to_rows
from sft.data.read.csv_rows import csv_columns, csv_parts, read_csv
from sft.data.read.json_rows import holds_list, list_lines
from sft.data.read.row import MOST_NESTED, PEEK_ROWS, BadRow, Part, Row, counted_columns, deeper
from sft.utils.errors import UserError, first_line
from sft.utils.files import sha256_file

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".csv")
# Where a folder has other data, these are what is said about it (dataset_info.json, results.csv).
SIDE_SUFFIXES = (".json", ".csv")
# The words that Hub data sets use for splits in file names; the key is what a recipe's `split` says.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
}
BOM = b"\xef\xbb\xbf"
PARQUET_BATCH_ROWS = 256  # a row may hold several long traces


def looks_local(path: str) -> bool:
    """Whether `path` can only mean local files: it exists, is a glob, or is written like a path."""
    return (
        Path(path).expanduser().exists()
        or glob.has_magic(path)
        or path.endswith((*SUFFIXES, ".arrow"))
        or path.startswith((".", "/", "~"))
        or path.count("/") > 1
    )


def find_files(
    path: str, split: str, data_files: str | list[str] | None = None, config: str | None = None
) -> list[tuple[str, Path]]:
    """The (short name, path) of every data file that `path` means, sorted by name.

    Of a folder, `data_files` (names or globs in it) says which; a `config` is the folder of that name in it. Files of
    .json and .csv are taken where they are named, and where there are no others.

    A single file is taken as it is. Of a folder or glob, files named after a split are told apart as on the Hub: where
    some are named after `split` only these are taken, else those named after no split (so that `train.jsonl` and
    `test.jsonl` in one folder never get mixed).

    Raises UserError when nothing is found or a single file is of an unknown kind.
    """
    expanded, patterns = str(Path(path).expanduser()), list[str]()
    if Path(expanded).is_file():
        if not expanded.endswith(SUFFIXES):
            raise UserError(f"{path}: unknown kind of data file; expected one of {', '.join(SUFFIXES)}.")
        return [(Path(expanded).name, Path(expanded))]
    if Path(expanded).is_dir():
        root, found = Path(expanded), sorted(Path(expanded).rglob("*"))
        if config is not None and (root / config).is_dir():
            root, found = root / config, sorted((root / config).rglob("*"))
        if data_files is not None:
            patterns = [data_files] if isinstance(data_files, str) else data_files
            found = sorted({file for pattern in patterns for file in root.glob(pattern)})
    elif glob.has_magic(expanded):
        found = sorted(Path(name) for name in glob.glob(expanded, recursive=True))
        root, patterns = _fixed_part(expanded), [expanded]
    else:
        raise UserError(f"{path}: no such file or folder.")
    files = [
        (file.relative_to(root).as_posix(), file)
        for file in found
        if file.is_file() and file.name.endswith(SUFFIXES) and not _hidden(file.relative_to(root))
    ]
    if not files:
        named = f" that data_files ({data_files}) means" if data_files is not None else ""
        raise UserError(f"{path}: no {' or '.join(SUFFIXES)} file there{named}.")
    side = tuple(suffix for suffix in SIDE_SUFFIXES if not any(pattern.endswith(suffix) for pattern in patterns))
    files = [file for file in files if not file[0].endswith(side)] or files
    return files if data_files is not None else _of_split(path, files, split)


def _fixed_part(pattern: str) -> Path:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _of_split(path: str, files: list[tuple[str, Path]], split: str) -> list[tuple[str, Path]]:
    wanted = SPLIT_WORDS.get(split, {split})
    every = wanted.union(*SPLIT_WORDS.values())
    words = {name: set(re.split(r"[^a-z0-9]+", name.lower())) for name, _ in files}
    mine = [file for file in files if words[file[0]] & wanted]
    unnamed = [file for file in files if not words[file[0]] & every]
    chosen = mine or unnamed
    if not chosen:
        names = ", ".join(name for name, _ in files[:5])
        raise UserError(
            f"{path}: no file belongs to the split '{split}' (found {names}); set `split`, or name one file."
        )
    if mine and unnamed:
        log.warning(
            "%s: read are the %d files named after the split '%s'; %d others, such as %s, are left out",
            *(path, len(mine), split, len(unnamed), unnamed[0][0]),
        )
    return chosen


def identity(files: list[tuple[str, Path]]) -> list[dict[str, Any]]:
    """What the content of `files` is keyed by: short name, bytes and SHA-256 of each."""
    return [{"name": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in files]


def columns_of(files: list[tuple[str, Path]]) -> set[str] | None:
    """The columns that the first readable rows have; None: no row can be read.

    Raises UserError when a file can't be read at all.
    """
    names, rows = set[str](), 0
    for name, path in files:
        with _readable(path):
            if path.suffix == ".parquet":
                count, found = _parquet_columns(path)
            elif path.suffix == ".csv":
                count, found = PEEK_ROWS, csv_columns(path)
            else:
                count, names_there = counted_columns(_read_lines_of(name, path), PEEK_ROWS - rows)
                found = list(names_there)
        names |= set(found) if count else set()
        rows += count
        if rows >= PEEK_ROWS:
            break
    return names or None


def _parquet_columns(path: Path) -> tuple[int, list[str]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        return file.metadata.num_rows, file.schema_arrow.names


def read_files(files: list[tuple[str, Path]], columns: Collection[str] | None = None) -> Iterator[Row]:
    """Every row of `files`, in order. A line that isn't a JSON object becomes a bad row.

    Of parquet files only `columns` are read (None: all), so that nothing else can make a row bad.

    Raises UserError when a file can't be read at all (missing, no permission, not a parquet file).
    """
    for name, path in files:
        with _readable(path):
            if path.suffix == ".parquet":
                yield from _read_parquet(name, path, columns)
            else:
                yield from read_csv(name, path) if path.suffix == ".csv" else _read_lines_of(name, path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what keeps a file from being read into a sentence."""
    import zlib

    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: not a readable parquet file: {first_line(error)}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read: {error}; copy or download it again.") from error


def parts_of(
    files: list[tuple[str, Path]], rows: int, scratch: Path, columns: Collection[str] | None = None
) -> list[Part]:
    """The rows of `files` in parts of about `rows`, as `read_files` reads them. What can't be read from the middle is
    copied to `scratch` first.

    Raises UserError when a file can't be read at all.
    """
    parts: list[Part] = []
    for name, path in files:
        with _readable(path):
            if path.suffix == ".parquet":
                parts += _parquet_parts(name, path, rows, columns)
            elif path.suffix == ".csv":
                parts += csv_parts(name, path, rows)
            elif path.name.endswith(".gz"):
                with _open_bytes(path) as handle:
                    parts += spooled(name, handle, rows, scratch / f"file-{len(parts)}")
            elif path.suffix == ".json" and holds_list(path):
                parts += spooled(name, list_lines(path), rows, scratch / f"file-{len(parts)}")
            else:
                parts += _jsonl_parts(name, path, rows)
    return parts


def _jsonl_parts(name: str, path: Path, rows: int, first_line: int = 1) -> list[Part]:
    parts, start, end, line, count, begun = [], 0, 0, first_line, 0, first_line
    with path.open("rb") as handle:
        for raw in handle:
            end += len(raw)
            said = raw.removeprefix(BOM) if line == 1 else raw
            count += bool(said) and not said.isspace()
            line += 1
            if count == rows:
                parts.append(Part(partial(_read_lines, name, path, start, end, begun), count))
                start, begun, count = end, line, 0
    if count:
        parts.append(Part(partial(_read_lines, name, path, start, end, begun), count))
    return parts


def spooled(name: str, lines: Iterable[bytes], rows: int, scratch: Path) -> list[Part]:
    """Parts of `rows` lines each, written to files in `scratch` from where they can be read."""
    parts: list[Part] = []
    scratch.mkdir(parents=True, exist_ok=True)
    lines, line = iter(lines), 1
    while chunk := list(islice(lines, rows)):
        path = scratch / f"{len(parts):05d}.jsonl"
        path.write_bytes(b"".join(chunk))
        parts += _jsonl_parts(name, path, rows, line)
        line += len(chunk)
    return parts


def _read_lines(name: str, path: Path, start: int, end: int, first_line: int) -> Iterator[Row]:
    """The rows between two places of a file, whose first line has the number `first_line`."""
    with path.open("rb") as handle:
        handle.seek(start)
        yield from _rows_of(name, handle, first_line, end - start)


def _read_lines_of(name: str, path: Path) -> Iterator[Row]:
    if path.suffix == ".json" and holds_list(path):
        yield from (parse_line(name, number, raw) for number, raw in enumerate(list_lines(path), start=1))
        return
    with _open_bytes(path) as handle:
        yield from _rows_of(name, handle, 1)


def _rows_of(name: str, lines: IO[bytes], line: int, size: int = sys.maxsize) -> Iterator[Row]:
    """The rows of the lines in the next `size` bytes, of which the first has the number `line`.

    A line isn't held any longer (as `enumerate` would) while its row is worked on.
    """
    while size > 0 and (raw := lines.readline()):
        size -= len(raw)
        if line == 1:
            raw = raw.removeprefix(BOM)
        row = parse_line(name, line, raw) if raw and not raw.isspace() else None
        line += 1
        del raw
        if row is not None:
            yield row
            del row


def _open_bytes(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def parse_line(source: str, line: int, raw: bytes) -> Row:
    """The row that one line of JSON holds, bad if it isn't a JSON object in UTF-8."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(source, line, None, BadRow("broken_json", f"not UTF-8: {error}"), _show(raw))
    except (ValueError, RecursionError) as error:
        return Row(source, line, None, BadRow("broken_json", f"{type(error).__name__}: {error}"), _show(raw))
    if not isinstance(value, dict):
        detail = f"expected a JSON object, found {type(value).__name__}"
        return Row(source, line, None, BadRow("not_an_object", detail), _show(raw))
    if raw.count(b"[") + raw.count(b"{") > MOST_NESTED and deeper(value, MOST_NESTED):
        return Row(source, line, None, BadRow("broken_json", f"nested more than {MOST_NESTED} deep"), _show(raw))
    return Row(source, line, value)


def _show(raw: bytes) -> str:
    return raw.rstrip(b"\r\n").decode("utf-8", errors="backslashreplace")


def _parquet_parts(name: str, path: Path, rows: int, columns: Collection[str] | None) -> list[Part]:
    """Parts of whole row groups: a group can only be read from its beginning."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    parts, groups, count, line = [], list[int](), 0, 1
    for number, size in enumerate(sizes):
        groups.append(number)
        count += size
        if count >= rows or number + 1 == len(sizes):
            parts.append(Part(partial(_read_parquet, name, path, columns, tuple(groups), line), count))
            groups, count, line = [], 0, line + count
    return parts


def _read_parquet(
    name: str, path: Path, columns: Collection[str] | None, groups: Sequence[int] | None = None, first_line: int = 1
) -> Iterator[Row]:
    """Every row, or those of some row groups, of which the first has the number `first_line`."""
    import pyarrow.parquet as pq

    # Without pre_buffer, which would hold all of a row group's bytes while its rows are read.
    with _readable(path), pq.ParquetFile(path, pre_buffer=False) as file:
        line = first_line
        for batch in parquet_batches(file, PARQUET_BATCH_ROWS, columns, groups):
            yield from to_rows(name, line, batch)
            line += batch.num_rows
