"""Samples are paired by what was asked, whatever their order, number and id; and what else is different is told."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from sample_toys import SETTINGS, sample, samples_of, write_samples

from sft.evaluate.compared_text import change_text
from sft.evaluate.majority import majority_at_k
from sft.evaluate.paired import Comparison, compare_samples
from sft.evaluate.sample_files import SuiteSamples, read_suite
from sft.utils.errors import UserError

SOLVED = [[True] * 4, [True, True, True, False], [False] * 4, [True, False, False, False], [True, True, False, False]]
LATER = [[True] * 4, [False, False, False, True], [True] * 4, [True, True, True, False], [True, True, True, True]]


def held(samples: list[dict[str, Any]], settings: dict[str, Any] | None = None, name: str = "a") -> SuiteSamples:
    return SuiteSamples("math", Path(f"{name}.jsonl"), samples, SETTINGS if settings is None else settings)


def compared(a: list[dict[str, Any]], b: list[dict[str, Any]], **settings: Any) -> Comparison:
    return compare_samples(held(a), held(b, {**SETTINGS, **settings}, "b"))


def test_everything_is_of_the_problems_of_both() -> None:
    a, b = samples_of(SOLVED), samples_of(LATER)
    found = compared([*a, sample(70, 0, True)], [*b, sample(80, 0, False), sample(81, 0, True)])
    assert (found.problems, found.only, found.samples) == (5, (1, 2), (20, 20))
    assert found.pass_at_1.a == pytest.approx(10 / 20) and found.pass_at_1.b == pytest.approx(16 / 20)
    assert [score.value for score in found.scores] == [pytest.approx(0.5), pytest.approx(0.8)]
    assert found.votes == 4 and found.majority is not None
    votes = [[(s["answer"], s["verdict"] == "right") for s in a if s["problem"] == p] for p in range(5)]
    assert found.majority.a == pytest.approx(majority_at_k(votes, 4))
    assert found.tokens is not None and (found.tokens.a, found.tokens.value) == (21.5, 0.0)
    assert found.cut_off is not None and found.cut_off.value == 0.0


def test_pairs_are_content_not_places() -> None:
    a, b = samples_of(SOLVED), samples_of(LATER)
    plain = compared(a, b)
    mixed = [{**s, "problem": 900 - s["problem"], "id": f"other-{s['problem']}"} for s in b]
    random.Random(0).shuffle(mixed)
    again = compared(a, mixed)
    assert again.pass_at_1.interval == pytest.approx(plain.pass_at_1.interval)
    assert again.pass_at_1.value == pytest.approx(plain.pass_at_1.value) and again.samples == plain.samples
    assert (again.problems, again.only) == (5, (0, 0)) and len(again.gained) == len(plain.gained)
    # A problem that stands twice in a suite is one, with twice the samples.
    twice = compared([*a, *({**s, "problem": s["problem"] + 50} for s in a)], b)
    assert (twice.problems, twice.samples) == (5, (40, 20))


def test_questions_with_other_gold_answers_are_no_pairs() -> None:
    a, b = samples_of(SOLVED), samples_of(LATER)
    other = [{**s, "gold": "7"} if s["problem"] == 1 else s for s in b]
    found = compared(a, other)
    assert (found.problems, found.only) == (4, (1, 1))
    assert "Left out, because their gold answers differ: 1 question of both." in found.notes
    with pytest.raises(UserError, match=r"a\.jsonl and b\.jsonl share no problem"):
        compared(a, [{**s, "gold": "7"} for s in b])


def test_changed_sides_with_both_answers() -> None:
    found = compared(samples_of(SOLVED), samples_of(LATER))
    # Half of the samples is no side: the last problem hasn't changed.
    assert [(change.id, change.a.right, change.b.right) for change in found.gained] == [("p2", 0, 4), ("p3", 1, 3)]
    (lost,) = found.lost
    assert (lost.id, lost.question, lost.gold) == ("p1", "Ten times 1?", "10")
    assert (lost.a.answer, lost.a.verdict, lost.a.completion) == ("10", "right", "It is 10, I say.")
    assert lost.b.answer == "-1" and lost.b.verdict == "wrong" and lost.b.share == 0.25
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told["lost"][0]["b"]["answer"] == "-1" and len(told["gained"]) == 2


def test_the_commonest_answer_is_shown() -> None:
    a = [sample(0, n, False, answer=answer) for n, answer in enumerate(["3", "8", "8", None])]
    (change,) = compared(a, samples_of([[True] * 4])).gained
    assert change.a.answer == "8"


def test_votes_and_samples_may_differ_in_number() -> None:
    found = compared(samples_of([[True] * 4, [False] * 4]), samples_of([[True] * 3, [False] * 3]))
    assert found.votes == 3 and found.samples == (8, 6)
    assert compared(samples_of([[True] * 2, [False] * 2]), samples_of([[True], [False]])).majority is None


def test_what_samples_dont_say_isnt_told() -> None:
    bare = [{"question": s["question"], "gold": s["gold"], "verdict": s["verdict"]} for s in samples_of(SOLVED)]
    found = compare_samples(held(bare, {}), held(samples_of(LATER), name="b"))
    assert found.cut_off is None and found.tokens is None and found.pass_at_1.b == pytest.approx(0.8)
    assert found.lost[0].a.completion is None and found.lost[0].id == "p1"
    assert "How the samples of A were made isn't known: maybe not alike." in found.notes


def without(samples: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in s.items() if key not in keys} for s in samples]


def test_an_answer_that_isnt_known_is_no_silence() -> None:
    """Without votes against it, one right sample of four would win."""
    a, b = samples_of(SOLVED), samples_of(LATER)
    for mine, theirs in (
        (without(a, "answer"), b),
        (a, without(b, "answer")),
        (a, [*b[1:], *without(b[:1], "answer")]),
    ):
        found = compared(mine, theirs)
        assert found.majority is None and found.as_json()["majority"] is None
    silent = [{**s, "answer": None} if s["verdict"] == "wrong" else s for s in a]
    found = compared(silent, b)
    # Null is silence: all but the problem that nobody solves are won by their right samples.
    assert found.majority is not None and found.majority.a == pytest.approx(4 / 5)
    (lost,) = compared(without(a, "answer"), b).lost
    assert change_text(lost) == "p1: Ten times 1? Right is 10; A says what is right (3 of 4 right), B -1 (1 of 4 right)"


def test_words_and_prompts_that_arent_known_arent_compared() -> None:
    a, b = samples_of(SOLVED), samples_of(LATER)
    bare = ("answer", "completion", "prompt")
    same = "Both gave the same answers, word for word."
    assert compared(without(a, *bare), without(a, *bare)).notes == []
    assert compared(without(a, "prompt"), b).notes == compared(a, without(b, "prompt")).notes == []
    assert compared(without(a, *bare), b).notes == compared(a, without(b, *bare)).notes == []
    assert compared(without(a, "completion"), a).notes == [same]
    # A conversation is no prompt as a model reads it.
    assert compared([{**s, "prompt": [{"role": "user"}]} for s in a], b).notes == []
    (note,) = compared(a, [*b[4:], *({**s, "prompt": "Q"} for s in b[:4])]).notes
    assert note.startswith("1 of the 5 problems were asked with another prompt")


def test_samples_from_before_questions_were_kept_are_paired_by_prompt() -> None:
    old = [{key: value for key, value in s.items() if key != "question"} for s in samples_of(SOLVED)]
    assert compared(old, samples_of(LATER)).problems == 5


def test_what_is_different_is_told() -> None:
    a, b = samples_of(SOLVED), samples_of(LATER)
    assert compared(a, b, seed=3, batch_size=2, samples_per_problem=9).notes == []
    (note,) = compared(a, b, temperature=0.0, max_new_tokens=4096).notes
    assert note.startswith("Not made alike: max_new_tokens 512 and 4096, temperature 0.6 and 0:")
    assert compared(a, b, min_p=0.1).notes[0].startswith("Not made alike: min_p not set and 0.1:")
    (note,) = compared(a, [{**s, "prompt": "Q: " + s["question"]} for s in b]).notes
    assert note.startswith("5 of the 5 problems were asked with another prompt")
    (note,) = compared(a, [{**s, "verdict": "undecided"} if s["problem"] == 2 else s for s in b]).notes
    assert note == "Undecided answers count as not right: 0 of A, 4 of B."
    (same, other) = compared(a, [{**s, "verdict": "wrong"} for s in a]).notes
    assert other == "10 answers of B were judged otherwise than A's, word for word the same: by other rules."
    assert compared(a, a).notes == [same] == ["Both gave the same answers, word for word."]
    assert compared(a, b[1:]).notes == ["B has from 3 to 4 samples of a problem."]


# ---- files ----


def test_whole_files_are_read_and_torn_lines_told(tmp_path: Path) -> None:
    samples = samples_of(SOLVED)
    path = write_samples(tmp_path / "math", samples)
    found = read_suite(path, "math")
    assert found.samples == samples and found.notes == () and found.settings["temperature"] == 0.6
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace("right", "wrong")
    path.write_text("\n".join(lines)[:-9] + "\n")
    found = read_suite(path, "math")
    assert len(found.samples) == len(samples) - 2
    assert [note.partition(" ")[2] for note in found.notes] == [
        "was changed after it was scored.",
        f"of 20 lines of {path} are torn, changed or repeated, and are left out.",
    ]


def test_unfinished_evaluations_are_refused(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "math", samples_of(SOLVED))
    path.with_name("metrics.json").unlink()
    with pytest.raises(UserError, match="isn't finished, and the answers that come first are the short ones"):
        read_suite(path, "math")
    # By itself the same file says nothing of that.
    path.with_name("progress.json").unlink()
    assert len(read_suite(path, "math").samples) == 20


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl:2: not a line of JSON"),
        ("[1]", "is no JSON object"),
        ('{"gold": "1", "verdict": "right"}', "has a question"),
        ('{"question": "1", "verdict": "right"}', "and a gold answer"),
        ('{"question": "1", "gold": 1, "verdict": "correct"}', "verdict is 'correct', not one of right, wrong"),
        ('{"question": "1", "gold": 1, "verdict": "right", "answer": [1]}', r"answer is no text: \[1\]"),
    ],
)
def test_lines_from_elsewhere_that_cant_be_used_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "1+1?", "gold": 2, "verdict": "right", "answer": 2}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_suite(path, "a")


def test_files_from_elsewhere_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"question": "1+1?", "gold": 2, "verdict": "right", "answer": 2}\n')
    (found,) = read_suite(path, "a").samples
    assert found["answer"] == "2"
    path.write_text("\n")
    with pytest.raises(UserError, match="has no samples"):
        read_suite(path, "a")
