"""The one judge: verdicts of a careful person, the same for evaluation and the step `verify`, in linear time."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from answer_pairs import pairs
from step_toys import context, record, run_rows

from sft.answers.choices import gold_letter, judge_choice, letters_of, options_in
from sft.answers.compare import Found, compare
from sft.answers.decide import kind_of
from sft.answers.extract import extract_answer, gold_answer, last_boxed, last_formula, last_number, near_boxes, stated
from sft.answers.judge import Judge, Verdict
from sft.answers.normal import bare, normal
from sft.answers.numbers import parse_number
from sft.answers.parts import as_interval, parts_of
from sft.answers.times import same_ratio, same_time
from sft.answers.words import compare_words
from sft.evaluate.runner import _Recorder, _Task
from sft.evaluate.suites import Problem

TOPICS = sorted({topic for topic, *_ in pairs()})


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(timeout=5.0, workers=2) as judge:
        yield judge


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_careful_person_says_the_same_of_the_known_pairs(judge: Judge, shared_dir: Path) -> None:
    rows = read_jsonl(shared_dir / "cases" / "answers.jsonl")
    assert len(rows) == 103
    found = [(row, judge.judge(row["answer"], row["gold"])) for row in rows]
    assert [(row, verdict) for row, verdict in found if verdict.status != row["verdict"]] == []


@pytest.mark.parametrize("topic", TOPICS)
def test_a_careful_person_says_the_same(judge: Judge, topic: str) -> None:
    rows = [row for row in pairs() if row[0] == topic]
    found = [(*row[1:], judge.judge(row[2], row[3])) for row in rows]
    assert [row for row in found if row[0] != row[3].status] == []


def test_equal_is_equal_both_ways_round(judge: Judge) -> None:
    """What is right in a box is right as the gold answer, unless nobody can know: 3,5 may be two numbers then."""
    turned = [
        (gold, extract_answer(text) or "", judge.judge(rf"\boxed{{{gold}}}", extract_answer(text) or ""))
        for topic, verdict, text, gold in pairs()
        if verdict == "right" and len(extract_answer(text) or "") > 1 and topic != "boxes"
    ]
    assert [row for row in turned if row[2].status == "wrong"] == []
    assert sum(row[2].status == "undecided" for row in turned) < 0.03 * len(turned)


def test_evaluation_and_verify_say_the_same(tmp_path: Path, shared_dir: Path) -> None:
    cases = [(row["answer"], row["gold"]) for row in read_jsonl(shared_dir / "cases" / "answers.jsonl")]
    cases += [(text, gold) for _, _, text, gold in pairs() if text]
    problem = "Which one?\nA) 10\nB) 12\nC) 14"
    cases = cases[::2]
    for asked in ("What is it?", problem):
        rows = [record(asked, text, answer=gold) for text, gold in cases]
        kept = run_rows("verify", rows, context(tmp_path), keep=["right", "wrong", "undecided"])
        mine = [(fact["verdict"], fact["reason"]) for fact in (outcome.record.facts["verify"] for outcome in kept)]
        assert mine == evaluated(asked, cases, tmp_path)


def evaluated(problem: str, cases: list[tuple[str, str]], folder: Path) -> list[tuple[str, str]]:
    """(verdict, reason) of the samples of an evaluation whose model answered so."""
    run = SimpleNamespace(
        problems=[Problem(str(n), problem, gold_answer(gold), None, None) for n, (_, gold) in enumerate(cases)],
        prompts=[problem] * len(cases),
        tokenizer=SimpleNamespace(decode=lambda ids, **_: cases[ids[0]][0]),
        suite=SimpleNamespace(samples_per_problem=1, name="toy"),
        section=SimpleNamespace(verify_timeout=5.0, verify_workers=1),
        folder=folder,
    )
    with _Recorder(run, [], None) as recorder:  # type: ignore[arg-type]
        for number in range(len(cases)):
            recorder.add(_Task(number, number, 0), [number], True)
    (folder / "samples.jsonl").unlink()
    return [(sample["verdict"], sample["reason"]) for sample in recorder.samples]


def test_the_order_and_the_process_change_nothing(judge: Judge) -> None:
    rows = [(text, gold) for _, _, text, gold in pairs()][::2]
    first = [judge.judge(text, gold) for text, gold in rows]
    mixed = random.Random(0).sample(range(len(rows)), len(rows))
    with Judge(timeout=5.0, workers=1) as other:
        second = dict(zip(mixed, [other.judge(*rows[number]) for number in mixed], strict=True))
    assert [second[number] for number in range(len(rows))] == first


def test_a_cut_off_trace_has_no_answer_unless_it_gave_one(judge: Judge) -> None:
    assert judge.judge("then 3 + 4 = 7", "7").status == "right"
    assert judge.judge("then 3 + 4 = 7", "7", free_form=False).status == "wrong"
    assert judge.judge(r"\boxed{7}", "7", free_form=False).status == "right"
    assert judge.judge("#### Step 1\nThe answer is 7", "7", free_form=False).status == "wrong"


@pytest.mark.parametrize(
    ("text", "gold", "verdict"),
    [
        (r"\boxed{B}", "B", "right"),
        (r"\boxed{12}", "B", "right"),
        (r"\boxed{\sqrt{144}}", "B", "right"),
        (r"\boxed{14}", "B", "wrong"),
        (r"\boxed{B}", "12", "right"),
        ("A: 10 B: 12 C: 14, so the correct answer is B", "B", "right"),
        ("A: 10 B: 12 C: 14, so the correct answer is C", "B", "wrong"),
        ("A: 10 B: 12 C: 14, so the correct answer is B", "12", "right"),
        (r"\boxed{B) 14}", "B", "undecided"),
    ],
)
def test_choices_with_their_texts(judge: Judge, text: str, gold: str, verdict: str) -> None:
    options = options_in("Which one?\nA) 10\nB) 12\nC) 14")
    assert options == {"A": "10", "B": "12", "C": "14"}
    assert judge.judge(text, gold, options=options).status == verdict


def test_a_kind_that_is_named(judge: Judge) -> None:
    assert judge.judge(r"\boxed{paris}", "Paris", kind="exact").status == "wrong"
    assert judge.judge(r"\boxed{\sqrt{4}}", "2", kind="number").status == "undecided"
    assert judge.judge(r"\boxed{\sqrt{4}}", "2").status == "right"
    assert judge.judge(r"\boxed{4}", "2", kind="choice").status == "undecided"


def test_agrees_with_the_labels_of_real_rollouts(judge: Judge, shared_dir: Path) -> None:
    rows = read_jsonl(shared_dir / "data" / "gsm8k" / "rollouts.jsonl")
    cases = [(row, value) for row in rows for value in row.values() if isinstance(value, dict)]
    verdicts = [judge.submit(value["solution"], gold_answer(row["ground_truth"])) for row, value in cases]
    found = Counter(
        (verdict.result(timeout=600).status, value["is_correct"])
        for verdict, (_, value) in zip(verdicts, cases, strict=True)
    )
    assert sum(found.values()) == 2640 and set(found) == {("right", True), ("wrong", False)}


def test_math500_answers_equal_themselves_and_not_each_other(judge: Judge, shared_dir: Path) -> None:
    rows = read_jsonl(shared_dir / "data" / "math500" / "test.jsonl")
    for dressed in ("{}", "The final answer is $@$. I hope it is correct.", r"so \boxed{@}", "Hence we find $@$."):
        texts = [row["solution"] if dressed == "{}" else dressed.replace("@", row["answer"]) for row in rows]
        found = [judge.submit(text, row["answer"]) for text, row in zip(texts, rows, strict=True)]
        assert [t for t, verdict in zip(texts, found, strict=True) if verdict.result(600).status != "right"] == []
    others = [(row, other) for row, other in pairwise(rows) if row["answer"] != other["answer"]]
    mixed = [judge.submit(rf"\boxed{{{other['answer']}}}", row["answer"]) for row, other in others]
    right = [pair for pair, verdict in zip(others, mixed, strict=True) if verdict.result(600).status == "right"]
    # One of them asks for 5, and the next one's answer is x = 5.
    assert [(row["answer"], other["answer"]) for row, other in right] == [("5", "x=5")]


PIECES = r"""\[ \\[ \( \boxed{ \boxed $ $x$ { } ( [ ] A: # #### </think> <think> B) (B A. ** \text{ \text \text{a} 1,
1,000 1 1. 1/ 1a = x x= x=1, % \frac{1}{2} \frac \ \, . _ _2 ^ ^{ ' ~ \pm < x< <x \le \cup & \\ \begin{pmatrix}
\end{pmatrix} | \{ \} 0.( ... \overline{3} 12:30 3- a'b answer: 5'6" 2^""".split()
PIECES += "answer is ,answer to ,option A ,1 000 ,1/2 ,a ,and ,or , ,\t,one ,half ,yes ,no real ".split(",")
PIECES += [
    "is ",
    "a: ",
    r"\dot{1}",
    r"\hat{i}",
    "sqrt(",
    r"30^\circ ",
    "{}^5C_",
    r",k \in \mathbb{Z}",
    r"\ne 1,",
    "$x=1$ or ",
]
PIECES += ["12 is the answer ", "1,000, ", "a, ", "\n", "\nA: x", "\n#### 1", "½", "٣", "四", "3\u0305", "²"]


def no_math(mine: str, gold: str) -> Found:
    return "wrong", "not asked"


READERS: dict[str, Callable[[str], Any]] = {
    "extract": lambda text: (extract_answer(text), near_boxes(text), last_boxed(text), stated(text)),
    "search": lambda text: (last_number(text, "cm"), last_formula(text)),
    "normal": lambda text: (normal.__wrapped__(text), bare(text)),
    "number": parse_number.__wrapped__,
    "parts": lambda text: (parts_of(text), as_interval(text)),
    "words": lambda text: (compare_words(text, "east"), compare_words(text, "yes"), compare_words("east", text)),
    "times": lambda text: (same_time(text, "3:30"), same_ratio(text, "3:1")),
    "choices": lambda text: (options_in(text), gold_letter(text, {"A": "x"}), letters_of(text)),
    "choice": lambda text: judge_choice(text, "A", {"A": "x", "B": text}),
    "kind": lambda text: kind_of(text, {"A": "x"}),
    "compare": lambda text: (compare(text, "1, 2", no_math), compare("(1, 2)", text, no_math)),
}


@pytest.mark.parametrize("reader", READERS)
def test_time_is_linear_on_any_text(reader: str) -> None:
    """Eight times the text takes eight times the time, not 64; of a few milliseconds nothing can be said."""

    slow = []
    for piece in PIECES:
        for end in ("", "!"):
            short, long = (piece * (size // len(piece)) + end for size in (5_000, 40_000))
            before, after = cpu(READERS[reader], short), cpu(READERS[reader], long)
            if after > 0.1 and after > 24 * max(before, 0.002):
                # Whatever else the machine was at: the best of three.
                before, after = (min(cpu(READERS[reader], text) for _ in range(3)) for text in (short, long))
            if after > 0.1 and after > 24 * max(before, 0.002):
                slow.append((piece, end, before, after))
    assert slow == []


def cpu(read: Callable[[str], Any], text: str) -> float:
    started = time.process_time()
    read(text)
    return time.process_time() - started


def test_a_verdict_says_how_it_was_found(judge: Judge) -> None:
    assert judge.judge(r"\boxed{x+1}", "1+x") == Verdict("right", "math-verify", "x+1", "math")
    assert judge.judge(r"\boxed{5 km}", "5") == Verdict("right", "same number", "5 km", "number")
    assert judge.judge("", "5") == Verdict("wrong", "no answer found", None, "number")
