"""When long work will end, on timings that were recorded; and what a terminal of few columns shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from sft.evaluate.progress import SuiteLines
from sft.train.callbacks import Progress
from sft.utils.progress import PhaseLines, ProgressLine, TimeLeft, clock, end_line, fitted

Timing = Sequence[tuple[float, int]]

# Seconds since the beginning, and how many were done then. Answers of evaluations on two cores, 200 at a time:
WAVES = (
    (2.3, 1), (2.6, 3), (3.0, 6), (3.3, 10), (3.5, 64), (3.9, 69), (4.4, 74), (4.6, 75), (4.9, 134), (5.8, 135),
    (6.1, 137), (6.5, 195), (6.9, 197), (7.2, 198), (7.7, 201), (7.9, 235), (8.3, 236), (9.0, 253), (9.2, 254),
    (9.4, 272), (9.9, 316), (10.1, 317), (10.4, 381), (11.0, 391), (11.4, 406), (11.6, 426), (11.8, 449), (12.1, 450),
    (12.3, 476), (12.5, 532), (12.8, 550), (13.0, 567), (13.4, 581), (13.7, 582), (13.9, 588), (14.0, 600),
)  # fmt: skip
CUT_OFF = (
    (5.2, 1), (5.6, 3), (5.9, 5), (8.9, 10), (9.1, 11), (22.6, 14), (25.0, 201), (25.3, 202), (25.6, 206), (25.9, 214),
    (68.9, 215), (70.4, 401), (70.7, 414), (71.3, 418), (71.6, 422), (71.9, 429), (72.2, 431), (75.8, 432), (75.8, 600),
)  # fmt: skip
ONE_WAVE = ((20.4, 1), (22.0, 6), (23.1, 13), (24.0, 27), (25.2, 48), (26.1, 66), (27.0, 79), (28.1, 88), (29.0, 90))
# Steps of a training whose rows differ in length, and of one on a GPU that compiles and tunes at first.
UNEVEN = (
    (0.4, 2), (0.9, 4), (1.3, 6), (1.6, 8), (2.0, 10), (2.5, 12), (2.8, 14), (3.1, 16), (3.5, 18), (3.8, 20), (4.1, 22),
    (4.4, 24), (4.9, 26), (5.3, 28), (5.7, 30), (6.0, 32), (6.4, 34), (6.8, 36), (7.1, 38), (7.4, 40), (7.9, 42),
    (8.3, 44), (8.6, 46), (8.9, 48), (9.4, 50), (9.9, 52), (10.4, 54), (10.8, 56), (11.1, 58), (11.3, 60), (11.6, 62),
    (12.0, 64), (12.3, 66), (12.9, 68), (13.5, 70),
)  # fmt: skip
COMPILED = tuple((61.0 + 1.1 * step, step + 1) for step in range(200))
PAUSES = tuple((5.0 + step + 20 * (step // 50), step + 1) for step in range(300))
HOURS = tuple((40.0 + 30 * step, step + 1) for step in range(400))


def told(timing: Timing, together: int) -> list[tuple[float, float, float | None]]:
    """(seconds since the beginning, until the end, what was foretold), looked at twice a second."""
    left, waiting, total, seen = TimeLeft(0, 0.0, together), list(timing), timing[-1][1], []
    for half in range(int(2 * timing[-1][0])):
        while waiting and waiting[0][0] <= half / 2:
            left.note(waiting[0][1], waiting.pop(0)[0])
        seen.append((half / 2, timing[-1][0] - half / 2, left.seconds(total, half / 2)))
    return seen


@pytest.mark.parametrize(
    ("timing", "together", "share"),
    [
        (WAVES, 200, 0.0), (CUT_OFF, 200, 0.0), (ONE_WAVE, 90, 0.0),
        (UNEVEN, 1, 0.7), (COMPILED, 1, 0.5), (PAUSES, 1, 0.9), (HOURS, 1, 0.9),
    ],
)  # fmt: skip
def test_what_is_foretold_comes_true(timing: Timing, together: int, share: float) -> None:
    seen = told(timing, together)
    known = [(truth, told) for _, truth, told in seen if told is not None]
    assert len(known) >= share * len(seen)
    for truth, foretold in known:
        # Within a factor of 2.5, give or take some seconds.
        assert foretold <= 2.5 * truth + 5 and truth <= 2.5 * foretold + 5, (truth, foretold)


def test_one_answer_of_ninety_foretells_nothing() -> None:
    assert all(foretold is None for _, _, foretold in told(ONE_WAVE, 90))
    # Nor where nobody says that they are made side by side: the first took 20 seconds, which says nothing of the next.
    assert all(foretold is None for moment, _, foretold in told(ONE_WAVE, 1) if moment < 2 * 20.4)


def test_work_that_has_stopped_is_not_foretold() -> None:
    left = TimeLeft(0, 0.0)
    for step in range(1, 31):
        left.note(step, float(step))
    assert left.seconds(100, 30.0) == pytest.approx(70, rel=0.1)
    assert left.seconds(100, 30.5) == pytest.approx(69.5, rel=0.1)
    assert left.seconds(100, 120.0) is None


def test_a_continued_run_counts_what_it_does_itself() -> None:
    left = TimeLeft(900, 0.0)
    for step in range(1, 11):
        left.note(900 + step, 10.0 * step)
    assert left.seconds(1000, 100.0) == pytest.approx(900, rel=0.1)


def test_a_long_run_is_remembered_in_little() -> None:
    left = TimeLeft(0, 0.0)
    for step in range(1, 20_001):
        left.note(step, 0.5 * step)
    assert len(left._points) < 1000 and left.seconds(40_000, 10_000.0) == pytest.approx(10_000, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.4, "59s"), (64, "1m04s"), (3599.7, "1h00m"), (3780, "1h03m"), (190_800, "2d05h")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 200])
@pytest.mark.parametrize("title", ["sft", "a stage with a name that is longer than a narrow terminal is wide, by far"])
def test_count_and_time_stay_in_few_columns(width: int, title: str) -> None:
    numbers = ["loss 0.1234", "12,345 tok/s", "lr 1.00e-05", "grad 0.123"]
    line = fitted(title, ["35/2,353 steps", "41s left", *numbers], width)
    assert len(line) <= width
    if width >= 30:
        assert "35/2,353 steps, 41s left" in line
    shown = [number in line for number in numbers]
    assert shown == sorted(shown, reverse=True), "the last go first"
    assert all(shown) == (width == 200)


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 60 columns, on which a second passes with each look at the clock."""
    seconds = count(100)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sft.utils.progress.time.monotonic", lambda: float(next(seconds)))


