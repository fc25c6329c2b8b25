"""From a stage's sources to the rows it trains on: a plan, its passes over the rows, and the rows packed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sft
from sft.answers.pool import kept_workers
from sft.data import store
from sft.data.engine.accounts import FUNNEL_FILE, funnel_entries, totals
from sft.data.engine.builder import STEPS_FOLDER, Builder, Built, Progress
from sft.data.engine.local import Engine, make_engine
from sft.data.engine.outcome import check_outcome
from sft.data.engine.passes import make_passes
from sft.data.engine.plan import READ, Node, make_plan
from sft.data.pack.arrow import open_dataset
from sft.data.pack.documents import Documents, documents_path
from sft.data.pack.rows import plan_rows, write_all
from sft.data.steps.hold_out import Part
from sft.data.tokenize.template import training_template
from sft.data.tokenize.tokens import check_tokenizer, tokenizer_hash
from sft.recipe.schema import DataSection, Recipe, Stage
from sft.tokenizers.dates import DATE, reads_clock
from sft.tokenizers.turns import largest_format_id, spelled_end
from sft.tokenizers.vocabulary import refuse_beyond, vocabulary_size
from sft.utils.errors import UserError
from sft.utils.files import sha256_json, write_sealed
from sft.utils.say import say

if TYPE_CHECKING:
    import datasets

FORMAT_VERSION = 6  # raise it whenever the same inputs would give other files


@dataclass(frozen=True)
class PreparedStage:
    """A stage's data, ready to train on.

    `manifest`: key, recipe, inputs (with content hashes, columns and rows of each), tokenizer, steps (a line of the
    funnel for each), funnel, rows (read), documents (kept), packs (rows of `dataset`), tokens, supervised_tokens,
    max_document_length, shards, passes (their keys). `validation`: the rows that are held out, where the stage says so.
    """

    path: Path
    manifest: dict[str, Any]
    validation: PreparedStage | None = None

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """Memory-mapped rows: input_ids, assistant_masks (1 = trained), seq_lengths, document_ids, document_sources.

        Where the stage's loss has weights also loss_weights; where `top_k` isn't 0 also teacher_ids and
        teacher_logprobs, (trained tokens, top_k) each: see `TopLogprobs`.
        """
        return open_dataset(self.path, self.manifest)

    @property
    def largest_id(self) -> int:
        """The largest token id in the rows; -1 where there are none."""
        return max((shard["largest_id"] for shard in self.manifest["shards"]), default=-1)

    @property
    def top_k(self) -> int:
        """How many tokens a teacher names at a place, at most; 0: no row has a teacher to learn from."""
        return int(self.manifest["top_k"])

    @property
    def passes(self) -> list[Path]:
        """The folders of the passes that made it, in the order in which they ran."""
        return [self.path.parent / STEPS_FOLDER / key for key in self.manifest["passes"]]


@dataclass(frozen=True)
class _Job:
    """All that decides the content of a store, and where it is made."""

    data: DataSection
    ends: list[Node]
    identity: dict[str, Any]
    root: Path
    tokenizer: Any
    workers: int | None

    @property
    def key(self) -> str:
        return sha256_json(self.identity)[:32]


def prepare_stage(
    recipe: Recipe, stage: Stage, tokenizer: Any, *, progress: Progress | None = None, engine: str = "local"
) -> PreparedStage:
    """The prepared data of `stage`: looked up by content, or made. `engine`: who works on it (local, ray).

    Sources, tokenizer, template and the settings that decide the rows make the key, so the same data is prepared once,
    by one process; others that want it wait. Raises UserError (or UsageError) with one sentence when the data can't be
    used: nothing there, no known columns, too many bad rows, no row short enough, a full disk.
    """
    with kept_workers():
        prepared = _prepared(recipe, stage, tokenizer, "training", progress, engine)
        if stage.data.validation is None:
            return prepared
        held = _prepared(recipe, stage, tokenizer, "validation", progress, engine)
    if not held.manifest["documents"]:
        raise UserError(f"stages[{stage.name}].data.validation: none of its rows can be used, so no loss can be taken.")
    return replace(prepared, validation=held)


def _prepared(
    recipe: Recipe, stage: Stage, tokenizer: Any, part: Part, progress: Progress | None, engine: str
) -> PreparedStage:
    job = _plan(stage, tokenizer, prepared_root(recipe), part)
    if part == "training":
        _say_of_template(stage.name, tokenizer)
    known = vocabulary_size(recipe.model)
    if known is not None:
        refuse_beyond(known, largest_format_id(tokenizer, training_template(tokenizer)))
    manifest = store.find(job.root, job.key)
    if manifest is None:
        with store.locked(job.root, job.key):
            manifest = store.find(job.root, job.key)
            if manifest is None:
                with make_engine(engine, job.workers) as workers:
                    manifest = _make(job, workers, progress or (lambda *_: None))
    prepared = PreparedStage(job.root / job.key, manifest)
    if known is not None:
        refuse_beyond(known, prepared.largest_id)
    if part == "training":  # whose funnel has the held-out rows too
        check_outcome(manifest, prepared.passes, stage.data.max_bad_fraction)
    return prepared


def _say_of_template(stage: str, tokenizer: Any) -> None:
    """What the chat template does that its user may not expect."""
    template = training_template(tokenizer)
    if end := spelled_end(tokenizer, template):
        say(
            f"{stage}: {end!r}, which ends answers in this chat template, is no token of this tokenizer: nothing "
            "will stop the model there. `model.chat_template: chatml` ends them with the tokenizer's end of text."
        )
    if reads_clock(template):
        say(
            f"{stage}: the chat template writes the day's date; so that rows are the same on every day, it is "
            f"{DATE:%d %b %Y} here, for problems that are asked too (a row's own is a template argument of "
            "chat_template_kwargs, such as Llama's date_string)."
        )


def passes_there(recipe: Recipe, stage: Stage, tokenizer: Any) -> list[Path]:
    """The folders of the stage's passes that are whole, in their order: what there is of a preparation that failed."""
    root = prepared_root(recipe)
    made = [made.key for job in _jobs(stage, tokenizer, root) for made in make_passes(job.ends)]
    folders = [root / STEPS_FOLDER / key for key in dict.fromkeys(made)]
    return [folder for folder in folders if (folder / store.MANIFEST_FILE).is_file()]


