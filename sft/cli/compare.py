"""`sft compare`: whether one model is better than another, on the problems that both were asked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.cli.common import file_path, real
from sft.utils.errors import UsageError, UserError, shown

if TYPE_CHECKING:
    from sft.evaluate.paired import Changed, Comparison
    from sft.evaluate.sample_files import Evaluation

TAKES_OVERRIDES = False
EPILOG = """each of them is
  runs/x                   a run: its last stage that is evaluated
  runs/x:NAME              a stage of it, `start`, or another model that was evaluated there (a folder of runs/x/eval)
  runs/x/eval/NAME         the same; also one suite of it, or its samples.jsonl
  FILE.jsonl               samples from elsewhere: lines with question, gold and verdict (right, wrong, undecided); if
                           known with answer, completion, tokens, finished
problems are the same where question and gold answer are; all others are compared with the first"""
_MOST_CHANGES = 5
_LONGEST_LINE = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, and `--detect`."""
    parser.epilog = EPILOG
    parser.add_argument("evaluations", nargs="+", type=file_path, metavar="EVALUATION", help="two or more, as below")
    text = "tell how many problems or samples show a difference of pass@1 of this size: 0.01 is one percentage point"
    parser.add_argument("--detect", type=_size, metavar="SIZE", help=text)


def _size(text: str) -> float:
    size = real(text)
    if not 0 < size < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {shown(text[:60])}")
    return size


@dataclass(frozen=True)
class _Row:
    """The first evaluation and another one on a suite. `corrected`: p of pass@1 for how many there are."""

    a: Evaluation
    b: Evaluation
    found: Comparison
    corrected: float | None


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Compare the first with each of the others on every suite that both have."""
    from sft.evaluate.sample_files import find_evaluation

    names: list[str] = arguments.evaluations
    if len(names) < 2:
        raise UsageError(f"{shown(names[0])} is one evaluation: name what it is compared with, too")
    evaluations = [find_evaluation(name) for name in names]
    for place, evaluation in enumerate(evaluations):
        if _files(evaluation) in map(_files, evaluations[:place]):
            raise UsageError(f"{shown(evaluation.name)} is named twice: its samples can't be compared with themselves")
    found = _compare(evaluations, arguments.detect)
    left_out = _left_out(evaluations)
    arguments.told.update(comparisons=list(map(_as_json, found)), left_out=left_out)
    _show(found, left_out)
    return 0


def _files(evaluation: Evaluation) -> list[Path]:
    return sorted(path.resolve() for path in evaluation.files.values())


def _compare(evaluations: Sequence[Evaluation], detect: float | None) -> list[_Row]:
    from sft.evaluate.comparison import holm
    from sft.evaluate.paired import compare_samples
    from sft.evaluate.sample_files import shared_suites

    first, found = evaluations[0], []
    read = cache(first.read)
    for other in evaluations[1:]:
        shared = shared_suites(first, other)
        if not shared:
            mine, theirs = ", ".join(first.files), ", ".join(other.files)
            raise UserError(shown(f"{first.name} ({mine}) and {other.name} ({theirs}) have no suite in common"))
        for suite, its in shared:
            found.append((other, compare_samples(read(suite), other.read(its), detect)))
    corrected = holm([comparison.pass_at_1.p for _, comparison in found])
    return [_Row(first, other, comparison, p) for (other, comparison), p in zip(found, corrected, strict=True)]


def _left_out(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The suites that the first or another one has alone."""
    from sft.evaluate.sample_files import shared_suites

    first, left = evaluations[0], []
    for other in evaluations[1:]:
        shared = shared_suites(first, other)
        for place, (mine, theirs) in enumerate(((first, other), (other, first))):
            known = {pair[place] for pair in shared}
            left += [
                {"suite": suite, "only_in": mine.name, "not_in": theirs.name}
                for suite in mine.files
                if suite not in known
            ]
    return left


def _as_json(row: _Row) -> dict[str, Any]:
    return {"a": row.a.name, "b": row.b.name, **row.found.as_json(), "p_holm": row.corrected}


# ---- the terminal ----


def _show(found: Sequence[_Row], left_out: Sequence[dict[str, Any]]) -> None:
    for place, row in enumerate(found):
        if place:
            print()
        if not place or found[place - 1].b is not row.b:
            print(f"A  {shown(row.a.name)}\nB  {shown(row.b.name)}\n")
        _show_one(row, len(found))
    for left in left_out:
        print(f"left out: suite {shown(left['suite'])} is in {shown(left['only_in'])}, not in {shown(left['not_in'])}")


def _show_one(row: _Row, comparisons: int) -> None:
    from sft.cli.common import console
    from sft.evaluate.compared_text import HEAD, p_text, power_text, rows, size_text
    from sft.utils.tables import numbers_table

    found, out = row.found, console()
    title = f"{shown(found.suite)}: {size_text(found)}"
    out.print(numbers_table(HEAD, rows(found), text={"": 12, "A": 20, "B": 20}, title=title, width=out.width))
    if comparisons > 1 and row.corrected is not None:
        print(f"p of pass@1, corrected for {comparisons} comparisons (Holm): {p_text(row.corrected)}")
    for line in power_text(found):
        print(line)
    for note in found.notes:
        print(f"note: {shown(note)}")
    for word, changes in (("gained", found.gained), ("lost", found.lost)):
        _show_changes(word, changes)


def _show_changes(word: str, changes: Sequence[Changed]) -> None:
    from sft.evaluate.compared_text import change_text
    from sft.utils.tables import counted

    if not changes:
        print(f"{word}: no problem")
        return
    more = f", {_MOST_CHANGES} of them (--json has all)" if len(changes) > _MOST_CHANGES else ""
    print(f"{word}: {counted(len(changes), 'problem')}{more}")
    for change in changes[:_MOST_CHANGES]:
        line = shown(change_text(change))
        print(f"  {line[:_LONGEST_LINE]}{'...' if len(line) > _LONGEST_LINE else ''}")