def drawn(text: str) -> list[str]:
    return [part.removesuffix("\x1b[K") for part in text.replace("\n", "\r").split("\r") if part]


def test_every_line_fits_the_terminal_and_keeps_step_and_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_terminal(monkeypatch)
    bar: Any = Progress("midtraining on a broad mix of sources")
    suite: Any = SimpleNamespace(name="held-out-problems-of-olympiads", batch_size=1)
    answers, phases = SuiteLines("midtraining on a broad mix", [suite]), PhaseLines("midtraining on a broad mix")
    logs = {"loss": 1.25, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 123456.0}
    for step in range(41):
        state: Any = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=40)
        (bar.on_step_end if step else bar.on_train_begin)(None, state, None)
        bar.on_log(None, state, None, logs=logs)
    bar.on_train_end(None, state, None)
    training = drawn(capsys.readouterr().err)
    for done in range(41):
        answers(suite.name, done, 40, done // 2)
    evaluation = drawn(capsys.readouterr().err)
    for done in range(41):
        phases("decontaminate against benchmarks", done, 40)
    preparation = drawn(capsys.readouterr().err)
    for lines in (training, evaluation, preparation):
        assert max(map(len, lines)) < 60
        assert all(f"{done}/40" in line for done, line in enumerate(lines[:40]))
        assert all(line.count(" left") == 1 for line in lines[10:39])
    assert "loss 1.25" in training[-1] and "50.0% right" in evaluation[-1]


def test_what_is_printed_begins_below_the_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_terminal(monkeypatch)
    line = ProgressLine("sft", "steps")
    line(1, 9)
    end_line()
    end_line()
    line(2, 9)
    line.close()
    assert capsys.readouterr().err.count("\n") == 2
    passing = ProgressLine("sft", passing=True)
    passing(1, 9)
    passing.close()
    assert capsys.readouterr().err.endswith("\r\x1b[K"), "it leaves nothing"


def test_without_a_terminal_quick_phases_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    phases = PhaseLines("sft")
    for done in range(3):
        phases("length", done, 2)
    assert capsys.readouterr().err == ""
    line = ProgressLine("sft", "steps")
    for done in range(3):
        line(done, 2, ["loss 1.0"])
    assert capsys.readouterr().err == "sft: 2/2 steps, 0s, loss 1.0\n"
