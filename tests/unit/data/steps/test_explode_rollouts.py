"""The step `explode_rollouts`."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from step_toys import context, entry, record, run_rows

from sft.data.read.outcomes import Dropped, Replaced
from sft.data.read.record import Record
from sft.data.steps import step_class
from sft.data.steps.context import Context, Templates

TEMPLATES = Templates(prompt_template="{prompt} Answer in \\boxed{}.", system_prompt="Think.")
OPENR1 = {
    "column": "generations",
    "flags": {
        "complete": "is_reasoning_complete",
        "verified": "correctness_math_verify",
        "judged": "correctness_llama",
    },
    "require": ["verified", "judged"],
    "require_all": ["complete"],
}


def parent(rollouts: Any, **carried: Any) -> Record:
    """A problem with its rollouts in `generations`."""
    return record(completion=None, id="p", answer="4", domain="math", carried={"generations": rollouts, **carried})


def explode(place: Context, item: Record, **settings: Any) -> Replaced:
    """What becomes of one row."""
    (outcome,) = run_rows("explode_rollouts", [item], place, **{"column": "generations", **settings})
    assert isinstance(outcome, Replaced)
    return outcome


@pytest.fixture
def place(tmp_path: Path) -> Context:
    """A context with the built-in tokenizer and templates."""
    return context(tmp_path, tokenizer="tiny", templates=TEMPLATES)


def test_openr1_rows_become_one_row_a_rollout(place: Context) -> None:
    item = parent(
        ["<think>a</think>4", "<think>b</think>5", "<think>c", "<think>d</think>4", "<think>e</think>4"],
        is_reasoning_complete=[True, True, False, True, True],
        correctness_math_verify=[True, False, True, None],
        correctness_llama=None,
        source="olympiads",
    )
    outcome = explode(place, item, **OPENR1)
    (kept,) = outcome.kept
    assert kept.id == "p#g0" and kept.problem_id == item.problem_id and kept.place == item.place
    assert (kept.answer, kept.domain, kept.problem) == ("4", "math", "What is 2+2?")
    assert kept.messages == [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "What is 2+2? Answer in \\boxed{}."},
        {"role": "assistant", "content": "<think>a</think>4"},
    ]
    assert kept.tokens is not None and kept.trained is not None and 0 < kept.trained < kept.tokens
    assert kept.carried == {
        "source": "olympiads",
        "is_reasoning_complete": True,
        "correctness_math_verify": True,
        "correctness_llama": None,
    }
    # Rollout 1 is false by one flag, unknown by the other: undecided. Of 0 (right) and 2 (cut off) the flags decide.
    assert {drop.record.id: drop.reason for drop in outcome.dropped} == {
        "p#g1": "flag_missing",
        "p#g2": "flag_false",
        "p#g3": "flag_missing",
        "p#g4": "flag_missing",
    }
    assert kept.facts["explode_rollouts"] == {
        "index": 0,
        "of": 5,
        "flags": {"complete": True, "verified": True, "judged": None},
        "pass_rate": 0.5,
    }
    assert {drop.record.facts["explode_rollouts"]["pass_rate"] for drop in outcome.dropped} == {0.5}
    assert item.carried["generations"] and item.messages is None


def test_a_missing_flag_may_be_kept_and_flags_alone_only_noted(place: Context) -> None:
    item = parent(["a", "b", "c"], good=[True, False])
    outcome = explode(place, item, flags={"good": "good"}, require=["good"], missing_flag="keep")
    assert [child.id for child in outcome.kept] == ["p#g0", "p#g2"]
    assert [drop.reason for drop in outcome.dropped] == ["flag_false"]
    outcome = explode(place, item, flags={"good": "good"})
    assert [child.facts["explode_rollouts"]["flags"]["good"] for child in outcome.kept] == [True, False, None]
    assert {child.facts["explode_rollouts"]["pass_rate"] for child in outcome.kept} == {0.5}
    outcome = explode(place, item)
    assert {child.facts["explode_rollouts"]["pass_rate"] for child in outcome.kept} == {None}


def test_rollouts_may_be_mappings_messages_or_conversations(place: Context) -> None:
    asked = {"role": "user", "content": "What is 3+3?"}
    rollouts = [
        {"role": "assistant", "content": "4", "reasoning_content": "I add."},
        {"from": "gpt", "value": "4"},
        [asked, {"role": "assistant", "content": "6"}],
        [{"role": "system", "content": "Own."}, {"role": "assistant", "content": "4"}],
        [{"role": "system", "content": "Own."}, asked, {"role": "assistant", "content": "6"}],
    ]
    outcome = explode(place, parent(rollouts))
    assert not outcome.dropped
    said = [[message["content"] for message in child.messages or []] for child in outcome.kept]
    question = "What is 2+2? Answer in \\boxed{}."
    assert said == [
        ["Think.", question, "<think>\nI add.\n</think>\n\n4"],
        ["Think.", question, "4"],
        ["Think.", "What is 3+3?", "6"],
        ["Own.", question, "4"],
        ["Own.", "What is 3+3?", "6"],
    ]
    item = parent([{"solution": "4", "is_correct": True}, {"solution": "5", "is_correct": False}, {"solution": None}])
    outcome = explode(place, item, key="solution", flags={"right": ".is_correct"}, require=["right"])
    assert [child.completion for child in outcome.kept] == ["4"]
    assert [drop.reason for drop in outcome.dropped] == ["flag_false", "empty_rollout"]


def test_rollouts_keep_their_calls_and_what_is_context_only(tmp_path: Path) -> None:
    place = context(tmp_path, templates=TEMPLATES)
    asked, call = {"role": "user", "content": "2+2?"}, {"name": "add", "arguments": {"a": 2}}
    conversation = [
        asked,
        {"role": "assistant", "content": "5", "weight": 0},
        asked,
        {"role": "assistant", "content": "4"},
    ]
    item = parent([conversation, {"content": None, "tool_calls": [call]}])
    item.tools = '[{"name": "add"}]'
    first, second = explode(place, item).kept
    assert (first.untrained, second.untrained) == ([2], []) and first.tools == second.tools == item.tools
    assert [message["role"] for message in first.messages or []] == ["system", *["user", "assistant"] * 2]
    said = (second.messages or [])[-1]
    assert said["content"] == "" and said["tool_calls"] == [{"type": "function", "function": call}]


@pytest.mark.parametrize(
    ("rollout", "reason"),
    [
        ("", "empty_rollout"),
        (" \n", "empty_rollout"),
        (None, "empty_rollout"),
        ([], "empty_rollout"),
        ({"role": "assistant", "content": " "}, "empty_rollout"),
        (7, "wrong_type"),
        ({"text": "4"}, "wrong_type"),
        ({"role": "assistant", "content": 4}, "wrong_type"),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "wrong_type"),
        ([{"role": "user", "content": "a"}], "no_assistant_turn"),
        ("he said <|end|>", "control_token"),
        ("\ud800", "invalid_unicode"),
    ],
)
def test_a_rollout_that_cannot_be_used_is_dropped_alone(place: Context, rollout: Any, reason: str) -> None:
    outcome = explode(place, parent(["4", rollout, "5"]))
    assert [child.completion for child in outcome.kept] == ["4", "5"]
    (drop,) = outcome.dropped
    assert (drop.record.id, drop.reason) == ("p#g1", reason) and drop.detail


@pytest.mark.parametrize(
    ("rollouts", "flags", "reason"),
    [
        (None, None, "no_rollouts"),
        ([], None, "no_rollouts"),
        ("4", None, "wrong_type"),
        ({}, None, "wrong_type"),
        (["4"], True, "wrong_type"),
        (["4"], [True, False], "wrong_type"),
    ],
)
def test_a_row_that_cannot_be_exploded_is_dropped_whole(place: Context, rollouts: Any, flags: Any, reason: str) -> None:
    (outcome,) = run_rows(
        "explode_rollouts", [parent(rollouts, good=flags)], place, column="generations", flags={"good": "good"}
    )
    assert isinstance(outcome, Dropped) and outcome.reason == reason and outcome.detail


def test_a_flag_that_is_neither_true_nor_false_and_an_answer_without_a_question(place: Context) -> None:
    outcome = explode(place, parent(["4", "5"], good=["stop", 1]), flags={"good": "good"}, require=["good"])
    assert [child.id for child in outcome.kept] == ["p#g1"]
    assert [drop.reason for drop in outcome.dropped] == ["wrong_type"]
    item = parent(["4"])
    item.problem = None
    assert [drop.reason for drop in explode(place, item).dropped] == ["no_problem"]


def test_aligned_columns_become_the_rollout_s_own_value(place: Context) -> None:
    outcome = explode(place, parent(["4", "5"], finish_reasons=["stop"]), aligned=["finish_reasons"])
    assert [child.carried for child in outcome.kept] == [{"finish_reasons": "stop"}, {"finish_reasons": None}]


def test_the_draw_of_rollouts_depends_on_seed_and_row_alone(tmp_path: Path) -> None:
    items = [parent([str(i) for i in range(8)]) for _ in range(40)]
    for number, item in enumerate(items):
        item.id, item.problem = f"p{number}", f"What is {number}?"

    def drawn(rows: list[Record], seed: int) -> dict[str, list[int]]:
        place = context(tmp_path, tokenizer="tiny", seed=seed)
        outcomes = run_rows("explode_rollouts", rows, place, column="generations", max_rollouts=3)
        for outcome in outcomes:
            assert isinstance(outcome, Replaced)
            assert len(outcome.kept) == 3
            assert [drop.reason for drop in outcome.dropped] == ["over_max_rollouts"] * 5
        return {
            outcome.record.id: [child.facts["explode_rollouts"]["index"] for child in outcome.kept]
            for outcome in outcomes
            if isinstance(outcome, Replaced)
        }

    first = drawn(items, 1)
    shuffled = items[:]
    random.Random(0).shuffle(shuffled)
    assert drawn(shuffled, 1) == first and drawn(items[3:5], 1) == {id: first[id] for id in ("p3", "p4")}
    assert drawn(items, 2) != first
    assert {index for indices in first.values() for index in indices} == set(range(8))


def test_the_columns_it_needs() -> None:
    config = entry("explode_rollouts", **OPENR1, aligned=["finish_reasons", "is_reasoning_complete"]).config
    assert step_class("explode_rollouts").carried(config) == {
        *("generations", "is_reasoning_complete", "correctness_math_verify", "correctness_llama", "finish_reasons")
    }


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"require": ["verifed"]}, "did you mean verified"),
        ({"require_all": ["x"]}, "no flag 'x'"),
        ({"aligned": ["generations"]}, "the rollouts themselves"),
        ({"max_rollouts": 0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        entry("explode_rollouts", **{**OPENR1, **changed})


flag_lists = st.none() | st.lists(st.sampled_from([True, False, None]), max_size=5)
rollout_lists = st.lists(
    st.sampled_from(["4", "<think>x</think>5", "", None, 7, "<|end|>", {"content": "6"}]), max_size=5
)


def expected_reason(rollout: Any, flags: dict[str, bool | None]) -> str | None:
    """What should become of a rollout under OPENR1's requirements, before any draw."""
    if rollout in ("", None):
        return "empty_rollout"
    if rollout == 7:
        return "wrong_type"
    answers = {flags["verified"], flags["judged"]}
    if flags["complete"] is False or answers == {False}:
        return "flag_false"
    if flags["complete"] is None or True not in answers:
        return "flag_missing"
    return "control_token" if rollout == "<|end|>" else None


