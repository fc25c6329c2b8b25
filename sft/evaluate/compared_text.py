"""A comparison in words and cells, the same for the terminal and the report."""

from __future__ import annotations

from collections.abc import Iterator

from sft.evaluate.comparison import LEVEL, POWER, Difference
from sft.evaluate.paired import Changed, Comparison, Shown
from sft.utils.tables import counted

DASH = "\u2013"
_LONGEST_QUESTION = 60
HEAD = ("", "A", "B", "B - A", f"{LEVEL:.0%} interval", "p")


def rows(comparison: Comparison) -> list[list[str]]:
    """Cells below HEAD: pass@1, majority@k, cut off and mean tokens, as far as they are known."""
    scores = [f"{score.value:.1%} ({score.low:.1%} to {score.high:.1%})" for score in comparison.scores]
    lines = [["pass@1", *scores, *points(comparison.pass_at_1)]]
    for name, shares in ((f"majority@{comparison.votes}", comparison.majority), ("cut off", comparison.cut_off)):
        if shares is not None:
            lines.append([name, f"{shares.a:.1%}", f"{shares.b:.1%}", *points(shares)])
    if comparison.tokens is not None:
        lengths = comparison.tokens
        lines.append(["mean tokens", f"{lengths.a:,.1f}", f"{lengths.b:,.1f}", *_cells(lengths, 1)])
    return lines


def points(difference: Difference) -> list[str]:
    """A difference of shares in percentage points, its interval and p."""
    return _cells(difference, 100)


def _cells(difference: Difference, scale: int) -> list[str]:
    def signed(value: float) -> str:
        # Not -0.0.
        return f"{round(scale * value, 1) + 0.0:+,.1f}"

    interval = DASH if difference.interval is None else " to ".join(map(signed, difference.interval))
    return [signed(difference.value), interval, p_text(difference.p)]


def p_text(p: float | None) -> str:
    """A p value for reading."""
    return DASH if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def size_text(comparison: Comparison) -> str:
    """How many problems and samples are compared, and what is left out."""
    counts = " and ".join(f"{count:,} of {name}" for name, count in zip("AB", comparison.samples, strict=True))
    told = f"{counted(comparison.problems, 'problem')}, samples: {counts}"
    alone = [f"{count:,} of {name} alone" for name, count in zip("AB", comparison.only, strict=True) if count]
    return told + (f"; left out: problems {' and '.join(alone)}" if alone else "")


def power_text(comparison: Comparison) -> Iterator[str]:
    """What difference is seen, and what the one that was asked for takes."""
    power = comparison.power
    if power.smallest is None:
        yield "Every problem differs by the same amount, so what difference would be seen isn't known."
        return
    yield (
        f"A true difference of {100 * power.smallest:.1f} points is seen in {POWER:.0%} of such comparisons, with p "
        f"below {1 - LEVEL:.2g}."
    )
    if power.size is None:
        return
    ways = [f"{power.problems:,} problems with as many samples of each"]
    if power.samples is not None:
        ways.append(f"{counted(power.samples, 'sample')} of each of these problems from both")
    else:
        ways.append("no number of samples of these alone" if power.known else _UNKNOWN)
    yield f"A difference of {100 * power.size:g} points takes {'; or '.join(ways)}."


_UNKNOWN = "more samples of each, how many isn't known from one sample of a problem"


def change_text(change: Changed) -> str:
    """A problem that changed sides, in a line."""
    name = f"{change.id}: " if change.id is not None else ""
    question = " ".join(change.question.split())
    asked = question if len(question) <= _LONGEST_QUESTION else f"{question[:_LONGEST_QUESTION]}..."
    return f"{name}{asked} Right is {change.gold}; A says {_answer(change.a)}, B {_answer(change.b)}"


def _answer(shown: Shown) -> str:
    given = "nothing" if shown.answer is None else shown.answer
    if not shown.answer_known:
        given = f"what is {shown.verdict}"
    return given if shown.samples == 1 else f"{given} ({shown.right} of {shown.samples} right)"
