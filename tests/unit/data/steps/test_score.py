"""The step `score`: the student beside the teacher, sentence by sentence."""

from __future__ import annotations

import json
import math
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from score_toys import answer_logprobs, save_student, sentence_probability, tiny_tokenizer
from step_toys import context, entry, record, run_rows, run_table
from tiny_sambay import tiny_model

from sft.data.read.outcomes import Dropped, Kept
from sft.data.read.record import Record
from sft.data.steps import step_class
from sft.data.steps.context import Templates
from sft.data.steps.score.step import Score
from sft.data.steps.score.token_scores import TokenScorer
from sft.data.text.sentences import sentence_spans
from sft.models.load import load_checkpoint
from sft.recipe.steps import StepEntry
from sft.tokenizers.load import load_tokenizer
from sft.utils.errors import UserError

REASONING = [
    "a = 1 + 1. b = a + 2.\nSo b = 4.",
    "Let c be 3. Then c + 4 = 7! Is it? Yes.",
    "We add 2 and 3.\nWe get 5.\n\nDone.",
    "No thought is needed here.",
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"), tiny_tokenizer())


def rows(tokenizer: Any, count: int = 4, seed: int = 0) -> list[Record]:
    """Rows whose teacher wrote them with `tokenizer`, with random probabilities."""
    random, made = np.random.default_rng(seed), []
    for number in range(count):
        text = f"<think>\n{REASONING[number % 4]}\n</think>\n\nThe answer is {number}. Good."
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        logprobs = [math.log(p) for p in random.uniform(0.001, 1, len(ids)) ** random.uniform(0, 12)]
        made.append(record(f"What is {number}?", text, id=f"r{number}", teacher_ids=ids, teacher_logprobs=logprobs))
    return made


def expected(item: Record, model: Any, tokenizer: Any, teacher_tokenizer: Any, margin: float) -> dict[str, Any]:
    """The facts by brute force: each sentence, each token, without the step's code (but for where sentences end)."""
    text = item.completion or ""
    student = answer_logprobs(model, tokenizer, item.messages or [])
    encoding = teacher_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    assert encoding.ids == item.teacher_ids
    teacher = [(*offsets, value) for offsets, value in zip(encoding.offsets, item.teacher_logprobs or [], strict=True)]
    pairs = []
    for sentence in sentence_spans(text):
        if text[slice(*sentence)].strip() not in ("<think>", "</think>"):
            own = [_spoken(text, tokens) for tokens in (teacher, student)]
            of_teacher, of_student = (sentence_probability(text, sentence, tokens) for tokens in own)
            assert of_teacher is not None and of_student is not None
            pairs.append((of_teacher, of_student))
    gaps = [of_teacher - of_student for of_teacher, of_student in pairs]
    return {
        "tokens": len(student),
        "student_mean_logprob": np.mean([score for *_, score in student]),
        "sentences": len(pairs),
        "teacher": sum(gap > margin for gap in gaps),
        "student": sum(gap < -margin for gap in gaps),
        "shared": sum(abs(gap) <= margin for gap in gaps),
        "teacher_share": np.mean([gap > margin for gap in gaps]),
        "mean_gap": np.mean(gaps),
        "per_sentence": {"teacher": [p for p, _ in pairs], "student": [p for _, p in pairs]},
    }


def _spoken(text: str, tokens: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """Those that aren't part of a tag or of the white space around it: data sets put both there, not the teacher."""
    tags = [match.span() for match in re.finditer(r"\s*</?think>\s*", text)]
    return [token for token in tokens if not any(start <= token[0] and token[1] <= end for start, end in tags)]


def check(outcome: Any, wanted: dict[str, Any]) -> None:
    assert isinstance(outcome, Kept)
    facts = json.loads(json.dumps(outcome.record.facts["score"]))
    sentences, own = wanted.pop("per_sentence"), facts.pop("per_sentence")
    assert {key: facts[key] for key in wanted} == pytest.approx(wanted, rel=2e-6, abs=2e-6)
    for name in ("teacher", "student"):
        np.testing.assert_allclose(own[name], sentences[name], atol=6e-5)


def test_facts_are_what_brute_force_finds(tmp_path: Path, student: Path) -> None:
    tokenizer, margin = tiny_tokenizer(), 0.0005
    items = rows(tokenizer, 8)
    settings = {"model": str(student), "margin": margin, "keep_sentences": True, "batch_tokens": 150}
    outcomes = run_rows("score", items, context(tmp_path / "c", tokenizer=str(student)), **settings)
    model = load_checkpoint(str(student), dtype="float32")
    for item, outcome in zip(items, outcomes, strict=True):
        check(outcome, expected(item, model, tokenizer, tokenizer, margin))
        facts = item.facts["score"]
        assert facts["same_tokens"] == 1.0
        assert facts["teacher"] + facts["shared"] + facts["student"] == facts["sentences"]
    kinds = {name: sum(item.facts["score"][name] for item in items) for name in ("teacher", "shared", "student")}
    assert all(kinds.values()), kinds


def test_a_teacher_of_another_vocabulary_is_compared_by_characters(
    tmp_path: Path, student: Path, shared_dir: Path
) -> None:
    phi = shared_dir / "models" / "Phi-4-mini-flash-reasoning"
    teacher = load_tokenizer(str(phi))
    items = rows(teacher)
    settings = {"model": str(student), "margin": 0.1, "keep_sentences": True, "teacher_tokenizer": str(phi)}
    outcomes = run_rows("score", items, context(tmp_path / "c", tokenizer=str(student)), **settings)
    model = load_checkpoint(str(student), dtype="float32")
    for item, outcome in zip(items, outcomes, strict=True):
        check(outcome, expected(item, model, tiny_tokenizer(), teacher, 0.1))
        assert 0 < item.facts["score"]["same_tokens"] < 1


def test_real_answers_with_the_real_vocabulary_line_up_token_by_token(tmp_path: Path, shared_dir: Path) -> None:
    """GSM8K's solutions as gpt-oss would have written them: in harmony, with o200k ids."""
    from sft.data.steps.score.teacher_tokens import HARMONY

    mark = {name: number for number, name in HARMONY.items()}
    tokenizer = load_tokenizer(str(shared_dir / "models" / "Phi-4-mini-flash-reasoning"))
    folder = save_student(tmp_path / "student", tokenizer)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    items = []
    lines = (shared_dir / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:5]
    for number, line in enumerate(lines):
        value = json.loads(line)
        thought, _, final = value["answer"].partition("\n#### ")
        header = [mark["<|end|>"], mark["<|start|>"], *encode("assistant"), mark["<|channel|>"], *encode("final")]
        ids = [*encode(thought), *header, mark["<|message|>"], *encode(f"\\boxed{{{final}}}"), mark["<|return|>"]]
        text = f"<think>\n{thought}\n</think>\n\n\\boxed{{{final}}}"
        logprobs = [-0.1] * len(ids)
        items.append(record(value["question"], text, id=str(number), teacher_ids=ids, teacher_logprobs=logprobs))
    place = context(tmp_path / "c", tokenizer=str(folder))
    outcomes = run_rows("score", items, place, model=str(folder), keep_sentences=True)
    model = load_checkpoint(str(folder), dtype="float32")
    for item, outcome in zip(items, outcomes, strict=True):
        assert isinstance(outcome, Kept)
        facts = item.facts["score"]
        # All but, at most, the thought's last: before a tag the student may write ".\\n" as one token.
        assert facts["same_tokens"] >= 1 - 1.01 / (len(item.teacher_ids or []) - 7)
        assert facts["teacher_mean_logprob"] == pytest.approx(-0.1)
        assert facts["per_sentence"]["teacher"] == pytest.approx([math.exp(-0.1)] * facts["sentences"], abs=6e-5)
        own = [score for *_, score in answer_logprobs(model, tokenizer, item.messages or [])]
        assert facts["tokens"] == len(own)
        assert facts["student_mean_logprob"] == pytest.approx(np.mean(own), rel=2e-6)
        # Thinking and answer are compared, the two lines with tags are not.
        assert facts["sentences"] == len(sentence_spans(item.completion or "")) - 2


def test_rows_that_cannot_be_compared_are_dropped_with_the_reason(tmp_path: Path, student: Path) -> None:
    tokenizer = tiny_tokenizer()
    good, silent, other, short, broken, problem, long = rows(tokenizer, 7)
    silent.teacher_logprobs = None
    other.messages = [*(other.messages or [])[:1], {"role": "assistant", "content": "Something else. It is 5."}]
    short.teacher_logprobs = (short.teacher_logprobs or [])[:-1]
    assert broken.teacher_logprobs
    broken.teacher_logprobs[3] = float("nan")
    problem.messages = None
    long.messages = [{"role": "user", "content": "1 " * 400}, *(long.messages or [])[1:]]
    items = [good, silent, other, short, broken, problem, long]
    place = context(tmp_path / "c", tokenizer=str(student))
    outcomes = run_rows("score", items, place, model=str(student), max_tokens=300)
    assert [outcome.record.id for outcome in outcomes] == [item.id for item in items]
    assert isinstance(outcomes[0], Kept)
    reasons = [outcome.reason for outcome in outcomes if isinstance(outcome, Dropped)]
    assert reasons == [
        "no_teacher_logprobs",
        "tokens_do_not_match",
        "tokens_do_not_match",
        "bad_logprobs",
        "no_conversation",
        "too_long",
    ]
    assert isinstance(outcomes[2], Dropped) and "the answer has 'Something" in outcomes[2].detail
    assert isinstance(outcomes[6], Dropped) and int(outcomes[6].detail.split()[0]) > 300


def test_without_a_required_teacher_rows_keep_the_students_figures(tmp_path: Path, student: Path) -> None:
    items = rows(tiny_tokenizer(), 2)
    items[0].teacher_ids = items[0].teacher_logprobs = None
    place = context(tmp_path / "c", tokenizer=str(student))
    outcomes = run_rows("score", items, place, model=str(student), required=False)
    assert all(isinstance(outcome, Kept) for outcome in outcomes)
    facts = items[0].facts["score"]
    assert set(facts) == {"tokens", "student_mean_logprob", "no_comparison"}
    assert facts["no_comparison"].startswith("no_teacher_logprobs")
    assert "teacher_share" in items[1].facts["score"]


def test_what_a_template_puts_around_the_answer_does_not_count(tmp_path: Path, student: Path) -> None:
    (item,) = rows(tiny_tokenizer(), 1)
    plain = item.completion or ""
    item.messages = [*(item.messages or [])[:1], {"role": "assistant", "content": f"Hello. {plain} Goodbye."}]
    templates = Templates(completion_template="Hello. {completion} Goodbye.")
    place = context(tmp_path / "c", tokenizer=str(student), templates=templates)
    (outcome,) = run_rows("score", [item], place, model=str(student))
    assert isinstance(outcome, Kept)
    assert item.facts["score"]["sentences"] == len(sentence_spans(plain)) - 2


KILLED = """
import os, signal, sys
from pathlib import Path
from sft.data.steps.score.token_scores import TokenScorer
from step_toys import context, run_rows
from test_score import rows, tiny_tokenizer
calls, straight = [], TokenScorer.__call__
def dying(self, documents):
    calls.append(len(documents))
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return straight(self, documents)
TokenScorer.__call__ = dying
student, folder = sys.argv[1:]
run_rows("score", rows(tiny_tokenizer(), 24), context(Path(folder), tokenizer=student), model=student, batch_tokens=300)
"""


def test_a_killed_step_goes_on_within_its_shard(
    tmp_path: Path, student: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": str(student), "batch_tokens": 300}
    straight = run_rows(
        "score", rows(tiny_tokenizer(), 24), context(tmp_path / "a", tokenizer=str(student)), **settings
    )
    paths = f"{repo_root / 'tests' / 'support'}:{Path(__file__).parent}:{repo_root}"
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(student), str(tmp_path / "b")],
        env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    with sqlite3.connect(next((tmp_path / "b").glob("scores-*.sqlite"))) as database:
        (noted,) = database.execute("SELECT count(*) FROM found").fetchone()
    assert 0 < noted < 24

    scored: list[int] = []
    run = TokenScorer.__call__

    def counting(self: TokenScorer, documents: Any) -> Any:
        scored.append(len(documents))
        return run(self, documents)

    monkeypatch.setattr(TokenScorer, "__call__", counting)
    again = run_rows("score", rows(tiny_tokenizer(), 24), context(tmp_path / "b", tokenizer=str(student)), **settings)
    assert sum(scored) == 24 - noted
    facts = [[outcome.record.facts["score"] for outcome in outcomes] for outcomes in (straight, again)]
    assert facts[0] == facts[1]
    # And a third time nothing runs, not even the model is loaded.
    scored.clear()
    monkeypatch.setattr(Score, "_scorer", property(lambda self: pytest.fail("the model was loaded")))
    run_rows("score", rows(tiny_tokenizer(), 24), context(tmp_path / "b", tokenizer=str(student)), **settings)
    assert scored == []


def test_other_settings_or_other_teachers_do_not_reuse_what_was_found(tmp_path: Path, student: Path) -> None:
    place = context(tmp_path / "c", tokenizer=str(student))
    found = []
    for margin, seed in ((0.05, 0), (0.6, 0), (0.05, 1)):
        items = rows(tiny_tokenizer(), 4, seed)
        run_rows("score", items, place, model=str(student), margin=margin)
        found.append([item.facts["score"] for item in items])
    assert found[0] != found[1] and found[0] != found[2]


def test_the_weights_decide_the_identity(tmp_path: Path, student: Path) -> None:
    def identity(folder: Path, **settings: Any) -> Any:
        config = entry("score", model=str(folder), **settings).config
        return step_class("score").identity(config), step_class("score").settings(config)

    same = save_student(tmp_path / "same", tiny_tokenizer())
    other = save_student(tmp_path / "other", tiny_tokenizer(), seed=1)
    assert identity(student) == identity(same) != identity(other)
    assert identity(student) != identity(student, teacher_tokenizer=str(same))
    with pytest.raises(UserError, match="no model folder at /nowhere/model"):
        identity(Path("/nowhere/model"))
    (tmp_path / "other" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"model.safetensors is (cut off|broken)"):
        identity(other)


def test_a_student_of_another_vocabulary_is_refused(tmp_path: Path, student: Path) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["<|new|>"])
    other.save_pretrained(tmp_path / "other")
    (item,) = rows(other, 1)
    with pytest.raises(UserError, match="has another vocabulary than the tokenizer of this recipe"):
        run_rows("score", [item], context(tmp_path / "c", tokenizer=str(tmp_path / "other")), model=str(student))


@pytest.mark.parametrize(
    ("settings", "where"),
    [({}, "model"), ({"model": "m", "margin": 0.0}, "margin"), ({"model": "m", "batch_tokens": 0}, "batch_tokens")],
)
def test_settings_are_checked(settings: dict[str, Any], where: str) -> None:
    with pytest.raises(ValueError, match=where):
        StepEntry.model_validate({"score": settings})


# A world in which it is known which sentence is whose.
SAYINGS = {"student": "So we add one. ", "shared": "Now check it twice. ", "teacher": "Thus by lemma 7. "}
TEACHER_P = {"student": 0.04, "shared": 0.9, "teacher": 0.9}


def planted(tokenizer: Any, name: str, kinds: list[str]) -> Record:
    """An answer of sentences of known kinds; the teacher gives each token of a kind the same probability."""
    ids: list[int] = []
    logprobs: list[float] = []
    for kind in kinds:
        own = tokenizer.backend_tokenizer.encode(SAYINGS[kind], add_special_tokens=False).ids
        ids += own
        logprobs += [math.log(TEACHER_P[kind])] * len(own)
    text = "".join(SAYINGS[kind] for kind in kinds).strip()
    problem, _, _ = name.partition("-")
    return record(f"Problem {problem}", text, id=name, teacher_ids=ids, teacher_logprobs=logprobs)


@pytest.fixture(scope="module")
def schooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that has learned the student's and the shared sentences, and never saw a teacher's."""
    tokenizer, random = tiny_tokenizer(), np.random.default_rng(0)
    model = tiny_model(0, vocab_size=(len(tokenizer) + 63) // 64 * 64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(90):
        kinds = random.choice(["student", "shared"], 6)
        item = planted(tokenizer, f"{random.integers(100)}-x", list(kinds))
        text = tokenizer.apply_chat_template(item.messages, tokenize=False)
        ids = torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)[None]
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 90)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return save_student(tmp_path_factory.mktemp("schooled"), tokenizer, model.eval())


def test_the_answers_rich_in_teacher_sentences_are_found_and_picked(tmp_path: Path, schooled: Path) -> None:
    """At equal budget (one answer a problem) selection finds every planted answer; by chance it would find a third."""
    tokenizer, random = tiny_tokenizer(), np.random.default_rng(1)
    items, kinds_of, rich = [], {}, set()
    for problem in range(12):
        mixtures = [["teacher"] * 4 + ["shared"], ["student"] * 3 + ["shared", "teacher"], ["shared"] * 4 + ["student"]]
        order = random.permutation(3)
        for place in order:
            kinds = [str(kind) for kind in random.permutation(mixtures[place])]
            name = f"{problem}-{len(items)}"
            kinds_of[name] = kinds
            items.append(planted(tokenizer, name, kinds))
            if place == 0:
                rich.add(name)
    place = context(tmp_path / "c", tokenizer=str(schooled))
    outcomes = run_rows("score", items, place, model=str(schooled))
    assert all(isinstance(outcome, Kept) for outcome in outcomes)
    for item in items:
        facts = item.facts["score"]
        assert {kind: facts[kind] for kind in SAYINGS} == {kind: kinds_of[item.id].count(kind) for kind in SAYINGS}
        assert facts["teacher_share"] == pytest.approx(kinds_of[item.id].count("teacher") / 5)
    kept, dropped = run_table("select", items, context(tmp_path / "s"), per_problem=1, prefer=["teacher"])
    assert {item.id for item, _ in kept} == rich and len(dropped) == 24


def test_a_recipe_scores_in_its_shards_and_again_when_the_weights_change(
    tmp_path: Path, prepare: Any, write_rows: Any, toy: Any
) -> None:
    """Through the engine: rows come out in order, the work folder goes, and other weights are another key."""
    folder = save_student(tmp_path / "student", toy)
    path = write_rows([{"q": f"What is {n}?", "a": f"It is {n}. Good."} for n in range(10)])
    source = {"path": str(path), "columns": {"prompt": "q", "completion": "a"}}
    steps = [{"score": {"model": str(folder), "required": False}}]
    done = prepare([source], steps=steps)
    entries = [entry for entry in done.manifest["steps"] if entry["step"] == "score"]
    assert len(entries) == 1
    shards = sorted((done.path.parent / "steps").glob("*/kept-00000.parquet"), key=lambda file: file.stat().st_mtime_ns)
    facts = [json.loads(value)["score"] for value in pq.read_table(shards[-1])["facts"].to_pylist()]
    model = load_checkpoint(str(folder), dtype="float32")
    for number, own in enumerate(facts):
        messages = [{"role": "user", "content": f"What is {number}?"}]
        messages.append({"role": "assistant", "content": f"It is {number}. Good."})
        wanted = np.mean([score for *_, score in answer_logprobs(model, toy, messages)])
        assert own["student_mean_logprob"] == pytest.approx(wanted, rel=2e-6)
    assert not list((done.path.parent / "steps").glob("*/work"))
    save_student(folder, toy, seed=1)
    assert prepare([source], steps=steps).path != done.path
