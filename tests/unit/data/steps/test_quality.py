"""The step `quality`: good traces pass, planted defects are caught."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cpu_limit import at_most
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from step_toys import context, entry, record, run_rows

from sft.data.read.outcomes import Dropped, Outcome
from sft.data.read.record import Record
from sft.data.steps import step_class

GOOD = "<think>\nTwo and two are four. Let me check: 2+2=4.\n</think>\n\nThe answer is \\boxed{4}."


def judge(folder: Path, records: Sequence[Record], **settings: Any) -> list[Outcome]:
    """Outcomes of `quality`."""
    return run_rows("quality", records, context(folder), **settings)


def reason(folder: Path, completion: str, problem: str = "What is 2+2?", **settings: Any) -> str | None:
    """Why one completion is dropped, or None."""
    (outcome,) = judge(folder, [record(problem, completion)], **settings)
    return outcome.reason if isinstance(outcome, Dropped) else None


@pytest.mark.parametrize(
    ("completion", "settings", "expected"),
    [
        (GOOD, {"answer": "boxed"}, None),
        ("<think>\nTwo and two", {}, "think_not_closed"),
        ("<think>\nTwo and two", {"think": "optional"}, "think_not_closed"),
        ("<think>a</think>b</think>c", {"think": "optional"}, "broken_think"),
        ("First. <think>a</think>b", {"think": "optional"}, "broken_think"),
        ("It is 4.", {}, "no_think"),
        ("It is 4.", {"think": "optional"}, None),
        ("<think>\n\n</think>\n\nIt is 4.", {}, "no_think"),
        ("a</think>It is 4.", {}, "no_think"),
        ("<thinking>a</thinking>It is 4.", {}, "no_think"),
        ("<thinking>a</thinking>It is 4.", {"think": "optional"}, None),
        ("<think>a</think>\n", {}, "no_answer"),
        ("<think>a</think>\n", {"answer": "none"}, None),
        ("<think>\\boxed{4}</think>It is 4.", {"answer": "boxed"}, "no_answer"),
        ("<think>a</think>It is \\boxed{}.", {"answer": "boxed"}, "no_answer"),
        ("<think>a</think>It is \\boxed{4", {}, "truncated"),
        ("<think>a</think>\n```python\nprint(4)\n", {}, "truncated"),
        ("<think>a</think>four", {}, None),
        ("<think>a</think>4", {"min_characters": 19}, "too_short"),
        ("<think>a</think>4", {"min_characters": 17}, None),
        ("  ", {"think": "optional"}, "too_short"),
        ("<think>" + "I am not sure. " * 20, {}, "loop"),
        ("<think>" + "I am not sure. " * 20 + "</think>4", {}, "loop"),
        ("<think>" + "I am not sure. " * 7 + "</think>4", {"max_repetition": 1.0}, None),
        ("<think>a</think>" + "Yes, it is four. " * 9, {}, "loop"),
        (GOOD.replace("two", "二二"), {}, "language_mix"),
        (GOOD.replace("two", "二二"), {"max_foreign": 0.2}, None),
    ],
)
def test_each_defect_has_its_reason(
    tmp_path: Path, completion: str, settings: dict[str, Any], expected: str | None
) -> None:
    assert reason(tmp_path, completion, **settings) == expected


def test_a_generation_ended_as_its_source_says(tmp_path: Path) -> None:
    values = ["stop", None, "length", ["stop"], "eos"]
    items = [record(completion=GOOD, id=str(n), carried={"why": value}) for n, value in enumerate(values)]
    reasons = [getattr(outcome, "reason", None) for outcome in judge(tmp_path, items, finish_reason="why")]
    assert reasons == [None, None, "truncated", "truncated", "truncated"]
    outcomes = judge(tmp_path, items, finish_reason="why", finished=["stop", "eos"])
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == [None, None, "truncated", "truncated", None]
    assert step_class("quality").carried(entry("quality", finish_reason="why").config) == {"why"}
    assert step_class("quality").carried(entry("quality").config) == set()
    with pytest.raises(ValidationError, match="finish_reason"):
        entry("quality", finished=["eos"])


def test_every_answer_of_a_conversation_is_looked_at(tmp_path: Path) -> None:
    def talk(first: str) -> Record:
        item = record(completion=GOOD)
        assert item.messages is not None
        item.messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": first}, *item.messages]
        return item

    firsts = ["Short, and without thinking.", "<think>x", "No idea, really. " * 9, "这是四，这是四。"]
    outcomes = judge(tmp_path, [talk(first) for first in firsts])
    reasons = [getattr(outcome, "reason", None) for outcome in outcomes]
    assert reasons == [None, "think_not_closed", "loop", "language_mix"]


def test_a_row_without_a_conversation_and_one_without_an_answer(tmp_path: Path) -> None:
    silent = record()
    silent.messages = [{"role": "user", "content": "a?"}]
    outcomes = judge(tmp_path, [record(completion=None), silent])
    assert [getattr(outcome, "reason", None) for outcome in outcomes] == ["no_conversation", "no_answer"]


def test_what_was_measured_is_noted(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    text = f"<think>{words} {words[: len(words) // 2]}</think>It is 四."
    (outcome,) = judge(tmp_path, [record(completion=text)], max_repetition=0.5, max_foreign=0.5)
    facts = outcome.record.facts["quality"]
    assert 0.25 < facts["repetition"] < 0.4 and 0 < facts["foreign"] < 0.01


@pytest.fixture(scope="module")
def answers(shared_dir: Path) -> list[tuple[str, str]]:
    """(question, answer) of GSM8K's training rows."""
    lines = (shared_dir / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["question"], row["answer"]) for row in map(json.loads, lines)]


