"""Rows of local .jsonl and .parquet files: one file, a folder, or a glob."""

from __future__ import annotations

import glob
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from sft.data.read.row import BadRow, Row
from sft.utils.errors import UserError
from sft.utils.files import sha256_file

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# The words that Hub data sets use for splits in file names; the key is what a recipe's `split` says.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
}
PARQUET_BATCH_ROWS = 256  # a row may hold several long traces


def looks_local(path: str) -> bool:
    """Whether `path` can only mean local files: it exists, is a glob, or is written like a path."""
    return (
        Path(path).expanduser().exists()
        or glob.has_magic(path)
        or path.endswith((*SUFFIXES, ".json", ".csv", ".arrow"))
        or path.startswith((".", "/", "~"))
        or path.count("/") > 1
    )


def find_files(path: str, split: str) -> list[tuple[str, Path]]:
    """The (short name, path) of every data file that `path` means, sorted by name.

    A single file is taken as it is. Of a folder or glob, files named after a split are told apart as on the Hub: where
    some are named after `split` only these are taken, else those named after no split (so that `train.jsonl` and
    `test.jsonl` in one folder never get mixed).

    Raises UserError when nothing is found or a single file is of an unknown kind.
    """
    expanded = str(Path(path).expanduser())
    if Path(expanded).is_file():
        if not expanded.endswith(SUFFIXES):
            raise UserError(f"{path}: unknown kind of data file; expected one of {', '.join(SUFFIXES)}.")
        return [(Path(expanded).name, Path(expanded))]
    if Path(expanded).is_dir():
        root, found = Path(expanded), sorted(Path(expanded).rglob("*"))
    elif glob.has_magic(expanded):
        found = sorted(Path(name) for name in glob.glob(expanded, recursive=True))
        root = _fixed_part(expanded)
    else:
        raise UserError(f"{path}: no such file or folder.")
    files = [
        (file.relative_to(root).as_posix(), file)
        for file in found
        if file.is_file() and file.name.endswith(SUFFIXES) and not _hidden(file.relative_to(root))
    ]
    if not files:
        raise UserError(f"{path}: no {' or '.join(SUFFIXES)} file there.")
    return _of_split(path, files, split)


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
    return chosen


def identity(files: list[tuple[str, Path]]) -> list[dict[str, Any]]:
    """What the content of `files` is keyed by: short name, bytes and SHA-256 of each."""
    return [{"name": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in files]


def read_files(files: list[tuple[str, Path]]) -> Iterator[Row]:
    """Every row of `files`, in order. A line that isn't a JSON object becomes a bad row.

    Raises UserError when a file can't be read at all (missing, no permission, not a parquet file).
    """
    for name, path in files:
        try:
            yield from _read_parquet(name, path) if path.suffix == ".parquet" else _read_jsonl(name, path)
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: can't be read: {error}.") from error


def _read_jsonl(name: str, path: Path) -> Iterator[Row]:
    with _open_bytes(path) as handle:
        for line, raw in enumerate(handle, start=1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield parse_line(name, line, raw)


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
    return Row(source, line, value)


def _show(raw: bytes) -> str:
    return raw.rstrip(b"\r\n").decode("utf-8", errors="backslashreplace")


def _read_parquet(name: str, path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Without pre_buffer, which would hold all of a row group's bytes while its rows are read.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            line = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for value in batch.to_pylist():
                    line += 1
                    yield Row(name, line, value)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error
