"""Where rows come from: local files, the Hub, or the built-in generator of problems."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from sft.data.read import hub, local
from sft.data.read.row import Part, Row, first_columns
from sft.recipe.schema import GenerateSource, Source
from sft.utils.errors import UsageError, UserError
from sft.utils.files import sha256_file


class _Read(Protocol):
    def __call__(self, columns: Collection[str] | None = None) -> Iterator[Row]: ...


class _Parts(Protocol):
    def __call__(self, rows: int, scratch: Path, columns: Collection[str] | None = None) -> list[Part]: ...


@dataclass(frozen=True)
class OpenSource:
    """A source that was found to exist.

    `name` is for messages, `files` are what its rows say they come from; `identity` is JSON that changes when the
    content does; `columns()` are those of its first readable rows, None where it has none. `read(columns)` starts from
    the first row; what isn't asked for needn't be read (None: all). `parts(rows, scratch, columns)` are the same rows
    in parts of about so many, which other processes can read at once (`scratch` is a folder for a copy of what can't be
    read from the middle); `unchanged()` raises UserError when the content has changed since.
    `origin`: of a data set of the Hub, its hub (id), config, split, revision and rows.
    """

    name: str
    identity: dict[str, Any]
    columns: Callable[[], set[str] | None]
    read: _Read
    parts: _Parts
    files: tuple[str, ...]
    unchanged: Callable[[], None] = lambda: None
    origin: dict[str, Any] = field(default_factory=dict)


def open_source(source: Source) -> OpenSource:
    """Find what `source` means without reading its rows (local files are hashed, Hub splits downloaded).

    Raises UsageError when it says neither or both of `path` and `generate`; UserError when nothing readable is there.
    """
    if (source.path is None) == (source.generate is None):
        raise UsageError("A source needs either `path` (a Hub id or local files) or `generate`, and not both.")
    if source.generate is not None:
        opened = _open_generator(source.generate)
    elif local.looks_local(str(source.path)):
        opened = _open_files(source)
    else:
        opened = _open_hub(source)
    if source.max_rows is None:
        return opened
    limit = source.max_rows
    return replace(
        opened,
        identity={**opened.identity, "max_rows": limit},
        read=lambda columns=None: islice(opened.read(columns), limit),
        parts=lambda rows, scratch, columns=None: _first_rows(opened.parts(rows, scratch, columns), limit),
    )


def _first_rows(parts: list[Part], limit: int) -> list[Part]:
    taken = []
    for part in parts:
        if limit > 0:
            taken.append(part.first(limit))
        limit -= part.rows
    return taken


def _open_files(source: Source) -> OpenSource:
    files = local.find_files(str(source.path), source.split, source.data_files, source.config)
    before = [_stamp(path) for _, path in files]
    identity = {"files": local.identity(files)}

    def unchanged() -> None:
        for (_, path), stamp in zip(files, before, strict=True):
            if _stamp(path) != stamp:
                raise UserError(f"{path}: changed while it was read; run again when it is complete.")

    def read(columns: Collection[str] | None = None) -> Iterator[Row]:
        yield from local.read_files(files, columns)
        unchanged()

    columns, parts = partial(local.columns_of, files), partial(local.parts_of, files)
    return OpenSource(str(source.path), identity, columns, read, parts, tuple(name for name, _ in files), unchanged)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _open_hub(source: Source) -> OpenSource:
    data = hub.load_split(source)
    name = f"{source.path}:{source.split}"
    identity, parts = hub.identity(source, data), partial(hub.parts_of, name, data)
    columns = set(data.column_names) if len(data) else None
    return OpenSource(
        name,
        identity,
        lambda: columns,
        partial(hub.read_range, name, data, 0, len(data)),
        parts,
        (name,),
        origin=hub.origin(source, data),
    )


def _open_generator(section: GenerateSource) -> OpenSource:
    from sft.data.read import generated

    name = f"generate:{section.family}:{section.split}"

    def read(columns: Collection[str] | None = None) -> Iterator[Row]:
        for line, value in enumerate(generated.generate_rows(section), start=1):
            yield Row(name, line, value)

    # The problems are a function of the section and the generator's code.
    code = [sha256_file(file) for file in sorted(Path(generated.__file__).parent.glob("*.py"))]
    identity = {"generate": section.model_dump(), "code": code}

    def parts(rows: int, scratch: Path, columns: Collection[str] | None = None) -> list[Part]:
        return local.spooled(name, map(_as_line, read()), rows, scratch)

    return OpenSource(name, identity, lambda: first_columns(read()), read, parts, (name,))


def _as_line(row: Row) -> bytes:
    return json.dumps(row.value).encode() + b"\n"