def test_human_answers_are_good(tmp_path: Path, shared_dir: Path, answers: list[tuple[str, str]]) -> None:
    outcomes = judge(tmp_path, [record(*pair) for pair in answers], think="optional", answer="any")
    assert len(outcomes) == 7473
    assert [outcome.detail for outcome in outcomes if isinstance(outcome, Dropped)] == []
    rows = map(json.loads, (shared_dir / "data" / "math500" / "test.jsonl").read_text(encoding="utf-8").splitlines())
    outcomes = judge(tmp_path, [record(r["problem"], r["solution"]) for r in rows], think="optional", answer="boxed")
    assert len(outcomes) == 500
    assert [outcome.detail for outcome in outcomes if isinstance(outcome, Dropped)] == []


def test_loops_of_a_real_model_are_found(tmp_path: Path, shared_dir: Path) -> None:
    """OpenAI's GSM8K rollouts hold a few that never end; the others are good, but for one that repeats itself."""
    lines = (shared_dir / "data" / "gsm8k" / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [
        (row["question"], rollout["solution"])
        for row in map(json.loads, lines)
        for rollout in row.values()
        if isinstance(rollout, dict)
    ]
    outcomes = judge(tmp_path, [record(*pair) for pair in pairs], think="optional")
    reasons = Counter(getattr(outcome, "reason", "kept") for outcome in outcomes)
    loops = {outcome.record.completion for outcome in outcomes if getattr(outcome, "reason", "") == "loop"}
    assert loops == {answer for _, answer in pairs if answer[-300:-150] == answer[-150:] and len(answer) > 300}
    assert len(loops) == 4 and reasons["repetition"] <= 1 and set(reasons) <= {"kept", "loop", "repetition"}


def trace(rng: random.Random, answers: list[tuple[str, str]]) -> str:
    """Good thinking of 20 to 60 GSM8K answers, each once, and a boxed answer."""
    thinking = "\n\n".join(" ".join(pair) for pair in rng.sample(answers, rng.randint(20, 60)))
    return f"<think>\n{thinking}\n</think>\n\nThe answer is \\boxed{{{rng.randint(2, 999)}}}."


def _looped(rng: random.Random, text: str) -> str:
    start = rng.randrange(len(text) // 2)
    passage = text[start : start + rng.choice((8, 40, 200, 1000))]
    return text.partition("</think>")[0] + passage * rng.randint(9, 30) + passage[: rng.randrange(8)]


def _repeated(rng: random.Random, text: str) -> str:
    thinking, close, rest = text.partition("</think>")
    return thinking + thinking.removeprefix("<think>") + "So that is that." + close + rest


def _mixed(rng: random.Random, text: str) -> str:
    at = rng.randrange(10, text.index("</think>"))
    return text[:at] + "首先我们需要计算总数，" * (len(text) // 200) + text[at:]


DEFECTS: dict[str, Callable[[random.Random, str], str]] = {
    "think_not_closed": lambda rng, text: text[: rng.randrange(20, text.index("</think>"))],
    "no_think": lambda rng, text: text.partition("</think>")[2],
    "no_answer": lambda rng, text: text.partition("\\boxed")[0] + "clear.",
    "truncated": lambda rng, text: text[: -rng.randint(2, 3)],
    "loop": _looped,
    "repetition": _repeated,
    "language_mix": _mixed,
    "broken_think": lambda rng, text: text + "\n</think>\n\nSo.",
    "too_short": lambda rng, text: text[:20],
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_planted_defect_is_caught_and_no_good_trace(
    tmp_path: Path, answers: list[tuple[str, str]], defect: str
) -> None:
    rng = random.Random(20 + list(DEFECTS).index(defect))
    good = [trace(rng, answers) for _ in range(40)]
    settings = {"answer": "boxed", "min_characters": 30 if defect == "too_short" else 1}
    assert {getattr(item, "detail", None) for item in judge(tmp_path, _rows(good), **settings)} == {None}
    bad = [DEFECTS[defect](rng, text) for text in good]
    assert {getattr(item, "reason", None) for item in judge(tmp_path, _rows(bad), **settings)} == {defect}


def _rows(texts: list[str]) -> list[Record]:
    return [record("What do they all cost?", text) for text in texts]


RANDOM = random.Random(7)
HOSTILE = {
    "one character": "a" * 1_000_000,
    "spaces": " " * 1_000_000 + "x",
    "backslashes": "\\" * 1_000_000 + "x",
    "backticks": "`" * 1_000_001 + "x",
    "dollars": "$" * 1_000_000 + "x",
    "fences": "```a\n" * 200_001 + "x",
    "boxes": "\\boxed{" * 150_000 + "x",
    "braces": "\\boxed{" + "{" * 1_000_000 + "x",
    "opened": "<think>" * 150_000,
    "closed": "a</think>" * 110_000,
    "harmony": "<|channel|>analysis<|message|>a<|end|>" * 27_000,
    "headers": "<|channel|>" * 90_000,
    "quotes": "> " * 500_000 + "x",
    "words": "ab " * 330_000 + "x",
    "nearly a loop": ("x" * 999 + "y") * 998 + "x" * 999 + "z" + "x" * 40,
    "Thue and Morse": "".join("ab"[i.bit_count() & 1] for i in range(1 << 20)),
    "random unicode": "".join(map(chr, RANDOM.choices(range(0x110000), k=300_000))),
    "half surrogates": "".join(map(chr, RANDOM.choices(range(0xD800, 0xE000), k=300_000))),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("problem", ["What is it?", "这是什么？"])
def test_a_million_hostile_characters_take_a_moment(tmp_path: Path, name: str, problem: str) -> None:
    # Anything quadratic would take minutes. The settings let every check run.
    item = record(problem, HOSTILE[name], tokens=0, trained=0)
    with at_most(cpu_seconds=30):
        judge(tmp_path, [item], think="optional", max_loop=200_000, answer="boxed")
        judge(tmp_path, [item], think="optional", answer="none", max_repetition=1.0)


pieces = st.lists(
    st.sampled_from(["<think>", "</think>", "\\boxed{", "}", "```\n", "<answer>", "</answer>", "\n\n", "a b. "])
    | st.text(max_size=20),
    max_size=20,
).map("".join)


@given(pieces, st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_text_has_an_outcome_that_is_always_the_same(completion: str, problem: str) -> None:
    item = record(problem, completion)
    step = step_class("quality")(entry("quality", think="optional", answer="boxed").config, None)  # type: ignore[arg-type]
    (first,), (again,) = step([item]), step([item])  # type: ignore[operator]
    assert first == again and first.record is item