@given(
    st.lists(st.tuples(rollout_lists, flag_lists, flag_lists, flag_lists), max_size=6), st.none() | st.integers(1, 3)
)
@settings(max_examples=150, deadline=None)
def test_every_rollout_is_in_exactly_one_place(rows: list[Any], most: int | None) -> None:
    names = ("is_reasoning_complete", "correctness_math_verify", "correctness_llama")
    items = []
    for number, (rollouts, *flags) in enumerate(rows):
        items.append(parent(rollouts, **dict(zip(names, flags, strict=True))))
        items[-1].id = f"p{number}"
    with tempfile.TemporaryDirectory() as folder:
        place = context(Path(folder), tokenizer="tiny")
        outcomes = run_rows("explode_rollouts", items, place, **OPENR1, max_rollouts=most)
    assert [outcome.record for outcome in outcomes] == items
    for item, outcome in zip(items, outcomes, strict=True):
        rollouts = item.carried["generations"]
        if isinstance(outcome, Dropped):
            too_long = any(len(item.carried[name] or []) > len(rollouts) for name in names)
            assert outcome.reason == ("no_rollouts" if not rollouts else "wrong_type") and (not rollouts or too_long)
            continue
        assert isinstance(outcome, Replaced)
        places = [child.id for child in outcome.kept] + [drop.record.id for drop in outcome.dropped]
        assert sorted(places) == [f"{item.id}#g{index}" for index in range(len(rollouts))]
        reasons = {drop.record.id: drop.reason for drop in outcome.dropped}
        over = 0
        for index, rollout in enumerate(rollouts):
            flags = {
                name: (item.carried[column] or [])[index : index + 1] or [None]
                for name, column in zip(("complete", "verified", "judged"), names, strict=True)
            }
            reason = expected_reason(rollout, {name: value for name, (value,) in flags.items()})
            found = reasons.get(f"{item.id}#g{index}")
            over += found == "over_max_rollouts"
            assert found == reason or (found == "over_max_rollouts" and reason in (None, "control_token"))
        drawn = len(outcome.kept) + list(reasons.values()).count("control_token")
        assert most is None or drawn <= most
        assert over == 0 or drawn == most
