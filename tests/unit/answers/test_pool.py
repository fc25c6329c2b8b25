"""The processes that compare as mathematics: hostile text ends in time, what is killed is replaced, none stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import read_line

from sft.answers import pool
from sft.answers.judge import Judge
from sft.utils.errors import UserError

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
    with Judge(timeout=1.0, workers=2) as judge:
        assert judge.judge(r"\boxed{x+y}", "y+x").status == "right"
        verdicts = {name: judge.submit(text, r"\sqrt{3}") for name, text in HOSTILE.items()}
        # Unlimited, one of them alone would take longer.
        status = {name: verdict.result(timeout=300).status for name, verdict in verdicts.items()}
        assert "right" not in status.values()
        after = [judge.submit(rf"\boxed{{x+{n}y}}", f"{n}y+x") for n in range(2, 8)]
        assert [verdict.result(timeout=600).status for verdict in after] == ["right"] * 6
    assert not Path("/tmp/sft_was_here").exists()


def test_a_check_over_the_limit_is_killed_and_undecided() -> None:
    with Judge(timeout=1.0, workers=1) as judge:
        verdict = judge.judge(r"\boxed{9^{9^{9^{9^{9}}}}}", r"\sqrt{2}")
        if verdict.status == "wrong":
            pytest.fail("math-verify now decides this one; take a harder one")
        assert verdict.status == "undecided"
        assert judge.judge(r"\boxed{x+y}", "y+x").status == "right"


def test_a_killed_worker_is_replaced() -> None:
    with Judge(timeout=5.0, workers=1) as judge:
        assert judge.judge(r"\boxed{x+y}", "y+x").status == "right"
        worker = judge.pool._idle.get(timeout=60)
        assert worker is not None
        worker.process.kill()
        worker.process.wait(60)
        judge.pool._idle.put(worker)
        first = judge.judge(r"\boxed{x+y}", "y+x")
        second = judge.judge(r"\boxed{x+y}", "y+x")
        assert (first.status, second.status) == ("right", "right")


def test_a_judge_that_cannot_start_says_so_and_closes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(1)")
    monkeypatch.setattr(pool, "_WORKER", broken)
    with (
        Judge(timeout=1.0, workers=1) as judge,
        pytest.raises(UserError, match=r"doesn't start; `.*worker\.py"),
    ):
        judge.judge(r"\boxed{x+y}", "y+x")


def test_a_fork_that_something_else_killed_is_replaced_without_a_wrong_verdict() -> None:
    with Judge(timeout=5.0, workers=1) as judge:
        assert judge.judge(r"\boxed{x+y}", "y+x").status == "right"
        worker = judge.pool._idle.get(timeout=60)
        assert worker is not None
        judge.pool._idle.put(worker)
        children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children")
        for n in range(2, 5):
            (child,) = map(int, children.read_text().split())
            os.kill(child, signal.SIGKILL)
            assert judge.judge(rf"\boxed{{x+{n}y}}", f"{n}y+x").status == "right"
            assert children.read_text().split() != [str(child)]
        # Killed with nothing to do, it says that too: what it may have read is asked again.
        os.kill(int(children.read_text()), signal.SIGKILL)
        assert worker.process.stdout is not None
        assert json.loads(read_line(worker.process.stdout))["task"] == 0
        assert judge.pool.replaced == 0


def test_a_question_that_a_dying_fork_took_with_it_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fork killed between reading its task and noting it: the process says so (task 0), and the pool asks again."""
    taker = tmp_path / "worker.py"
    taker.write_text(
        "import json, sys\n"
        "print('ready', flush=True)\n"
        "first = sys.stdin.readline()\n"
        "lost = dict(task=0, status='undecided', reason='verifier died', answer=None)\n"
        "print(json.dumps(lost), flush=True)\n"
        "again = sys.stdin.readline()\n"
        "said = dict(lost, task=json.loads(again)['task'], status='right' if again == first else 'wrong', reason='')\n"
        "print(json.dumps(said), flush=True)\n"
        "sys.stdin.readline()\n"
    )
    monkeypatch.setattr(pool, "_WORKER", taker)
    with Judge(timeout=1.0, workers=1) as judge:
        assert judge.judge(r"\boxed{x+y}", "y+x").status == "right"
        assert judge.pool.replaced == 0


def test_closing_at_once_does_not_wait_for_a_check_under_way() -> None:
    judge = Judge(timeout=60.0, workers=1)
    assert judge.judge(r"\boxed{x+y}", "y+x").status == "right"
    under_way = judge.submit(r"\boxed{9^{9^{9^{9^{9}}}}}", r"\sqrt{2}")
    waiting = judge.submit(r"\boxed{x+y}", "y+x")
    time.sleep(0.3)
    started = time.monotonic()
    judge.close(at_once=True)
    assert time.monotonic() - started < 50  # far from the 60 seconds of processor time that the check may take
    assert under_way.result(timeout=60).status == "undecided" and waiting.cancelled()


def test_workers_end_with_the_process_that_started_them() -> None:
    """Killed with SIGKILL, it can't close them: an idle one sees its input end, a busy one meets its own limit."""
    code = (
        "import time\n"
        "from sft.answers.judge import Judge\n"
        "judge = Judge(timeout=1.0, workers=2)\n"
        "first = judge.submit(r'\\boxed{x+y}', 'y+x')\n"
        "second = judge.submit(r'\\boxed{9^{9^{9^{9^{9}}}}}', r'\\sqrt{2}')\n"
        "first.result()\n"
        "time.sleep(0.3)\n"
        "workers = [judge.pool._idle.get(), *judge.pool._busy]\n"
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
    deadline = time.monotonic() + 120
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    """Whether the process exists and isn't only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
