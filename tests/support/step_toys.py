"""Runs one step on a few records, as the engine does."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft.data.pack.tokens import TokensWriter
from sft.data.read.outcomes import Dropped, Kept, Outcome, Replaced
from sft.data.read.record import Record, text_hash
from sft.data.steps import RowStep, TableStep, step_class
from sft.data.steps.context import Context, Templates
from sft.data.steps.tokenize import Tokenize, TokenizeSettings
from sft.recipe.steps import StepEntry
from sft.tokenizers.tiny import build_tokenizer


def record(
    problem: str = "What is 2+2?", completion: str | None = "<think>\n2+2=4\n</think>\n\n\\boxed{4}", **fields: Any
) -> Record:
    """A row with a problem and, unless `completion` is None, its answer; `tokens` is the number of words."""
    name = fields.pop("id", f"r{text_hash(f'{problem} {completion}') % 10**8}")
    messages = None
    if completion is not None:
        messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": completion}]
        fields.setdefault("tokens", len((problem + " " + completion).split()))
        fields.setdefault("trained", len(completion.split()))
    values = {"source": "toy", "place": f"toy.jsonl:{name}", "problem": problem, "problem_id": problem, **fields}
    return Record(id=name, messages=messages, **values)


def context(folder: Path, *, tokenizer: str = "", seed: int = 0, templates: Templates | None = None) -> Context:
    """What a step gets from the engine. `tokenizer` is a folder, or `tiny`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Context(_saved_tiny() if tokenizer == "tiny" else tokenizer, templates or Templates(), seed, folder, folder)


@cache
def _saved_tiny() -> str:
    """A folder with the built-in tokenizer: steps load it as a stage saved it."""
    folder = tempfile.mkdtemp(prefix="tiny-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build_tokenizer().save_pretrained(folder)
    return folder


def entry(name: str, **settings: Any) -> StepEntry:
    """The recipe's entry for a step."""
    return StepEntry.model_validate({name: settings})


def run_rows(name: str, records: Sequence[Record], place: Context, **settings: Any) -> list[Outcome]:
    """Outcomes of a RowStep, in order; where it changes texts and there is a tokenizer, each is tokenised after it."""
    step = step_class(name)(entry(name, **settings).config, place)
    assert isinstance(step, RowStep)
    try:
        outcomes = list(step(list(records)))
    finally:
        step.close()
    return _tokenized(outcomes, place) if step.changes_text and place.tokenizer_path else outcomes


def _tokenized(outcomes: list[Outcome], place: Context) -> list[Outcome]:
    """The outcomes with tokens; what can't be tokenised is dropped."""
    step = Tokenize(TokenizeSettings(), place)
    step.sink = TokensWriter(place.folder / "tokens.arrow")
    found: list[Outcome] = []
    for outcome in outcomes:
        if isinstance(outcome, Kept):
            found += step([outcome.record])
        elif isinstance(outcome, Replaced):
            made = list(step(outcome.kept))
            kept = [one.record for one in made if isinstance(one, Kept)]
            found.append(
                Replaced(outcome.record, kept, [*outcome.dropped, *(d for d in made if isinstance(d, Dropped))])
            )
        else:
            found.append(outcome)
    step.sink.abandon()
    for outcome in found:
        for row in [outcome.record] if isinstance(outcome, Kept) else getattr(outcome, "kept", []):
            row.tokens_at = row.encoded = None
    return found


def run_table(
    name: str, records: Sequence[Record], place: Context, *, shards: int = 1, **settings: Any
) -> tuple[list[tuple[Record, int]], list[Dropped]]:
    """(kept records with their copies, dropped ones) of a TableStep; the records are spread over `shards` sketches."""
    step = step_class(name)(entry(name, **settings).config, place)
    assert isinstance(step, TableStep)
    files, start = [], 0
    for number in range(shards):
        part = list(records[number::shards])
        table = step.sketch(part)
        rows = pa.array(range(start, start + len(part)), pa.int64())
        files.append(place.folder / f"sketch-{number}.parquet")
        pq.write_table(table.add_column(0, "row", rows), files[-1])
        start += len(part)
    scratch = place.folder / "scratch"
    scratch.mkdir(exist_ok=True)
    target = place.folder / "verdicts.parquet"
    step.decide(files, target, scratch)
    step.close()
    verdicts = {verdict["row"]: verdict for verdict in pq.read_table(target).to_pylist()}
    ordered = [item for number in range(shards) for item in records[number::shards]]
    kept, dropped = [], []
    for row, item in enumerate(ordered):
        verdict = verdicts.get(row, {"copies": 1, "facts": None})
        if verdict["facts"]:
            item.facts[name] = json.loads(verdict["facts"])
        if verdict["copies"] == 0:
            dropped.append(Dropped(item, verdict["reason"], verdict["detail"] or ""))
        else:
            kept.append((item, verdict["copies"]))
    return kept, dropped
