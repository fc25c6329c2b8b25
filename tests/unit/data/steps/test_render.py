"""The step `render`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from step_toys import context, entry, record, run_rows

from sft.data.read.outcomes import Dropped, Kept
from sft.data.read.record import Record

OPEN_THOUGHTS = (
    "<|begin_of_thought|>\n\n2+2=4\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n\\boxed{4}\n\n<|end_of_solution|>"
)
HARMONY = "<|channel|>analysis<|message|>2+2=4<|end|><|start|>assistant<|channel|>final<|message|>\\boxed{4}<|return|>"
CANONICAL = "<think>\n2+2=4\n</think>\n\n\\boxed{4}"


def render(folder: Path, item: Record, **settings: Any) -> Record:
    """The record that `render` keeps, measured with the built-in tokenizer."""
    (outcome,) = run_rows("render", [item], context(folder, tokenizer="tiny"), **settings)
    assert isinstance(outcome, Kept)
    return outcome.record


def talk(*contents: str, system: str | None = None, tools: str | None = None) -> Record:
    """A conversation of user and assistant by turns."""
    item = record()
    item.messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    if system is not None:
        item.messages.insert(0, {"role": "system", "content": system, **({"tools": tools} if tools else {})})
    return item


@pytest.mark.parametrize(
    ("completion", "notes"),
    [
        (CANONICAL, None),
        ("2+2=4\n</think>\n\n\\boxed{4}", {"opened": True}),
        (OPEN_THOUGHTS, {"marks": "open_thoughts", "unwrapped": True}),
        (HARMONY, {"marks": "harmony"}),
        ("<reasoning>2+2=4</reasoning>\\boxed{4}", {"marks": "reasoning"}),
    ],
)
def test_marks_are_normalized_stripped_or_kept(tmp_path: Path, completion: str, notes: dict[str, Any] | None) -> None:
    item = render(tmp_path, record(completion=completion))
    assert item.completion == CANONICAL
    assert item.facts.get("render") == notes
    item = render(tmp_path, record(completion=completion), think="strip")
    assert item.completion == "\\boxed{4}"
    assert item.facts["render"]["stripped"] == 1
    if completion != HARMONY:
        item = render(tmp_path, record(completion=completion), think="keep", history_think="keep")
        assert item.completion == completion and "render" not in item.facts


def test_harmony_that_is_kept_spells_a_control_token_out(tmp_path: Path) -> None:
    (outcome,) = run_rows("render", [record(completion=HARMONY)], context(tmp_path, tokenizer="tiny"), think="keep")
    assert isinstance(outcome, Dropped)
    assert outcome.reason == "control_token" and "<|end|>" in outcome.detail


def test_only_answers_before_the_last_user_lose_their_thinking(tmp_path: Path) -> None:
    contents = ("a?", "<think>x</think>A", "b?", "<think>y</think>B")
    item = render(tmp_path, talk(*contents))
    assert [m["content"] for m in item.messages or []] == ["a?", "A", "b?", "<think>y</think>B"]
    assert item.facts["render"] == {"history_stripped": 1}
    item = render(tmp_path, talk(*contents), history_think="keep")
    assert [m["content"] for m in item.messages or []] == list(contents)
    # A tool's turn ends no question: what was thought before the call is still seen after it.
    item = talk("a?", "<think>x</think>call", "result", "<think>y</think>A")
    assert item.messages is not None
    item.messages[2]["role"] = "tool"
    assert [m["content"] for m in render(tmp_path, item).messages or []][1] == "<think>x</think>call"


@pytest.mark.parametrize("think", ["normalize", "strip"])
@pytest.mark.parametrize("broken", ["<think>x", "<think>x</think>y</think>z", "<|begin_of_thought|>x"])
def test_broken_marks_are_left_for_quality(tmp_path: Path, think: str, broken: str) -> None:
    item = render(tmp_path, record(completion=broken), think=think)
    assert item.completion == broken
    assert item.facts["render"] == {"broken": 1}


def test_an_answer_that_is_nothing_but_thinking_cannot_be_stripped(tmp_path: Path) -> None:
    place = context(tmp_path, tokenizer="tiny")
    only = "<think>x</think>\n"
    (outcome,) = run_rows("render", [record(completion=only)], place, think="strip")
    assert isinstance(outcome, Dropped) and outcome.reason == "no_answer"
    assert outcome.record.completion == only
    (outcome,) = run_rows("render", [talk("a?", only, "b?", "B")], place)
    assert isinstance(outcome, Dropped) and outcome.reason == "no_answer" and "message 1" in outcome.detail


@pytest.mark.parametrize(
    ("settings", "own", "expected", "note"),
    [
        ({}, "Old.", "Old.", None),
        ({}, None, None, None),
        ({"system_prompt": "New."}, "Old.", "Old.", None),
        ({"system_prompt": "New."}, None, "New.", "added"),
        ({"system": "drop"}, "Old.", None, "dropped"),
        ({"system": "drop"}, None, None, None),
        ({"system": "replace", "system_prompt": "New."}, "Old.", "New.", "replaced"),
        ({"system": "replace", "system_prompt": "New."}, "New.", "New.", None),
        ({"system": "replace", "system_prompt": "New."}, None, "New.", "added"),
    ],
)
def test_system_messages_follow_the_policy(
    tmp_path: Path, settings: dict[str, str], own: str | None, expected: str | None, note: str | None
) -> None:
    item = render(tmp_path, talk("a?", "A", system=own), **settings)
    assert [m["content"] for m in item.messages or [] if m["role"] == "system"] == ([expected] if expected else [])
    assert [m["content"] for m in item.messages or []][-2:] == ["a?", "A"]
    assert item.facts.get("render", {}).get("system") == note


def test_the_tools_of_a_system_message_outlive_it(tmp_path: Path) -> None:
    item = render(tmp_path, talk("a?", "A", system="Old.", tools="[f]"), system="drop")
    assert (item.messages or [])[0] == {"role": "system", "content": "", "tools": "[f]"}
    item = render(tmp_path, talk("a?", "A", system="Old.", tools="[f]"), system="replace", system_prompt="New.")
    assert (item.messages or [])[0] == {"role": "system", "content": "New.", "tools": "[f]"}


def test_the_prompt_template_goes_round_the_first_user_message_alone(tmp_path: Path) -> None:
    item = render(tmp_path, talk("a {x}?", "A", "b?", "B"), prompt_template="{prompt} Use \\boxed{}.")
    assert [m["content"] for m in item.messages or []] == ["a {x}? Use \\boxed{}.", "A", "b?", "B"]
    assert item.problem == "What is 2+2?"
    assert item.facts["render"] == {"prompt_template": True}


def test_every_record_has_its_outcome_in_order(tmp_path: Path) -> None:
    batch = [
        record(id="0", completion=None),
        record(id="1", completion="<think>x</think>"),
        record(id="2", completion=CANONICAL),
        record(id="3", completion="He said <|end|>."),
        record(id="4", completion=OPEN_THOUGHTS),
    ]
    outcomes = run_rows("render", batch, context(tmp_path, tokenizer="tiny"), think="strip")
    assert [outcome.record.id for outcome in outcomes] == list("01234")
    assert [getattr(outcome, "reason", "kept") for outcome in outcomes] == [
        "kept",
        "no_answer",
        "kept",
        "control_token",
        "kept",
    ]


def test_tokens_are_those_of_the_published_chat_template(tmp_path: Path, shared_dir: Path, phi: Any) -> None:
    tokenizer = str(shared_dir / "models" / "Phi-4-mini-flash-reasoning")
    items = [record(id=str(n), completion=text) for n, text in enumerate((HARMONY, OPEN_THOUGHTS, CANONICAL))]
    outcomes = run_rows("render", items, context(tmp_path, tokenizer=tokenizer), system_prompt="Think.")
    messages = [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": CANONICAL},
    ]
    expected = len(phi.apply_chat_template(messages, tokenize=True, return_dict=False))
    trained = len(phi(f"{CANONICAL}<|end|><|endoftext|>", add_special_tokens=False)["input_ids"])
    for outcome in outcomes:
        assert isinstance(outcome, Kept)
        assert (outcome.record.tokens, outcome.record.trained) == (expected, trained)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"system": "replace"}, "system_prompt"),
        ({"system": "drop", "system_prompt": "x"}, "system: replace"),
        ({"prompt_template": "x"}, "{prompt}"),
        ({"think": "remove"}, "normalize"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said.replace("{", r"\{")):
        entry("render", **settings)
