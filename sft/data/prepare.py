"""From a stage's sources to the rows it trains on: read, check, render, tokenise, filter, pack, store."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sft.data import store
from sft.data.engine.accounts import FUNNEL_FILE
from sft.data.engine.builder import Progress
from sft.data.engine.job import Job, Tally
from sft.data.engine.local import make_engine
from sft.data.engine.outcome import check_outcome, make_manifest
from sft.data.engine.plan import uses_steps
from sft.data.engine.run_steps import COLUMNS, run_steps
from sft.data.engine.side_files import SideFiles
from sft.data.pack.arrow import Documents, ShardWriter, open_dataset
from sft.data.pack.bins import pack
from sft.data.pack.policy import judge
from sft.data.read.columns import ColumnMap, choose_columns
from sft.data.read.conversation import check_templates, row_id, to_messages
from sft.data.read.row import BadRow, Row, peek
from sft.data.read.sources import OpenSource, open_source
from sft.data.tokenize.render import Rendered, Renderer
from sft.data.tokenize.tokens import Tokens, check_tokenizer, tokenize, tokenizer_hash
from sft.recipe.schema import Recipe, Stage
from sft.utils.errors import UserError
from sft.utils.files import sha256_json, write_sealed

if TYPE_CHECKING:
    import datasets

FORMAT_VERSION = 2  # raise it whenever the same inputs would give other files
CHUNK_ROWS = 512
CHUNK_CHARACTERS = 4_000_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedStage:
    """A stage's data, ready to train on.

    `manifest`: key, recipe, inputs (with content hashes, columns and rows of each), tokenizer, funnel, rows (read),
    documents (kept), packs (rows of `dataset`), tokens, supervised_tokens, max_document_length, shards; and of a stage
    with data steps: steps (a line of the funnel for each).
    """

    path: Path
    manifest: dict[str, Any]

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """Memory-mapped rows: input_ids, assistant_masks (1 = trained), seq_lengths, document_ids."""
        return open_dataset(self.path, self.manifest)


def prepare_stage(
    recipe: Recipe, stage: Stage, tokenizer: Any, *, progress: Progress | None = None, engine: str = "local"
) -> PreparedStage:
    """The prepared data of `stage`: looked up by content, or made. `engine` (local, ray) works on the data's steps.

    Sources, tokenizer, template and the settings that decide the rows make the key, so the same data is prepared once,
    by one process; others that want it wait. Raises UserError (or UsageError) with one sentence when the data can't be
    used: nothing there, no known columns, too many bad rows, no row short enough, a full disk.
    """
    root = prepared_root(recipe)
    job = _plan(stage, tokenizer, root, engine, progress)
    manifest = store.find(root, job.key)
    if manifest is None:
        with store.locked(root, job.key):
            manifest = store.find(root, job.key) or _build(job, root, progress)
    check_outcome(manifest, root / job.key, job)
    return PreparedStage(root / job.key, manifest)


def prepared_root(recipe: Recipe) -> Path:
    """The folder of the recipe's prepared data."""
    return Path(recipe.prepared_dir or Path(recipe.output_dir) / "prepared").expanduser()


def _plan(stage: Stage, tokenizer: Any, root: Path, engine: str, progress: Progress | None) -> Job:
    check_tokenizer(tokenizer)
    check_templates(stage.data)
    train = stage.train if isinstance(stage.train, dict) else stage.train.model_dump()
    max_length, packing = train.get("max_length", 1024), bool(train.get("packing", False))
    if packing and max_length is None:
        raise UserError(f"stages.{stage.name}.train: packing needs max_length, the length of a packed row.")
    renderer = Renderer(tokenizer)
    digest, stepped = tokenizer_hash(tokenizer, renderer.template), None
    if uses_steps(stage.data):
        with make_engine(engine, train.get("dataset_num_proc")) as workers:
            stepped = run_steps(stage.data, root, tokenizer, digest, workers, progress)
        sources = [stepped.source]
        columns: list[dict[str, str] | None] = [COLUMNS]
    else:
        sources = [open_source(source) for source in stage.data.sources]
        columns = [cast("dict[str, str] | None", source.columns) for source in stage.data.sources]
    identity = {
        "format": FORMAT_VERSION,
        "inputs": [{**source.identity, "columns": named} for source, named in zip(sources, columns, strict=True)],
        "recipe": {
            **stage.data.model_dump(include={"prompt_template", "completion_template", "system_prompt", "over_length"}),
            "max_length": max_length,
            "packing": packing,
        },
        "tokenizer": digest,
    }
    key = sha256_json(identity)[:32]
    return Job(stage.data, sources, columns, stepped, max_length, packing, renderer, tokenizer, identity, key)


def _build(job: Job, root: Path, progress: Progress | None) -> dict[str, Any]:
    tally = Tally()
    with store.building(root, job.key) as folder:
        writer = ShardWriter(folder, "documents" if job.packing else "rows")
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
        manifest = make_manifest(job, tally, side, shards, packs)
        if job.stepped is not None:
            write_sealed(folder / FUNNEL_FILE, {"steps": job.stepped.entries, "total": manifest["funnel"]})
        store.commit(root, job.key, folder, manifest)
    return manifest


def _read_source(
    job: Job, source: OpenSource, writer: ShardWriter, side: SideFiles, tally: Tally, progress: Progress | None
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


def _with_columns(job: Job, source: OpenSource, number: int) -> tuple[Iterator[Row], ColumnMap | None]:
    """The source's rows, and which column is what, seen from its first readable rows (None: it has none)."""
    rows, names = peek(source.read())
    return rows, None if names is None else choose_columns(source.name, names, job.columns[number])


def _render(job: Job, row: Row, mapping: ColumnMap | None) -> Rendered | BadRow:
    if row.value is None or mapping is None:
        return row.bad or BadRow("broken_json", "unreadable")
    messages = to_messages(row.value, mapping, job.data)
    return messages if isinstance(messages, BadRow) else job.renderer.render(messages)


def _tokenize_chunk(
    job: Job, chunk: list[tuple[Row, str, Rendered]], writer: ShardWriter, side: SideFiles, tally: Tally
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
        if verdict.truncated:
            side.cut(row, name, length)


def _keep(tokens: Tokens, name: str, writer: ShardWriter, tally: Tally) -> None:
    tally.lengths.append(len(tokens.ids))
    tally.supervised += tokens.supervised
    writer.write([(tokens.ids, tokens.mask, name)])


def _pack(
    folder: Path, shards: list[dict[str, Any]], tally: Tally, capacity: int, progress: Progress | None
) -> tuple[list[dict[str, Any]], int]:
    packs = pack(np.array(tally.lengths, dtype=np.int64), capacity)
    documents = Documents(folder, shards)
    writer = ShardWriter(folder, "rows")
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
