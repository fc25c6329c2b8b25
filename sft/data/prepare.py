"""From a stage's sources to the rows it trains on: read, check, render, tokenise, filter, pack, store."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

import sft
from sft.data import store
from sft.data.columns import ColumnMap, check_templates, choose_columns, row_id, to_messages
from sft.data.filters import judge
from sft.data.packing import pack
from sft.data.quarantine import DROPPED_FILE, QUARANTINE_FILE, SideFiles
from sft.data.render import Rendered, Renderer
from sft.data.rows import BadRow, Row
from sft.data.sources import OpenSource, open_source
from sft.data.tokenization import Tokens, check_tokenizer, tokenize, tokenizer_hash
from sft.errors import UserError
from sft.files import sha256_json
from sft.recipe.schema import DataSection, Recipe, Stage

if TYPE_CHECKING:
    import datasets

FORMAT_VERSION = 1  # raise it whenever the same inputs would give other rows
CHUNK_ROWS = 512
CHUNK_CHARACTERS = 4_000_000
PEEK_ROWS = 100

Progress = Callable[[str, int, int | None], None]
"""Called as progress(phase, done, total): phase "rows" counts rows read (total unknown: None), "packs" rows written."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedStage:
    """A stage's data, ready to train on.

    `manifest`: key, recipe, inputs (with content hashes, columns and rows of each), tokenizer, funnel, rows (read),
    documents (kept), packs (rows of `dataset`), tokens, supervised_tokens, max_document_length, shards.
    """

    path: Path
    manifest: dict[str, Any]

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """Memory-mapped rows: input_ids, assistant_masks (1 = trained), seq_lengths, document_ids."""
        return store.open_dataset(self.path, self.manifest)


@dataclass
class _Job:
    """All that decides the content of a store."""

    data: DataSection
    sources: list[OpenSource]
    max_length: int | None
    packing: bool
    renderer: Renderer
    tokenizer: Any
    identity: dict[str, Any]
    key: str


@dataclass
class _Tally:
    """Counts while rows pass."""

    rows: int = 0
    supervised: int = 0
    truncated: int = 0
    lengths: list[int] = field(default_factory=list)  # of the documents kept
    shortest: int | None = None  # of all documents, kept or not
    longest: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)


def prepare_stage(recipe: Recipe, stage: Stage, tokenizer: Any, *, progress: Progress | None = None) -> PreparedStage:
    """The prepared data of `stage`: looked up by content, or made.

    Sources, tokenizer, template and the settings that decide the rows make the key, so the same data is prepared once,
    by one process; others that want it wait. Raises UserError (or UsageError) with one sentence when the data can't be
    used: nothing there, no known columns, too many bad rows, no row short enough, a full disk.
    """
    root = Path(recipe.prepared_dir or Path(recipe.output_dir) / "prepared").expanduser()
    job = _plan(stage, tokenizer)
    manifest = store.find(root, job.key)
    if manifest is None:
        with store.locked(root, job.key):
            manifest = store.find(root, job.key) or _build(job, root, progress)
    _check_outcome(manifest, root / job.key, job)
    return PreparedStage(root / job.key, manifest)


def _plan(stage: Stage, tokenizer: Any) -> _Job:
    check_tokenizer(tokenizer)
    check_templates(stage.data)
    train = stage.train if isinstance(stage.train, dict) else stage.train.model_dump()
    max_length, packing = train.get("max_length", 1024), bool(train.get("packing", False))
    if packing and max_length is None:
        raise UserError(f"stages.{stage.name}.train: packing needs max_length, the length of a packed row.")
    renderer = Renderer(tokenizer)
    sources = [open_source(source) for source in stage.data.sources]
    identity = {
        "format": FORMAT_VERSION,
        "inputs": [
            {**source.identity, "columns": section.columns}
            for source, section in zip(sources, stage.data.sources, strict=True)
        ],
        "recipe": {
            **stage.data.model_dump(include={"prompt_template", "completion_template", "system_prompt", "over_length"}),
            "max_length": max_length,
            "packing": packing,
        },
        "tokenizer": tokenizer_hash(tokenizer, renderer.template),
    }
    return _Job(stage.data, sources, max_length, packing, renderer, tokenizer, identity, sha256_json(identity)[:32])


