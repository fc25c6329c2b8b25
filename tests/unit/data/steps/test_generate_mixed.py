"""The step `generate`, mixed policy: the student begins, the teacher finishes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from score_toys import save_student
from step_toys import context, record, run_rows
from teacher_server import Fault, Seen, TeacherServer, serving
from tiny_sambay import tiny_model

from sft.data.read.outcomes import Dropped, Outcome, Replaced
from sft.data.read.record import Record
from sft.data.steps.context import Context
from sft.data.steps.generate.answer import CHAT, Request
from sft.data.steps.generate.journal import Journal
from sft.data.steps.generate.local_student import LocalStudent
from sft.data.steps.generate.mixed import cut
from sft.data.steps.generate.step import Generate
from sft.generate import engine
from sft.recipe.steps.generate import Checkpoint, GenerateStep
from sft.tokenizers.load import load_tokenizer
from sft.utils.errors import UserError

QUESTION = "What is 2+2?"
REFERENCE = "<think>\nTwo and two make four.\n</think>\n\nThe answer is \\boxed{4}."
REST = " indeed, so four.\n</think>\n\nThe answer is \\boxed{4}."


def rambling(seen: Seen) -> dict[str, Any]:
    """A student that never ends, another one for each seed."""
    seed = seen.body.get("seed", 0)
    return {"content": "<think>\n" + " ".join(f"well{(seed + i) % 97} so" for i in range(300))}


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherServer]:
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(rambling) as running:
        running.model = "toy-student"
        yield running


@pytest.fixture
def teacher(student: TeacherServer) -> Iterator[TeacherServer]:
    with serving(lambda seen: {"content": REST}) as running:
        yield running


@pytest.fixture
def place(tmp_path: Path) -> Context:
    return context(tmp_path / "step", tokenizer="tiny", seed=3)


def rows(count: int) -> list[Record]:
    return [record(QUESTION, REFERENCE, id=f"p{i}") for i in range(count)]


def finish(
    big: TeacherServer, small: TeacherServer, place: Context, rows: list[Record], /, **settings: Any
) -> list[Outcome]:
    """The step with `big` as the teacher and `small` as the student."""
    teacher = {"base_url": big.base_url, "model": "big", "retry_delay": 0.02, **settings.pop("teacher", {})}
    student = {"base_url": small.base_url, "model": "small", "retry_delay": 0.02}
    return run_rows("generate", rows, place, mode="mixed", teacher=teacher, student=student, **settings)


def only(outcomes: list[Outcome]) -> Record | Dropped:
    (outcome,) = outcomes
    assert isinstance(outcome, Replaced)
    (made,) = outcome.kept or outcome.dropped
    return made


def said_by_student(student: TeacherServer, at: int = 0) -> str:
    return str(student.body(student.seen[at])["choices"][0]["message"]["content"])


def test_the_teacher_finishes_what_the_student_began(
    teacher: TeacherServer, student: TeacherServer, place: Context
) -> None:
    made = only(finish(teacher, student, place, rows(1)))
    assert isinstance(made, Record) and made.id == "p0#g0"
    tokenizer = place.tokenizer
    length = len(tokenizer(REFERENCE, add_special_tokens=False)["input_ids"])
    assert student.seen[0].path == "/v1/chat/completions" and student.seen[0].body["max_tokens"] == int(1.5 * length)
    begun, facts = said_by_student(student), made.facts["generate"]
    prefix = begun[: facts["prefix_characters"]]
    assert made.messages == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": prefix + REST}]
    # The published template, written out.
    asked = teacher.seen[0]
    assert asked.path == "/v1/completions"
    assert asked.body["prompt"] == f"<|user|>{QUESTION}<|end|><|assistant|>{prefix}"
    assert asked.body["max_tokens"] == 32768
    whole, kept = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (begun, prefix))
    assert whole / 2 < kept < whole
    assert facts["student"]["finish_reason"] == "length" and facts["student"]["model"] == "toy-student"
    assert facts["student"]["completion_tokens"] == int(1.5 * length)
    assert facts["teacher"]["finish_reason"] == "stop" and facts["teacher"]["seed"] != facts["student"]["seed"]
    assert made.tokens and made.trained
    models = json.loads((place.folder / "usage.json").read_text())["models"]
    assert models["student"]["answers"] == models["teacher"]["answers"] == 1


def test_chat_continuation_asks_for_an_open_message(
    teacher: TeacherServer, student: TeacherServer, place: Context
) -> None:
    made = only(finish(teacher, student, place, rows(1), continuation="chat"))
    assert isinstance(made, Record) and made.completion is not None
    (asked,) = teacher.seen
    prefix = said_by_student(student)[: made.facts["generate"]["prefix_characters"]]
    assert asked.path == "/v1/chat/completions"
    assert asked.body["continue_final_message"] is True and asked.body["add_generation_prompt"] is False
    assert asked.body["messages"] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": prefix},
    ]
    assert made.completion == prefix + REST


def test_answers_that_the_student_finishes_are_dropped(
    teacher: TeacherServer, student: TeacherServer, place: Context
) -> None:
    student.reply = lambda seen: {"content": "It is 4."}
    made = only(finish(teacher, student, place, rows(1)))
    assert isinstance(made, Dropped) and made.reason == "student_finished"
    assert made.record.completion == "It is 4." and not teacher.seen


def test_cuts_lie_beyond_half_everywhere_and_depend_on_seed_and_row(
    teacher: TeacherServer, student: TeacherServer, tmp_path: Path
) -> None:
    student.reply = lambda seen: {"content": " ".join(f"step{i % 10}" for i in range(500))}
    shares: list[list[float]] = []
    for seed in (0, 0, 1):
        place = context(tmp_path / str(len(shares)), tokenizer="tiny", seed=seed)
        asked = [record(f"{QUESTION} ({i})", REFERENCE, id=f"p{i}") for i in range(60)]
        outcomes = finish(teacher, student, place, asked, n=2)
        made = [item for outcome in outcomes if isinstance(outcome, Replaced) for item in outcome.kept]
        whole = len(said_by_student(student))
        shares.append([item.facts["generate"]["prefix_characters"] / whole for item in made])
    assert shares[0] == shares[1] != shares[2]
    # Of a uniform share in (1/2, 1) the mean is 3/4, with a standard error of 0.144 / sqrt(120) = 0.013.
    assert min(shares[0]) > 0.49 and max(shares[0]) < 1 and abs(sum(shares[0]) / 120 - 0.75) < 0.05
    assert len(set(shares[0])) > 60


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"content": "one two three four five six seven"}, "truncated"),
        ({"content": "  "}, "no_answer"),
        ({"content": " and so on.\n</think>\n"}, "no_answer"),
        ({"content": "<think>\nLet me see.\n</think>\n\n4"}, "restarted"),
        ({"content": "so <|end|> it is </think> 4"}, "control_token"),
    ],
)
def test_continuations_that_cannot_be_learned(
    teacher: TeacherServer, student: TeacherServer, place: Context, reply: dict[str, Any], reason: str
) -> None:
    teacher.reply = lambda seen: reply
    made = only(finish(teacher, student, place, rows(1), max_tokens=6))
    assert isinstance(made, Dropped) and made.reason == reason


def test_a_truncated_continuation_may_be_kept(teacher: TeacherServer, student: TeacherServer, place: Context) -> None:
    teacher.reply = lambda seen: {"content": " one two three four five six seven"}
    made = only(finish(teacher, student, place, rows(1), max_tokens=6, truncated="keep"))
    assert isinstance(made, Record) and made.completion is not None
    assert made.completion.endswith(" one two three four five six")


def test_reasoning_that_comes_apart_goes_on_from_the_prefix(
    teacher: TeacherServer, student: TeacherServer, tmp_path: Path
) -> None:
    teacher.reply = lambda seen: {"reasoning_content": " more thought\n", "content": "\n\nIt is 4."}
    settings: dict[str, Any] = {"continuation": "chat"}
    made = only(finish(teacher, student, context(tmp_path / "open", tokenizer="tiny"), rows(1), **settings))
    assert isinstance(made, Record) and made.completion is not None
    prefix = said_by_student(student)[: made.facts["generate"]["prefix_characters"]]
    assert made.completion == f"{prefix} more thought\n</think>\n\nIt is 4."
    # After the thinking, new thinking is a new answer.
    student.reply = lambda seen: {"content": "<think>\nhm\n</think>\n\n" + "so " * 300}
    made = only(finish(teacher, student, context(tmp_path / "closed", tokenizer="tiny"), rows(1), **settings))
    assert isinstance(made, Dropped) and made.reason == "restarted"


def test_marks_of_the_teacher_are_translated_both_ways(
    teacher: TeacherServer, student: TeacherServer, place: Context
) -> None:
    final = "<|end|><|start|>assistant<|channel|>final<|message|>"
    marks = {"<think>\n": "<|channel|>analysis<|message|>", "\n</think>\n\n": final}
    teacher.reply = lambda seen: {"content": f" four{final}It is \\boxed{{4}}."}
    made = only(finish(teacher, student, place, rows(1), teacher={"marks": marks}))
    assert isinstance(made, Record) and made.completion is not None
    prefix = said_by_student(student)[: made.facts["generate"]["prefix_characters"]]
    theirs = "<|channel|>analysis<|message|>" + prefix.removeprefix("<think>\n")
    assert teacher.seen[0].body["prompt"] == f"<|user|>{QUESTION}<|end|><|assistant|>{theirs}"
    assert made.completion == f"{prefix} four\n</think>\n\nIt is \\boxed{{4}}."


def test_the_prompt_is_the_teachers_own(teacher: TeacherServer, student: TeacherServer, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    other = load_tokenizer("tiny")
    bos = other.bos_token
    other.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]<think>\n"
    )
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, other.bos_token_id)]
    )
    other.save_pretrained(tmp_path / "other")
    settings = {"teacher": {"tokenizer": str(tmp_path / "other")}}
    made = only(finish(teacher, student, context(tmp_path / "step", tokenizer="tiny"), rows(1), **settings))
    assert isinstance(made, Record) and made.completion is not None
    prefix = said_by_student(student)[: made.facts["generate"]["prefix_characters"]]
    # No second beginning of text (the server adds it), and no second <think> (the template ends in one).
    assert (
        teacher.seen[0].body["prompt"]
        == f"[user]{QUESTION}[assistant]<think>\n{prefix.removeprefix('<think>' + chr(10))}"
    )
    assert made.completion == prefix + REST
    config = GenerateStep.model_validate(
        {"mode": "mixed", "student": {"base_url": "http://h", "model": "m"}}
        | {"teacher": {"base_url": "http://h", "model": "m", **settings["teacher"]}}
    )
    assert "tokenizer.json" in Generate.identity(config)["teacher_tokenizer"]


def test_a_stopped_run_asks_neither_twice(teacher: TeacherServer, student: TeacherServer, place: Context) -> None:
    teacher.faults = [Fault(401, message="no key")]
    with pytest.raises(UserError, match="401"):
        finish(teacher, student, place, rows(4))
    journaled = next(place.folder.glob("*/answers-0000.jsonl")).read_text().count('"who": "student"')
    before, teacher.faults = len(student.seen), []
    outcomes = finish(teacher, student, place, rows(4))
    assert all(isinstance(outcome, Replaced) and outcome.kept for outcome in outcomes)
    assert journaled >= 1 and len(student.seen) - before == 4 - journaled
    lines = [json.loads(line) for path in place.folder.glob("*/answers-*.jsonl") for line in path.open()]
    assert sorted(line["who"] for line in lines) == ["student"] * 4 + ["teacher"] * 4


def test_rows_without_an_answer_have_no_length_to_go_by(
    teacher: TeacherServer, student: TeacherServer, place: Context
) -> None:
    made = only(finish(teacher, student, place, [record(QUESTION, None, id="p0")]))
    assert isinstance(made, Dropped) and made.reason == "no_conversation" and not student.seen


def test_a_failing_student_or_teacher_is_told_apart(
    teacher: TeacherServer, student: TeacherServer, tmp_path: Path
) -> None:
    for name, server in (("student", student), ("teacher", teacher)):
        server.faults = [Fault(400, message="no")]
        made = only(finish(teacher, student, context(tmp_path / name, tokenizer="tiny"), rows(1)))
        assert isinstance(made, Dropped) and (made.reason, made.detail) == (
            "request_failed",
            f"{name}: refused (400): no",
        )
        server.faults = []


def test_cuts_fall_between_tokens_and_characters(shared_dir: Path) -> None:
    phi = load_tokenizer(str(shared_dir / "models" / "Phi-4-mini-flash-reasoning"))
    first = json.loads((shared_dir / "data" / "gsm8k" / "train.jsonl").open().readline())
    for text in (first["answer"], "  indented\n\n\n code   and — 🙂🙃 𝔽𝔾ℍ naïve ∑∏ 数学です。\n\n"):
        ids = phi(text, add_special_tokens=False)["input_ids"]
        ends = {len(phi.decode(ids[:k]).encode()) for k in range(len(ids)) if "\ufffd" not in phi.decode(ids[:k])}
        prefixes = [cut(phi, text, i / 200) for i in range(200)]
        for prefix in prefixes:
            assert prefix is not None and text.startswith(prefix) and prefix != text
            assert len(prefix.encode()) in ends
        shortest, longest = prefixes[0], prefixes[-1]
        assert shortest is not None and longest is not None
        assert len(phi.decode(ids[: len(ids) // 2])) < len(shortest) < len(longest)
        if text.isascii():
            assert longest == phi.decode(ids[:-1]) and shortest == phi.decode(ids[: len(ids) // 2 + 1])
    assert cut(phi, "4", 0.5) is None and cut(phi, "", 0.5) is None


def test_a_checkpoint_answers_as_the_student(teacher: TeacherServer, student: TeacherServer, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    size = (len(tokenizer) + 63) // 64 * 64
    model = tiny_model(vocab_size=size)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    place = context(tmp_path / "step", tokenizer="tiny")
    settings = {
        "mode": "mixed",
        "temperature": 0.0,
        "teacher": {"base_url": teacher.base_url, "model": "big"},
        "student": {"checkpoint": str(tmp_path / "student"), "dtype": "float32", "batch_size": 2},
    }
    some = [record(f"{QUESTION} {i}", REFERENCE[: 20 + 7 * i], id=f"p{i}") for i in range(3)]
    outcomes = run_rows("generate", some, place, **settings)
    for row, outcome in zip(some, outcomes, strict=True):
        assert isinstance(outcome, Replaced)
        (made,) = [*outcome.kept, *(dropped.record for dropped in outcome.dropped)]
        limit = int(1.5 * len(tokenizer(row.completion, add_special_tokens=False)["input_ids"]))
        greedy, ended = _greedy(model, tokenizer, f"<|user|>{row.problem}<|end|><|assistant|>", limit)
        assert made.facts["generate"]["student"]["finish_reason"] == ("stop" if ended else "length")
        assert made.facts["generate"]["student"]["completion_tokens"] == len(greedy)
        prefix = (made.completion or "")[: made.facts["generate"].get("prefix_characters")]
        assert prefix and tokenizer.decode(greedy).startswith(prefix)
    assert any(isinstance(outcome, Replaced) and outcome.kept for outcome in outcomes)
    lines = next(place.folder.glob("*/answers-0000.jsonl")).read_text()
    assert run_rows("generate", some, place, **settings) == outcomes
    assert next(place.folder.glob("*/answers-0000.jsonl")).read_text() == lines and not student.seen
    assert len(list(place.folder.glob("*/answers-*"))) == 1, "everything was in the journal"


def test_a_checkpoint_that_was_moved_says_the_same(teacher: TeacherServer, tmp_path: Path) -> None:
    """What is sampled follows from what the checkpoint holds, and what it has said is looked up from anywhere."""
    tokenizer = load_tokenizer("tiny")
    save_student(tmp_path / "here", tokenizer)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    said = []
    for folder, step in (("here", "one"), ("there", "one"), ("there", "two")):
        settings = {
            "mode": "mixed",
            "temperature": 1.0,
            "teacher": {"base_url": teacher.base_url, "model": "big"},
            "student": {"checkpoint": str(tmp_path / folder), "dtype": "float32"},
        }
        place = context(tmp_path / step, tokenizer="tiny")
        said.append(run_rows("generate", [record(QUESTION, REFERENCE)], place, **settings))
    rows = [
        [*outcome.kept, *(dropped.record for dropped in outcome.dropped)]
        for (outcome,) in said
        if isinstance(outcome, Replaced)
    ]
    texts = [made.completion for (made,) in rows]
    assert texts[0] == texts[1] == texts[2]
    assert len(list((tmp_path / "one").rglob("answers-*.jsonl"))) == 1, "the second time all was in the journal"


def test_each_answer_has_its_own_limit_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are decoded together up to the largest limit: one that ended beyond its own was cut off before."""
    journal = Journal(tmp_path, lambda number, line: None)
    student = LocalStudent(Checkpoint(checkpoint="toy"), journal)
    tokenizer = load_tokenizer("tiny")
    monkeypatch.setattr(student, "_load", lambda: (None, tokenizer))
    ids = tokenizer("2 + 2 = 4", add_special_tokens=False)["input_ids"]

    def generate(model: Any, tokenizer: Any, prompts: Any, *, on_done: Any, **sampling: Any) -> None:
        assert sampling["max_new_tokens"] == len(ids)
        for index in range(len(prompts)):
            on_done(index, engine.Generation(ids, finished=True))

    monkeypatch.setattr(engine, "generate_batch", generate)
    messages = [{"role": "user", "content": QUESTION}]
    sampling = {"temperature": 0.0, "top_p": 1.0}
    requests = [
        Request("student", CHAT, {"messages": messages, "max_tokens": limit, **sampling}, 0)
        for limit in (len(ids) - 2, len(ids))
    ]
    student.prepare(requests)
    cut_off, whole = journal.get(requests[0]), journal.get(requests[1])
    assert cut_off is not None and whole is not None
    assert cut_off.truncated and cut_off.content == tokenizer.decode(ids[:-2])
    assert not whole.truncated and whole.content == tokenizer.decode(ids)


def _greedy(model: Any, tokenizer: Any, prompt: str, limit: int) -> tuple[list[int], bool]:
    """The likeliest token again and again, without a cache."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start, ends = len(ids), {0, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
    with torch.no_grad():
        while len(ids) - start < limit:
            following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if following in ends:
                return ids[start:], True
            ids.append(following)
    return ids[start:], False


def test_a_missing_checkpoint_is_told_before_anything_runs(tmp_path: Path) -> None:
    config = GenerateStep.model_validate(
        {"mode": "mixed", "teacher": {"base_url": "http://h", "model": "m"}, "student": {"checkpoint": "./nothere"}}
    )
    with pytest.raises(UserError, match=r"names \./nothere, and there is no such folder"):
        Generate.identity(config)
