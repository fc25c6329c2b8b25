"""Where rows come from: local files, the Hub, or the built-in generator of problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sft.data import hub_source, local_source
from sft.data.rows import Row
from sft.recipe.schema import GenerateSource, Source
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


def open_source(source: Source) -> OpenSource:
    """Find what `source` means without reading its rows (local files are hashed, Hub splits downloaded).

    Raises UsageError when it says neither or both of `path` and `generate`; UserError when nothing readable is there.
    """
    if (source.path is None) == (source.generate is None):
        raise UsageError("A source needs either `path` (a Hub id or local files) or `generate`, and not both.")
    if source.generate is not None:
        opened = _open_generator(source.generate)
    elif local_source.looks_local(str(source.path)):
        opened = _open_files(source)
    else:
        opened = _open_hub(source)
    if source.max_rows is None:
        return opened
    read, limit = opened.read, source.max_rows
    return OpenSource(opened.name, {**opened.identity, "max_rows": limit}, lambda: islice(read(), limit))


def _open_files(source: Source) -> OpenSource:
    files = local_source.find_files(str(source.path), source.split)
    before = [_stamp(path) for _, path in files]
    identity = {"files": local_source.identity(files)}

    def read() -> Iterator[Row]:
        yield from local_source.read_files(files)
        for (_, path), stamp in zip(files, before, strict=True):
            if _stamp(path) != stamp:
                raise UserError(f"{path}: changed while it was read; run again when it is complete.")

    return OpenSource(str(source.path), identity, read)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _open_hub(source: Source) -> OpenSource:
    data = hub_source.load_split(source)
    name = f"{source.path}:{source.split}"
    return OpenSource(name, hub_source.identity(source, data), lambda: hub_source.read_split(source, data))


def _open_generator(section: GenerateSource) -> OpenSource:
    from sft.data import procedural

    name = f"generate:{section.family}:{section.split}"

    def read() -> Iterator[Row]:
        for line, value in enumerate(procedural.generate_rows(section), start=1):
            yield Row(name, line, value)

    # The problems are a function of the section and the generator's code.
    code = [sha256_file(file) for file in sorted(Path(procedural.__file__).parent.glob("*.py"))]
    identity = {"generate": section.model_dump(), "code": code}
    return OpenSource(name, identity, read)


def read_rows(source: Source) -> Iterator[Row]:
    """Every row of `source`, in order; broken ones are marked bad. Errors as in `open_source`."""
    yield from open_source(source).read()