def _build(job: _Job, root: Path, progress: Progress | None) -> dict[str, Any]:
    tally = _Tally()
    with store.building(root, job.key) as folder:
        writer = store.ShardWriter(folder, "documents" if job.packing else "rows")
        try:
            with SideFiles(folder) as side:
                for source in job.sources:
                    _read_source(job, source, writer, side, tally, progress)
            writer.close()
        finally:
            writer.abandon()
        shards, packs = writer.shards, len(tally.lengths)
        if job.packing:
            shards, packs = _pack(folder, writer.shards, tally, job.max_length or 0, progress)
        manifest = _manifest(job, tally, side, shards, packs)
        store.commit(root, job.key, folder, manifest)
    return manifest


def _read_source(
    job: _Job, source: OpenSource, writer: store.ShardWriter, side: SideFiles, tally: _Tally, progress: Progress | None
) -> None:
    before, kept = tally.rows, len(tally.lengths)
    rows, mapping = _with_columns(job, source, len(tally.sources))
    chunk: list[tuple[Row, str, Rendered]] = []
    characters = 0
    for row in rows:
        tally.rows += 1
        rendered = _render(job, row, mapping)
        if isinstance(rendered, BadRow):
            side.quarantine(row, rendered)
            continue
        assert row.value is not None and mapping is not None
        chunk.append((row, row_id(row.value, mapping, row.source, row.line), rendered))
        characters += len(rendered.text)
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            _tokenize_chunk(job, chunk, writer, side, tally)
            chunk, characters = [], 0
            if progress:
                progress("rows", tally.rows, None)
    _tokenize_chunk(job, chunk, writer, side, tally)
    if progress:
        progress("rows", tally.rows, None)
    columns = mapping.described() if mapping else {}
    tally.sources.append(
        {"source": source.name, "rows": tally.rows - before, "kept": len(tally.lengths) - kept, "columns": columns}
    )


def _with_columns(job: _Job, source: OpenSource, number: int) -> tuple[Iterator[Row], ColumnMap | None]:
    """The source's rows, and which column is what, seen from its first readable rows (None: it has none)."""
    rows = source.read()
    seen: list[Row] = []
    names: set[str] = set()
    readable = 0
    for row in rows:
        seen.append(row)
        if row.value is not None:
            names.update(row.value)
            readable += 1
            if readable >= PEEK_ROWS:
                break
    given = cast("dict[str, str] | None", job.data.sources[number].columns)
    mapping = choose_columns(source.name, names, given) if readable else None
    return chain(seen, rows), mapping


def _render(job: _Job, row: Row, mapping: ColumnMap | None) -> Rendered | BadRow:
    if row.value is None or mapping is None:
        return row.bad or BadRow("broken_json", "unreadable")
    messages = to_messages(row.value, mapping, job.data)
    return messages if isinstance(messages, BadRow) else job.renderer.render(messages)


def _tokenize_chunk(
    job: _Job, chunk: list[tuple[Row, str, Rendered]], writer: store.ShardWriter, side: SideFiles, tally: _Tally
) -> None:
    documents = tokenize(job.tokenizer, [rendered for _, _, rendered in chunk])
    for (row, name, _), tokens in zip(chunk, documents, strict=True):
        length = len(tokens.ids)
        tally.longest = max(tally.longest, length)
        tally.shortest = length if tally.shortest is None else min(tally.shortest, length)
        verdict = judge(tokens, job.max_length, job.data.over_length)
        if verdict.reason == "over_length" and job.data.over_length == "error":
            raise UserError(
                f"{row.source}:{row.line}: {length} tokens are more than train.max_length {job.max_length}; raise it, "
                "or set data.over_length to drop or truncate."
            )
        if verdict.tokens is None:
            side.drop(row, name, str(verdict.reason), length)
            continue
        _keep(verdict.tokens, name, writer, tally)
        tally.truncated += verdict.truncated


def _keep(tokens: Tokens, name: str, writer: store.ShardWriter, tally: _Tally) -> None:
    tally.lengths.append(len(tokens.ids))
    tally.supervised += tokens.supervised
    writer.write([(tokens.ids, tokens.mask, name)])