def clean(recipe: Recipe, tokenizer: Any) -> int:
    """Remove what is prepared beside the data of the recipe's stages: other rows, passes that they don't come from.

    Answers and scores that were paid for stay, and what another process is at work on. Returns the bytes freed.
    """
    root = prepared_root(recipe)
    needed: set[str] = set()
    for job in (job for stage in recipe.stages for job in _jobs(stage, tokenizer, root)):
        needed |= {job.key, *(made.key for made in make_passes(job.ends))}
    freed = 0
    for folder in (*root.glob("*/"), *(root / STEPS_FOLDER).glob("*/")):
        if re.fullmatch("[0-9a-f]{32}", folder.name) and folder.name not in needed:
            freed += store.discard(root, folder)
    return freed


def prepared_root(recipe: Recipe) -> Path:
    """The folder of the recipe's prepared data."""
    return Path(recipe.prepared_dir or Path(recipe.output_dir) / "prepared").expanduser()


def _jobs(stage: Stage, tokenizer: Any, root: Path) -> list[_Job]:
    """What is made for a stage: the rows it trains on, and those it holds out."""
    parts: list[Part] = ["training"] if stage.data.validation is None else ["training", "validation"]
    return [_plan(stage, tokenizer, root, part) for part in parts]


def _plan(stage: Stage, tokenizer: Any, root: Path, part: Part) -> _Job:
    check_tokenizer(tokenizer)
    train = stage.train if isinstance(stage.train, dict) else stage.train.model_dump()
    max_length, packing = train.get("max_length", 1024), bool(train.get("packing", False))
    if packing and max_length is None:
        raise UserError(f"stages.{stage.name}.train: packing needs max_length, the length of a packed row.")
    weights = (train.get("loss") or {}).get("weights")
    digest = tokenizer_hash(tokenizer, training_template(tokenizer))
    ends = make_plan(stage.data, digest, max_length, part, weights)
    settings = {"prompt_template", "completion_template", "system_prompt", "over_length", "mask_history"}
    identity = {
        "format": FORMAT_VERSION,
        "inputs": [node.key for node in ends],
        "recipe": {
            **stage.data.model_dump(include=settings),
            **{"max_length": max_length, "packing": packing},
            **({"weights": weights} if weights else {}),
        },
        "tokenizer": digest,
    }
    return _Job(stage.data, ends, identity, root, tokenizer, train.get("dataset_num_proc"))


