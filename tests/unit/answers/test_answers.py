"""Extraction and checking of answers, on real rollouts and on hostile text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from children import read_line

from sft.answers import checker as answers
from sft.answers.checker import AnswerChecker, extract_answer, gold_answer, last_boxed, plain_number, quick_verdict
from sft.utils.errors import UserError


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker(timeout=5.0, workers=2) as checker:
        yield checker


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"<think>\boxed{1}</think> It is \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> I don't know", None),
        (r"<think>\boxed{1} and it never ends", "1"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a \\{b} c}", r"a \\{b} c"),
        (r"\boxed{3} and an unfinished \boxed{4", "3"),
        (r"I put the answer within \boxed{}. \boxed{7} as in \boxed{}", "7"),
        ("steps\n#### 1,234", "1,234"),
        ("steps\nA: 18", "18"),
        ("A: 1\nmore\nA: $20\n", "$20"),
        (r"#### 5 and \boxed{6}", "6"),
        ("the answer is 12", None),
        ("####", None),
        ("", None),
    ],
)
def test_extracts_the_explicit_final_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        (" $1,234.50 ", Fraction("1234.5")),
        ("-3", -3),
        ("3.0", 3),
        (".5", Fraction(1, 2)),
        ("70,000.", 70000),
        ("1,23", None),
        ("50%", None),
        ("1/2", None),
        ("", None),
        ("-", None),
        (".", None),
        ("1e5", None),
        ("0,123", None),
        ("٣", None),
        ("9" * 5000, None),
    ],
)
def test_plain_numbers(text: str, value: Any) -> None:
    assert plain_number(text) == value


def test_gold_answers_of_the_usual_data_sets() -> None:
    assert gold_answer("He has 2+2=<<2+2=4>>4.\n#### 4") == "4"
    assert gold_answer(r"Thus $x=\boxed{\frac{3}{4}}.$") == r"\frac{3}{4}"
    assert gold_answer("so\nA: 18") == "18"
    assert gold_answer(7) == "7"


def test_quick_verdicts_leave_doubt_to_math_verify() -> None:
    assert quick_verdict("0.3333333", "0.33333333") is None
    assert quick_verdict("1/2", "0.5") is None
    assert quick_verdict("(B) because", "B") is not None
    assert quick_verdict(r"\text{C}", "C") is not None
    assert quick_verdict("Banana", "B") is None


@pytest.mark.parametrize(
    ("text", "gold", "status"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", "right"),
        (r"\boxed{x=5}", "5", "right"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", "right"),
        (r"\boxed{(1,2)}", "(2,1)", "wrong"),
        (r"\boxed{18\text{ dollars}}", "18", "right"),
        ("the answer is 12", "12", "right"),
        ("I don't know.", "12", "wrong"),
        ("", "12", "wrong"),
        (r"\boxed{1,000}", "1000", "right"),
        (r"\boxed{0.333333333}", r"\frac{1}{3}", "right"),
    ],
)
def test_checks_through_math_verify(checker: AnswerChecker, text: str, gold: str, status: str) -> None:
    assert checker.check(text, gold).status == status


def test_a_cut_off_trace_has_no_answer_unless_it_gave_one(checker: AnswerChecker) -> None:
    assert checker.check("then 3 + 4 = 7", "7", free_form=True).status == "right"
    assert checker.check("then 3 + 4 = 7", "7", free_form=False).status == "wrong"
    assert checker.check(r"\boxed{7}", "7", free_form=False).status == "right"


def test_agrees_with_the_labels_of_real_rollouts(checker: AnswerChecker, shared_dir: Path) -> None:
    rows = read_jsonl(shared_dir / "data" / "gsm8k" / "rollouts.jsonl")
    cases = [(row, value) for row in rows for value in row.values() if isinstance(value, dict)]
    verdicts = [checker.submit(value["solution"], gold_answer(row["ground_truth"])) for row, value in cases]
    decided = [
        (verdict.result(timeout=600).status == "right", value["is_correct"])
        for verdict, (_, value) in zip(verdicts, cases, strict=True)
        if verdict.result(timeout=600).status != "undecided"
    ]
    assert len(cases) == 2640 and len(decided) >= 0.995 * len(cases)
    assert sum(mine == theirs for mine, theirs in decided) >= 0.995 * len(decided)
    assert {theirs for _, theirs in decided} == {True, False}


def test_math500_answers_equal_themselves_and_not_each_other(checker: AnswerChecker, shared_dir: Path) -> None:
    rows = read_jsonl(shared_dir / "data" / "math500" / "test.jsonl")[::5]
    # Without a box, math-verify has to find and to compare it.
    same = [
        checker.submit(f"The final answer is ${row['answer']}$. I hope it is correct.", row["answer"]) for row in rows
    ]
    assert [
        row["answer"] for row, verdict in zip(rows, same, strict=True) if verdict.result(timeout=600).status != "right"
    ] == []
    others = rows[1:] + rows[:1]
    mixed = [
        checker.submit(rf"\boxed{{{other['answer']}}}", row["answer"])
        for row, other in zip(rows, others, strict=True)
        if quick_verdict(other["answer"], row["answer"]) is None
    ]
    assert sum(verdict.result(timeout=600).status == "right" for verdict in mixed) <= 0.02 * len(mixed)


HOSTILE = {
    "tower": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "python tower": "the answer is 9**9**9**9",
    "huge integer": r"\boxed{" + "9" * 9_000 + "}",
    "huge integer cut": r"\boxed{" + "9" * 200_000 + "}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 800 + "1" + "}" * 800 + "}",
    "nested parentheses": r"\boxed{" + "(" * 3_000 + "1" + ")" * 3_000 + "}",
    "unbalanced": r"\boxed{" * 20_000,
    "unbalanced braces": "{" * 100_000 + r"\boxed{\frac{1}{",
    "control characters": "\\boxed{\x00\x01\x1b[2J\r\n\x7f\u2028 5}",
    "lone surrogate": "\\boxed{\ud800}",
    "product of sums": r"\boxed{" + "(x+y+z+1)" * 40 + "^{50}}",
    "big sum": r"\boxed{\sum_{k=1}^{10^{9}} \frac{\sin(k)}{k!}}",
    "not latex": r"\boxed{\\\\&&&%%%$$$###\begin{pmatrix}}",
    "code": r"\boxed{__import__('os').system('touch /tmp/sft_was_here')}",
}


def test_hostile_text_ends_within_the_limit_and_loses_no_worker() -> None:
    Path("/tmp/sft_was_here").unlink(missing_ok=True)
    with AnswerChecker(timeout=1.0, workers=2) as checker:
        assert checker.check(r"\boxed{\frac{1}{2}}", "0.5").status == "right"
        started = time.monotonic()
        verdicts = {name: checker.submit(text, r"\frac{1}{3}") for name, text in HOSTILE.items()}
        status = {name: verdict.result(timeout=60).status for name, verdict in verdicts.items()}
        assert time.monotonic() - started < 60
        assert "right" not in status.values()
        after = [checker.submit(rf"\boxed{{\frac{{1}}{{{n}}}}}", rf"\frac{{2}}{{{2 * n}}}") for n in range(2, 8)]
        assert [verdict.result(timeout=600).status for verdict in after] == ["right"] * 6
    assert not Path("/tmp/sft_was_here").exists()


def test_a_check_over_the_limit_is_killed_and_undecided() -> None:
    with AnswerChecker(timeout=1.0, workers=1) as checker:
        verdict = checker.check(r"\boxed{9^{9^{9^{9^{9}}}}}", r"\sqrt{2}")
        if verdict.status == "wrong":
            pytest.fail("math-verify now decides this one; take a harder one")
        assert verdict.status == "undecided"
        assert checker.check(r"\boxed{\frac{1}{2}}", "0.5").status == "right"


def test_a_killed_worker_is_replaced() -> None:
    with AnswerChecker(timeout=5.0, workers=1) as checker:
        assert checker.check(r"\boxed{\frac{1}{2}}", "0.5").status == "right"
        worker = checker._idle.get(timeout=60)
        assert worker is not None
        worker.process.kill()
        worker.process.wait(60)
        checker._idle.put(worker)
        first = checker.check(r"\boxed{\frac{1}{2}}", "0.5")
        second = checker.check(r"\boxed{\frac{1}{2}}", "0.5")
        assert (first.status, second.status) == ("right", "right")


def test_a_checker_that_cannot_start_says_so_and_closes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(1)")
    monkeypatch.setattr(answers, "_WORKER", broken)
    with (
        AnswerChecker(timeout=1.0, workers=1) as checker,
        pytest.raises(UserError, match=r"doesn't start; `.*worker\.py"),
    ):
        checker.check(r"\boxed{x+y}", "y+x")


def test_a_fork_that_something_else_killed_is_replaced_without_a_wrong_verdict() -> None:
    with AnswerChecker(timeout=5.0, workers=1) as checker:
        assert checker.check(r"\boxed{x+y}", "y+x").status == "right"
        worker = checker._idle.get(timeout=60)
        assert worker is not None
        checker._idle.put(worker)
        children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children")
        for n in range(2, 5):
            (child,) = map(int, children.read_text().split())
            os.kill(child, signal.SIGKILL)
            assert checker.check(rf"\boxed{{x+{n}y}}", f"{n}y+x").status == "right"
            assert children.read_text().split() != [str(child)]
        assert checker.replaced == 0


def test_closing_at_once_does_not_wait_for_a_check_under_way() -> None:
    checker = AnswerChecker(timeout=60.0, workers=1)
    assert checker.check(r"\boxed{\frac{1}{2}}", "0.5").status == "right"
    under_way = checker.submit(r"\boxed{9^{9^{9^{9^{9}}}}}", r"\sqrt{2}")
    waiting = checker.submit(r"\boxed{\frac{1}{3}}", r"\frac{2}{6}")
    time.sleep(0.3)
    started = time.monotonic()
    checker.close(at_once=True)
    assert time.monotonic() - started < 10
    assert under_way.result(timeout=60).status == "undecided" and waiting.cancelled()


def test_workers_end_with_the_process_that_started_them() -> None:
    """Killed with SIGKILL, it can't close them: an idle one sees its input end, a busy one meets its own limit."""
    code = (
        "import time\n"
        "from sft.answers.checker import AnswerChecker\n"
        "checker = AnswerChecker(timeout=1.0, workers=2)\n"
        "first = checker.submit(r'\\boxed{\\frac{1}{2}}', '0.5')\n"
        "second = checker.submit(r'\\boxed{9^{9^{9^{9^{9}}}}}', r'\\sqrt{2}')\n"
        "first.result()\n"
        "time.sleep(0.3)\n"
        "workers = [checker._idle.get(), *checker._busy]\n"
        "print(*[worker.process.pid for worker in workers if worker], flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in read_line(process.stdout).split()]
    process.kill()
    process.wait(60)
    process.stdout.close()
    assert pids
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    """Whether the process exists and isn't only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_extraction_is_linear_on_any_text() -> None:
    started = time.monotonic()
    for text in (r"\boxed{" * 100_000, "A:" * 200_000, "#" * 400_000, "{" * 500_000, "</think>" * 50_000):
        extract_answer(text)
        last_boxed(text)
    assert time.monotonic() - started < 5