def _pack(
    folder: Path, shards: list[dict[str, Any]], tally: _Tally, capacity: int, progress: Progress | None
) -> tuple[list[dict[str, Any]], int]:
    packs = pack(np.array(tally.lengths, dtype=np.int64), capacity)
    documents = store.Documents(folder, shards)
    writer = store.ShardWriter(folder, "rows")
    try:
        for done, indices in enumerate(packs, start=1):
            writer.write(documents.take(indices))
            if progress and (done % 1000 == 0 or done == len(packs)):
                progress("packs", done, len(packs))
        writer.close()
    finally:
        writer.abandon()
    del documents
    for shard in shards:
        (folder / shard["name"]).unlink()
    return writer.shards, len(packs)


def _manifest(job: _Job, tally: _Tally, side: SideFiles, shards: list[dict[str, Any]], packs: int) -> dict[str, Any]:
    bad, kept = side.bad.total(), len(tally.lengths)
    dropped = Counter(side.dropped)
    if bad:
        dropped["bad"] = bad
    if tally.rows != kept + dropped.total():
        raise AssertionError(f"{tally.rows} rows read, {kept} kept and {dropped.total()} dropped: one was lost")
    inputs = [{**identity, **counted} for identity, counted in zip(job.identity["inputs"], tally.sources, strict=True)]
    return {
        "key": job.key,
        **{name: job.identity[name] for name in ("format", "recipe", "tokenizer")},
        "inputs": inputs,
        "sambay_sft": sft.__version__,
        "funnel": {
            "rows": tally.rows,
            "kept": kept,
            "dropped": dict(sorted(dropped.items())),
            "bad": dict(sorted(side.bad.items())),
            "truncated": tally.truncated,
        },
        "rows": tally.rows,
        "documents": kept,
        "packs": packs,
        "tokens": sum(tally.lengths),
        "supervised_tokens": tally.supervised,
        "max_document_length": max(tally.lengths, default=0),
        "length_seen": {"shortest": tally.shortest or 0, "longest": tally.longest},
        "shards": shards,
    }


def _check_outcome(manifest: dict[str, Any], path: Path, job: _Job) -> None:
    """Say what was dropped; raise UserError when too much was, or nothing is left."""
    for source in manifest["inputs"]:
        if source["rows"] == 0:
            raise UserError(f"{source['source']}: the data is empty, there is no row in it.")
    funnel = manifest["funnel"]
    bad, limit = funnel["dropped"].get("bad", 0), job.data.max_bad_fraction
    if bad > limit * funnel["rows"]:
        raise UserError(
            f"{bad} of {funnel['rows']} rows are bad ({_counts(funnel['bad'])}), more than data.max_bad_fraction "
            f"{limit:g} allows; see them in {path / QUARANTINE_FILE}, then mend the data or raise the limit."
        )
    if funnel["kept"] == 0:
        raise UserError(f"No row is left to train on ({_counts(funnel['dropped'])}){_length_hint(manifest)}.")
    _tell(funnel, path)


def _tell(funnel: dict[str, Any], path: Path) -> None:
    rows, dropped = funnel["rows"], dict(funnel["dropped"])
    bad = dropped.pop("bad", 0)
    if bad:
        log.warning("%d of %d rows are bad (%s): %s", bad, rows, _counts(funnel["bad"]), path / QUARANTINE_FILE)
    if dropped:
        log.warning(
            "%d of %d rows dropped (%s): %s", sum(dropped.values()), rows, _counts(dropped), path / DROPPED_FILE
        )
    if funnel["truncated"]:
        log.warning("%d of %d rows cut at max_length; they end without an end token", funnel["truncated"], rows)


def _length_hint(manifest: dict[str, Any]) -> str:
    seen, settings = manifest["length_seen"], manifest["recipe"]
    if seen["longest"] == 0:
        return ": every row is bad"
    if settings["max_length"] is None or seen["longest"] <= settings["max_length"]:
        return ": the chat template marks none of their tokens as trained"
    change = "raise it" if settings["over_length"] == "truncate" else "raise it, or set data.over_length to truncate"
    return (
        f": the rows have {seen['shortest']} to {seen['longest']} tokens and train.max_length is "
        f"{settings['max_length']}; {change}"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items())
