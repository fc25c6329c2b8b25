"""Rows of a data set on the Hugging Face Hub, through `datasets`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.read.arrow_rows import to_rows
from sft.data.read.row import Part, Row
from sft.recipe.schema import Source
from sft.utils.errors import UserError, first_line
from sft.utils.hub_cache import remedy

if TYPE_CHECKING:
    import datasets

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
BATCH_ROWS = 1024


def load_split(source: Source) -> datasets.Dataset:
    """The split that `source` names, downloaded on first use and memory-mapped.

    Raises UserError in one sentence for whatever keeps it from being read: no such data set, configuration, split or
    revision, no permission, no network.
    """
    import datasets

    name = source.path
    assert name is not None
    if not HUB_ID.fullmatch(name):
        raise UserError(f"'{name}' is neither a local path nor a Hub data set id (owner/name).")
    try:
        data = datasets.load_dataset(
            name, source.config, split=source.split, revision=source.revision, data_files=source.data_files
        )
    except Exception as error:  # `datasets` raises its own, huggingface_hub's, httpx's, fsspec's and pyarrow's
        raise UserError(_sentence(source, error)) from error
    if not isinstance(data, datasets.Dataset):
        raise UserError(f"{name}: split '{source.split}' is not a single table; name one split.")
    return data


def _sentence(source: Source, error: Exception) -> str:
    import datasets

    where = f"{source.path}" + (f"@{source.revision}" if source.revision else "")
    first = first_line(error)
    kind = type(error).__name__
    names = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in names or "gated" in first.lower():
        return f"{where}: the Hub data set is gated; ask for access on its page, then set HF_TOKEN to your token."
    if isinstance(error, datasets.exceptions.DatasetNotFoundError) or "RepositoryNotFoundError" in names:
        if "Revision" in first or "revision" in first:
            return f"{where}: the Hub data set has no such revision; correct `revision`."
        return (
            f"{where}: there is no local path of that name, and the Hub has no such data set or it is private; "
            "check the name, or set HF_TOKEN to a token that may read it."
        )
    if isinstance(error, ConnectionError) or names & {"OfflineModeIsEnabled", "TransportError", "TimeoutException"}:
        return (
            f"{where}: there is no local path of that name, and the Hub can't be reached ({kind}); "
            "check the network (or HF_HUB_OFFLINE), or set `path` to local files."
        )
    which = f"config {source.config}, split {source.split}"
    return f"{where}: the Hub data set can't be loaded ({which}): {first}{remedy(error)}"


def identity(source: Source, data: datasets.Dataset) -> dict[str, Any]:
    """What the content of a Hub split is keyed by: the fingerprint of a loaded split is made from its configuration
    and the hash of the commit that it was resolved to."""
    return {
        "hub": source.path,
        "config": data.info.config_name,
        "split": str(data.split),
        "fingerprint": data._fingerprint,
    }


def origin(source: Source, data: datasets.Dataset) -> dict[str, Any]:
    """Which split of which data set it is, of how many rows, and its commit, where `datasets` tells that."""
    files = data.info.download_checksums or {}
    commits = {match[1] for name in files if (match := re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", str(name)))}
    revision = commits.pop() if len(commits) == 1 else None
    found = {"hub": source.path, "config": source.config, "split": str(data.split)}
    return {**found, "revision": revision, "rows": len(data)}


def parts_of(
    name: str, data: datasets.Dataset, rows: int, _scratch: Path, columns: Collection[str] | None = None
) -> list[Part]:
    """The rows of a split in parts of `rows`."""
    ranges = [(start, min(start + rows, len(data))) for start in range(0, len(data), rows)]
    return [Part(partial(read_range, name, data, start, end, columns), end - start) for start, end in ranges]


def read_range(
    name: str, data: datasets.Dataset, start: int, end: int, columns: Collection[str] | None = None
) -> Iterator[Row]:
    """Rows of the split called `name`, in order, read in batches from the memory-mapped table (columns: None, all)."""
    line = start + 1
    part = data.select(range(start, end))
    if columns is not None:
        part = part.select_columns([column for column in data.column_names if column in columns])
    # The arrow format skips decoding: images or audio beside the text would need packages that we don't have.
    for table in part.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for batch in table.to_batches():
            yield from to_rows(name, line, batch)
            line += batch.num_rows