def _make(job: _Job, engine: Engine, progress: Progress) -> dict[str, Any]:
    path = saved_tokenizer(job.root, job.tokenizer, job.identity["tokenizer"])
    builder = Builder(job.root, engine, path, job.data.seed, job.data.max_bad_fraction, progress)
    passes = builder.build(job.ends)
    files = [
        documents_path(builder.built[end.key].folder, number)
        for end in job.ends
        for number in range(len(builder.built[end.key].shards))
    ]
    recipe = job.identity["recipe"]
    capacity = recipe["max_length"] if recipe["packing"] else None
    with store.building(job.root, job.key) as folder:
        passes_at, weighted = job.root / STEPS_FOLDER, "weights" in recipe
        tasks, documents = plan_rows(folder, passes_at, files, capacity, engine.workers, weighted)
        shards = write_all(engine.run, tasks, progress)
        manifest = _manifest(job, passes, documents, shards, tasks[-1].end)
        write_sealed(folder / FUNNEL_FILE, {"steps": manifest["steps"], "total": manifest["funnel"]})
        # Before the rows are in place: a run that is killed in between makes the last passes again.
        _tidy(builder, job.ends)
        store.commit(job.root, job.key, folder, manifest)
    return manifest


def _manifest(
    job: _Job, passes: list[Built], documents: Documents, shards: list[dict[str, Any]], packs: int
) -> dict[str, Any]:
    lengths, entries = documents.column("length"), funnel_entries(passes)
    funnel = totals(entries)
    if funnel["kept"] != len(lengths):
        raise AssertionError(f"{funnel['kept']} rows went on to be packed, and {len(lengths)} were: one was lost")
    return {
        "key": job.key,
        **{name: job.identity[name] for name in ("format", "recipe", "tokenizer")},
        "inputs": [_leaf(built, node) for built in passes for node in built.made.nodes if node.step == READ],
        "steps": entries,
        "passes": [built.made.key for built in passes],
        "sambay_sft": sft.__version__,
        "funnel": funnel,
        "rows": funnel["rows"],
        "documents": len(lengths),
        "packs": packs,
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(documents.column("supervised").sum()),
        "top_k": int(documents.column("top_k").max(initial=0)),
        "max_document_length": int(lengths.max(initial=0)),
        "shards": shards,
    }


def _leaf(built: Built, node: Node) -> dict[str, Any]:
    """A source: its name, what its content is keyed by, its licence, columns, and rows read."""
    assert node.opened is not None and node.reading is not None
    rows = built.accounts[0]["taken"]["rows"]
    told = {"source": node.opened.name, **node.opened.identity, "license": node.reading.source.license}
    mapping = node.reading.mapping
    columns = {"columns": mapping.described() if mapping else {}, "unread": list(node.reading.unread)}
    return {**told, **columns, "rows": rows}


def _tidy(builder: Builder, ends: list[Node]) -> None:
    """Remove what the rows alone were made from: where the documents' tokens are, if no step comes in between."""
    for end in ends:
        folder = builder.built[end.key].folder
        for pattern in ("tokens-*", "documents-*"):
            for path in folder.glob(pattern):
                path.unlink()


def saved_tokenizer(root: Path, tokenizer: Any, digest: str) -> str:
    """The folder under `root` where the tokenizer is saved, for worker processes to load."""
    folder = root / STEPS_FOLDER / "tokenizers" / digest[:32]
    if not folder.is_dir():
        with store.writable(root):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
            tokenizer.save_pretrained(temporary)
            try:
                os.rename(temporary, folder)
            except OSError:  # another process was faster
                shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)
