"""The step `verify`, on real solutions with known verdicts and on hostile text."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hostile_answers import FAMILIES, hostile_completions
from pydantic import ValidationError
from step_toys import context, entry, record, run_rows

from sft.answers import pool as answers
from sft.answers.worker import WALL_SLACK, Answer
from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record, from_table, to_table
from sft.data.steps.verify import Verify

ALL = ["right", "wrong", "undecided"]
MCQ = "What is the capital of France?\n\nA) Berlin\nB) Paris\nC) Rome\nD) Bern"


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verify]:
    """One step for many small questions: its checking process starts once."""
    made = Verify(entry("verify", keep=ALL).config, context(tmp_path_factory.mktemp("verify")))
    yield made
    made.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def boxed(answer: str) -> str:
    return f"<think>\nso\n</think>\n\n\\boxed{{{answer}}}"


def facts(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = outcome.record.facts["verify"]
    return found


def verdicts(outcomes: list[Outcome]) -> list[str]:
    return [facts(outcome)["verdict"] for outcome in outcomes]


AUTO = [
    # answer, gold, kind, verdict
    ("18", "18", "number", "right"),
    ("19", "18", "number", "wrong"),
    (r"\frac{1}{2}", "0.5", "number", "right"),
    (r"\dfrac{3}{6}", "1/2", "number", "right"),
    (r"1\frac{1}{2}", "3/2", "number", "right"),
    ("12,345", "12345", "number", "right"),
    (r"12{,}345", "12345", "number", "right"),
    (r"3 \times 10^{5}", "300000", "number", "right"),
    ("3e-5", "0.00003", "number", "right"),
    ("3e-5", "3e-6", "number", "wrong"),
    ("1e-9", "2e-9", "number", "wrong"),
    (r"50\%", "50", "number", "right"),
    (r"50\%", "0.5", "number", "right"),
    (r"0.5\%", "0.5", "number", "undecided"),
    (r"50\%", "5", "number", "wrong"),
    ("0.333333", r"\frac{1}{3}", "number", "right"),
    ("0.666666", r"\frac{2}{3}", "number", "right"),
    ("0.33", r"\frac{1}{3}", "number", "wrong"),
    ("1234567.1", "1234567.2", "number", "wrong"),
    (r"18\text{ dollars}", r"\$18", "number", "right"),
    ("8 km", "8", "number", "right"),
    ("8 km", "8 m", "number", "wrong"),
    ("8 km", "8000 m", "number", "right"),
    ("8 cows", "8 hens", "number", "undecided"),
    ("8 inches", "8 in", "number", "right"),
    ("8x", "8", "number", "wrong"),
    ("8m", "8m", "math", "right"),
    ("8 million", "8", "number", "wrong"),
    (r"\sqrt{4}", "2", "number", "right"),
    (r"2\sqrt{2}", r"\sqrt{8}", "math", "right"),
    (r"(1,2)", "(2,1)", "math", "wrong"),
    (r"x^2+2x+1", "(x+1)^2", "math", "right"),
    ("B", "B", "choice", "right"),
    (r"\text{B}", "(B)", "choice", "right"),
    (r"\textbf{(B)}\ Paris", "B", "choice", "right"),
    ("(B) Paris", "B) Paris", "choice", "right"),
    ("Paris", "B", "choice", "right"),
    ("paris.", "B", "choice", "right"),
    ("Rome", "B", "choice", "wrong"),
    ("C", "B", "choice", "wrong"),
    ("(B) or (C)", "B", "choice", "undecided"),
    ("B) Rome", "B", "choice", "undecided"),
    ("C", "Paris", "choice", "wrong"),
    ("B", "Paris", "choice", "right"),
    ("London", "B", "choice", "wrong"),
    (r"\text{East}", r"\text{east}", "words", "right"),
    ("west", r"\text{east}", "words", "wrong"),
    ("north-east or east", r"\text{east}", "words", "undecided"),
    ("Neveyl", "Evelyn", "words", "wrong"),
]


@pytest.mark.parametrize(("answer", "gold", "kind", "verdict"), AUTO)
def test_auto_goes_by_the_gold_answer(step: Verify, answer: str, gold: str, kind: str, verdict: str) -> None:
    (outcome,) = step([record(MCQ, boxed(answer), answer=gold)])
    assert (facts(outcome)["kind"], facts(outcome)["verdict"]) == (kind, verdict), facts(outcome)


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        ("<think>\nhm\n</think>\n\nSo the answer is 12.", "12", "right"),
        ("She has 3 and 4, which makes 7 apples.", "7", "right"),
        ("She has 3 and 4, which makes 7 apples.", "4", "wrong"),
        ("<think>\nhm\n</think>\n\nThe correct answer is (B) because.", "B", "right"),
        ("**Answer:** B", "B", "right"),
        ("The answer is Paris.", "B", "right"),
        ("The final answer is $x^2+1$. I hope it is correct.", "1+x^2", "right"),
        ("Thus Evelyn is the fastest of them.", r"\text{Evelyn}", "undecided"),
        ("<think>\nIt is 12, so 12", "12", "wrong"),
        ("<think>\nIt is \\boxed{12}, but let me see", "12", "wrong"),
        ("", "12", "wrong"),
    ],
)
def test_answers_without_a_mark(step: Verify, completion: str, gold: str, verdict: str) -> None:
    (outcome,) = step([record(MCQ, completion, answer=gold)])
    assert facts(outcome)["verdict"] == verdict, facts(outcome)


def test_without_free_form_only_marked_answers_count(tmp_path: Path) -> None:
    rows = [record(completion=text, answer="12") for text in ("The answer is 12.", "#### 12", "A: 12", boxed("12"))]
    outcomes = run_rows("verify", rows, context(tmp_path), keep=ALL, free_form=False)
    assert verdicts(outcomes) == ["wrong", "right", "right", "right"]


@pytest.mark.parametrize(
    ("kind", "answer", "gold", "verdict"),
    [
        ("exact", "Paris", "Paris", "right"),
        ("exact", r"\text{Paris }", "Paris", "right"),
        ("exact", "paris", "Paris", "wrong"),
        ("exact", "0.5", "1/2", "wrong"),
        ("number", "1/2", "0.5", "right"),
        ("number", r"\sqrt{4}", "2", "undecided"),
        ("number", "2", "two", "right"),
        ("number", "1e999999999", "1", "undecided"),
        ("math", "0.5", r"\frac{1}{2}", "right"),
        ("choice", "B", "42", "undecided"),
        ("choice", "Paris", "B", "right"),
    ],
)
def test_a_kind_that_the_settings_name(tmp_path: Path, kind: str, answer: str, gold: str, verdict: str) -> None:
    (outcome,) = run_rows("verify", [record(MCQ, boxed(answer), answer=gold)], context(tmp_path), keep=ALL, kind=kind)
    assert facts(outcome)["verdict"] == verdict, facts(outcome)


def test_choices_of_a_carried_column(tmp_path: Path) -> None:
    choices = [["red", "green"], {"text": ["red", "green"], "label": ["A", "B"]}, ["A) red", "B) green"]]
    rows = [record("Which?", boxed("green"), carried={"gold": 1, "options": listed}) for listed in choices]
    outcomes = run_rows("verify", rows, context(tmp_path), kind="choice", gold="gold", choices="options")
    assert [(type(outcome), facts(outcome)["gold"]) for outcome in outcomes] == [(Kept, "B")] * 3
    assert Verify.carried(entry("verify", gold="gold", choices="options").config) == {"gold", "options"}
    assert Verify.carried(entry("verify").config) == set()


GOLDS = [
    ("18", "18"),
    (18, "18"),
    (["18"], "18"),
    ("so 9*2 = <<9*2=18>>18\n#### 18", "18"),
    ("steps\nA: 18", "18"),
    (r"Thus $x=\boxed{18}$, as was asked.", "18"),
    ("word " * 150 + r"\boxed{18}", "18"),
    (None, None),
    ("", None),
    ("  ", None),
    ([], None),
    (["18", "19"], None),
    ({"a": 1}, None),
    ("a long solution without a mark, 18 " * 20, None),
]


@pytest.mark.parametrize(("value", "gold"), GOLDS)
def test_gold_of_a_carried_column(step: Verify, tmp_path: Path, value: Any, gold: str | None) -> None:
    settings = {"gold": "solution", "missing_gold": "drop"}
    (outcome,) = run_rows(
        "verify", [record(completion=boxed("18"), carried={"solution": value})], context(tmp_path), **settings
    )
    assert isinstance(outcome, Kept) == (gold is not None)
    if gold is None:
        assert isinstance(outcome, Dropped) and outcome.reason == "no_gold" and "'solution'" in outcome.detail
        assert facts(outcome) == {"verdict": "no_gold", "reason": outcome.detail}
    else:
        assert facts(outcome)["gold"] == gold


def test_keep_says_which_verdicts_go_on_and_dropped_rows_say_what_was_seen(tmp_path: Path) -> None:
    rows = [
        record(completion=boxed("4"), answer="4", id="right"),
        record(completion=boxed("5"), answer="4", id="wrong"),
        record(completion=boxed("8 cows"), answer="8 hens", id="undecided"),
        record(completion=boxed("4"), id="no_gold"),
        record(completion=None, answer="4", id="no_conversation"),
    ]
    names = [row.id for row in rows]

    def kept(**settings: Any) -> tuple[list[str], dict[str, Dropped]]:
        outcomes = run_rows("verify", rows, context(tmp_path), **settings)
        assert [outcome.record.id for outcome in outcomes] == names
        dropped = {outcome.record.id: outcome for outcome in outcomes if isinstance(outcome, Dropped)}
        assert all(outcome.reason == name for name, outcome in dropped.items())
        return [outcome.record.id for outcome in outcomes if isinstance(outcome, Kept)], dropped

    ids, dropped = kept()
    assert ids == ["right"]
    assert dropped["wrong"].detail == "answer 5, gold 4: other number"
    assert dropped["undecided"].detail == "answer 8 cows, gold 8 hens: depends on the unit: cow, hen"
    assert kept(keep=["wrong", "undecided"])[0] == ["wrong", "undecided"]
    assert kept(keep=ALL, missing_gold="keep")[0] == names[:4]
    # What was noted survives the shards between steps.
    assert from_table(to_table(rows[:2]))[0].facts["verify"] == {
        "verdict": "right", "reason": "same text", "kind": "number", "answer": "4", "gold": "4"
    }  # fmt: skip


def test_outcomes_are_in_order_although_some_need_a_comparison(step: Verify) -> None:
    rows = [
        record(completion=boxed(rf"\sqrt{{{n}}}" if n % 3 else str(n)), answer=rf"\sqrt{{{n}}}", id=str(n))
        for n in range(2, 40)
    ]
    outcomes = list(step(rows))
    assert [outcome.record.id for outcome in outcomes] == [str(n) for n in range(2, 40)]
    # sqrt(n) is n for no n > 1.
    assert verdicts(outcomes) == ["right" if n % 3 else "wrong" for n in range(2, 40)]


def test_verdicts_do_not_depend_on_the_order_of_the_rows(step: Verify, tmp_path: Path, shared_dir: Path) -> None:
    rows = read_jsonl(shared_dir / "data" / "math500" / "test.jsonl")[::4]
    pairs = list(pairwise(rows))
    forth = [record(a["problem"], b["solution"], answer=a["answer"]) for a, b in pairs]
    back = [record(a["problem"], b["solution"], answer=a["answer"]) for a, b in reversed(pairs)]
    first = [facts(outcome) for outcome in step(forth)]
    second = [facts(outcome) for outcome in run_rows("verify", back, context(tmp_path), keep=ALL)]
    assert first == second[::-1]


def test_plain_cases_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(self: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(answers._Worker, "__init__", started)
    cases = [("18", "18"), ("1/2", "0.5"), (r"2\sqrt{2}", r"2\sqrt{2}"), ("C", "B"), ("west", r"\text{east}")]
    rows = [record(MCQ, boxed(mine), answer=gold) for mine, gold in cases]
    outcomes = run_rows("verify", rows, context(tmp_path), keep=ALL)
    assert verdicts(outcomes) == ["right", "right", "right", "wrong", "wrong"]
    with pytest.raises(AssertionError, match="process"):
        run_rows("verify", [record(completion=boxed("x+y"), answer="y+x")], context(tmp_path))


def test_settings(tmp_path: Path) -> None:
    for settings in ({"keep": []}, {"keep": ["good"]}, {"timeout": 0.0}, {"kind": "maths"}, {"gold": ""}):
        with pytest.raises(ValidationError):
            entry("verify", **settings)
    assert set(Verify.identity(entry("verify").config)) == set(
        "math-verify latex2sympy2_extended sympy pint python-dateutil".split()
    )


def test_agrees_with_the_labels_of_real_rollouts(step: Verify, shared_dir: Path) -> None:
    rows = read_jsonl(shared_dir / "data" / "gsm8k" / "rollouts.jsonl")
    cases = [(row, value) for row in rows for value in row.values() if isinstance(value, dict)]
    made = [record(row["question"], value["solution"], answer=row["ground_truth"]) for row, value in cases]
    found = Counter(zip(verdicts(list(step(made))), (case["is_correct"] for _, case in cases), strict=True))
    assert sum(found.values()) == 2640 and set(found) == {("right", True), ("wrong", False)}


def test_math500_solutions_are_right(step: Verify, shared_dir: Path) -> None:
    rows = read_jsonl(shared_dir / "data" / "math500" / "test.jsonl")
    assert len(rows) == 500
    solved = step([record(row["problem"], row["solution"], answer=row["answer"]) for row in rows])
    assert [facts(outcome) for outcome in solved if facts(outcome)["verdict"] != "right"] == []


@pytest.mark.parametrize("shift", [1, 101])
def test_math500_solutions_are_wrong_for_other_problems(step: Verify, shared_dir: Path, shift: int) -> None:
    rows = read_jsonl(shared_dir / "data" / "math500" / "test.jsonl")
    pairs = [(a, b) for a, b in zip(rows, rows[shift:] + rows[:shift], strict=True) if a["answer"] != b["answer"]]
    found = verdicts(list(step([record(a["problem"], b["solution"], answer=a["answer"]) for a, b in pairs])))
    assert len(pairs) >= 490
    assert found.count("right") <= 0.005 * len(pairs)
    assert found.count("undecided") <= 0.01 * len(pairs)


LIMIT = 0.1
HOSTILE_GOLDS = (r"\frac{1}{3}", "17", r"2\sqrt{2}", r"(1,\infty)", "x^2+1", "C", r"\text{east}")


def check_hostile(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """`count` hostile strings, and among them answers that must be found right whatever came before."""
    asked: list[float] = []
    ask = answers._Worker.ask

    def timed(self: Any, *arguments: Any) -> Answer | None:
        ready, started = self.ready, time.monotonic()
        verdict = ask(self, *arguments)
        if ready:
            asked.append(time.monotonic() - started)
        return verdict

    monkeypatch.setattr(answers._Worker, "ask", timed)
    rows: list[Record] = []
    for number, (family, text) in enumerate(hostile_completions(count)):
        gold = HOSTILE_GOLDS[number // len(FAMILIES) % len(HOSTILE_GOLDS)]
        rows.append(record(MCQ, text, answer=gold, id=f"{number}", domain=family))
        if number % 20 == 0:
            sane = boxed(rf"\sqrt{{{4 * (number + 3)}}}")
            rows.append(record(completion=sane, answer=rf"2\sqrt{{{number + 3}}}", id=f"sane {number}"))
    step = Verify(entry("verify", keep=ALL, timeout=LIMIT).config, context(folder))
    started = time.monotonic()
    try:
        outcomes = [outcome for start in range(0, len(rows), 256) for outcome in step(rows[start : start + 256])]
        lost = step._judge.pool.replaced
    finally:
        step.close()
    seconds = time.monotonic() - started
    sane_ones = [facts(outcome) for outcome in outcomes if outcome.record.id.startswith("sane")]
    hostile = [outcome for outcome in outcomes if not outcome.record.id.startswith("sane")]
    reasons = Counter((facts(outcome)["verdict"], facts(outcome)["reason"]) for outcome in hostile)
    print(f"{len(hostile)} hostile strings: {seconds:.0f} s, longest {max(asked):.2f} s; {dict(reasons)}")
    assert len(hostile) == count and lost == 0
    assert [fact for fact in sane_ones if fact["verdict"] != "right"] == []
    assert not any(verdict == "right" for verdict, _ in reasons)
    assert reasons["undecided", "timeout"] > 0.05 * count
    # The time limit on the clock, and what it takes to see a process die and to fork another on a busy machine.
    assert max(asked) < WALL_SLACK * LIMIT + 10.0


def test_hostile_answers_end_in_time_and_harm_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_hostile(tmp_path, monkeypatch, 25 * len(FAMILIES))


@pytest.mark.slow
def test_ten_thousand_hostile_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_hostile(tmp_path, monkeypatch, 10_000)
