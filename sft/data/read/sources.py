"""Where rows come from: local files, the Hub, or the built-in generator of problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sft.data.read import hub, local
from sft.data.read.row import Row
from sft.recipe.merge import name_of
from sft.recipe.schema import DataSource, GenerateSource, Source
from sft.utils.errors import UsageError, UserError
from sft.utils.files import sha256_file


@dataclass(frozen=True)
class OpenSource:
    """A source that was found to exist.

    `name` is for messages; `identity` is JSON that changes when the content does; `read()` starts from the first row.
    """

    name: str
    identity: dict[str, Any]
    read: Callable[[], Iterator[Row]]


def source_name(source: DataSource) -> str:
    """What a source is called: its name, its recipe's or data set's, or its file's."""
    if source.name:
        return source.name
    if source.generate is not None:
        return f"generate:{source.generate.family}"
    return name_of(source.recipe or source.path or "sources")


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
    read, limit = opened.read, source.max_rows
    return OpenSource(opened.name, {**opened.identity, "max_rows": limit}, lambda: islice(read(), limit))


def _open_files(source: Source) -> OpenSource:
    files = local.find_files(str(source.path), source.split)
    before = [_stamp(path) for _, path in files]
    identity = {"files": local.identity(files)}

    def read() -> Iterator[Row]:
        yield from local.read_files(files)
        for (_, path), stamp in zip(files, before, strict=True):
            if _stamp(path) != stamp:
                raise UserError(f"{path}: changed while it was read; run again when it is complete.")

    return OpenSource(str(source.path), identity, read)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _open_hub(source: Source) -> OpenSource:
    data = hub.load_split(source)
    name = f"{source.path}:{source.split}"
    return OpenSource(name, hub.identity(source, data), lambda: hub.read_split(source, data))


def _open_generator(section: GenerateSource) -> OpenSource:
    from sft.data.read import generated

    name = f"generate:{section.family}:{section.split}"

    def read() -> Iterator[Row]:
        for line, value in enumerate(generated.generate_rows(section), start=1):
            yield Row(name, line, value)

    # The problems are a function of the section and the generator's code.
    code = [sha256_file(file) for file in sorted(Path(generated.__file__).parent.glob("*.py"))]
    identity = {"generate": section.model_dump(), "code": code}
    return OpenSource(name, identity, read)


def read_rows(source: Source) -> Iterator[Row]:
    """Every row of `source`, in order; broken ones are marked bad. Errors as in `open_source`."""
    yield from open_source(source).read()
