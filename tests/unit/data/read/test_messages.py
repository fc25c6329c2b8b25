"""What a message may hold beside its text: thinking, calls, weights; each is used, or makes the row bad for a true
reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sft.data.read.columns import ColumnMap, choose_columns
from sft.data.read.conversation import Extras, to_extras, to_messages, to_problem
from sft.data.read.message import UnusableError, context_only, to_message
from sft.data.read.row import BadRow
from sft.recipe.schema import Templates
from sft.utils.errors import UsageError

USER = {"role": "user", "content": "q"}
ONE_BLOCK = "<think>\nT t\n</think>\n\n4"


def _messages(*found: Any) -> Any:
    return to_messages({"m": list(found)}, ColumnMap(messages="m"), Templates())


@pytest.mark.parametrize(
    "said",
    [
        {"reasoning_content": "T t", "content": "4"},
        {"reasoning_content": " T t\n", "content": "4"},
        {"reasoning": "T  t", "thinking": "T t", "reasoning_content": "", "content": "4"},
        {"reasoning_content": "T t", "content": ONE_BLOCK},
        {"reasoning_content": "T t", "content": "<think>T t</think>4"},
        {"reasoning_content": "T t", "content": "T t</think>4"},
        {"reasoning_content": "T t", "content": "T\nt</think>\n\n4"},
        {"reasoning_content": "T t", "content": "<think>\n\n</think>\n\n4"},
        {"reasoning_content": "T t", "content": "</think>4"},
        {"reasoning_content": "T t", "content": "<|begin_of_thought|>T t<|end_of_thought|>4"},
        {"reasoning_content": "<think>T t</think>", "content": "4"},
        {"reasoning_content": "T t\n</think>\n", "content": ONE_BLOCK},
        {"reasoning_content": "  ", "content": ONE_BLOCK},
        {"reasoning_content": "<think></think>", "content": ONE_BLOCK},
        {"thinking": None, "content": ONE_BLOCK},
    ],
)
def test_thinking_that_is_given_twice_is_one_block(said: dict[str, Any]) -> None:
    assert _messages(USER, {"role": "assistant", **said})[1]["content"] == ONE_BLOCK


def test_blank_reasoning_is_none() -> None:
    assert _messages(USER, {"role": "assistant", "content": "4", "reasoning_content": "\n"})[1]["content"] == "4"
    row, mapping = {"p": "q", "c": ONE_BLOCK, "r": "T t"}, ColumnMap(prompt="p", completion="c", reasoning="r")
    assert to_messages(row, mapping, Templates()) == to_messages({**row, "c": "4"}, mapping, Templates())


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"reasoning_content": "T", "content": "<think>another</think>4"}, "thinking_twice"),
        ({"reasoning_content": "T", "content": "another</think>4"}, "thinking_twice"),
        ({"reasoning_content": "T", "thinking": "another", "content": "4"}, "thinking_twice"),
        ({"reasoning_content": "T", "content": "<think>T"}, "broken_thinking"),
        ({"reasoning_content": "T", "content": "<think>T</think><think>T</think>4"}, "broken_thinking"),
        ({"reasoning_content": "<think>T", "content": "4"}, "broken_thinking"),
        ({"reasoning_content": "<think>T</think>4", "content": "4"}, "broken_thinking"),
        ({"reasoning_content": ["T"], "content": "4"}, "wrong_type"),
        ({"content": "4", "weight": 0.5}, "wrong_type"),
        ({"content": "4", "weight": "0"}, "wrong_type"),
        ({"content": "4", "train": "no"}, "wrong_type"),
        ({"content": "4", "tools": [{"name": "f"}]}, "tools"),
        ({"content": None}, "null_content"),
        ({"content": None, "tool_calls": []}, "null_content"),
        ({"content": "4", "tool_calls": {"name": "f"}}, "tool_calls"),
        ({"content": "4", "tool_calls": "f(2)"}, "tool_calls"),
        ({"content": "4", "tool_calls": ["f"]}, "tool_calls"),
        ({"content": "4", "tool_calls": [{"name": "f", "arguments": 3}]}, "tool_calls"),
        ({"content": "4", "tool_calls": [{"function": {"name": ""}}]}, "tool_calls"),
        ({"content": "4", "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}, "wrong_type"),
        ({"content": "4", "tool_calls": [{"name": "f", "arguments": {"x": b"x"}}]}, "wrong_type"),
        ({"content": "4", "tool_calls": [{"name": "f", "arguments": {"x": "\ud800"}}]}, "invalid_unicode"),
        ({"content": "4", "tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}, "tool_calls"),
        ({"content": "4", "function_call": "auto"}, "tool_calls"),
        ({"role": "user", "content": "4", "tool_calls": [{"name": "f"}]}, "tool_calls"),
        ({"role": "user", "content": "4", "train": True}, "untrainable"),
        ({"role": "user", "content": "4", "loss": True}, "untrainable"),
        ({"content": "4", "loss_scale": 0.5}, "wrong_type"),
        ({"content": "4", "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "untrainable"),
        ({"role": "tool", "content": "4", "name": 3}, "wrong_type"),
        ({"role": "system", "content": "4", "tools": {"f": {1, 2}}}, "wrong_type"),
    ],
)
def test_what_cant_be_used_is_bad(said: dict[str, Any], reason: str) -> None:
    bad = _messages(USER, {"role": "assistant", "content": "a"}, USER, {"role": "assistant", **said})
    assert isinstance(bad, BadRow) and bad.reason == reason and "m[3]" in bad.detail


@pytest.mark.parametrize(
    ("said", "untrained"),
    [
        ({}, []),
        ({"weight": 1}, []),
        ({"weight": None, "train": True}, []),
        ({"weight": 0}, [1]),
        ({"weight": 0.0}, [1]),
        ({"train": False}, [1]),
        ({"weight": 1, "train": False}, [1]),
        ({"training": False}, [1]),
        ({"loss": False}, [1]),
        ({"loss": True, "loss_scale": 0.0}, [1]),
    ],
)
def test_messages_that_are_context_only(said: dict[str, Any], untrained: list[int]) -> None:
    answer = {"role": "assistant", "content": "a"}
    messages = _messages({**USER, "weight": 0, "train": False}, {**answer, **said}, USER, answer)
    assert context_only(messages) == untrained
    assert messages == [USER, answer, USER, answer]


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
@pytest.mark.parametrize("many", [False, True])
def test_a_turn_that_is_a_call(many: bool, role: str) -> None:
    call = {"name": "add_up", "arguments": {"a": 2}}
    said = {"from": role, "value": json.dumps([call, call] if many else call), "weight": 0}
    found = _messages(USER, said, {"from": "observation", "value": "4"}, {"from": "gpt", "value": "It is 4."})
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "assistant"]
    assert [one["function"] for one in found[1]["tool_calls"]] == [call] * (2 if many else 1)
    assert context_only(found) == [1]


@pytest.mark.parametrize("wrong", [{"value": None}, {"value": "rain?"}, {"value": '{"name": "f"}', "tool_calls": [1]}])
def test_a_turn_that_names_no_call(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnusableError) as caught:
        to_message({"from": "function_call", **wrong}, "messages[1]")
    assert caught.value.bad.reason == "tool_calls"


ROLES = {
    **{"developer": "system", "function": "tool", "observation": "tool", "tool": "tool", "ipython": "tool"},
    **{"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "assistant": "assistant", "gpt": "assistant"},
    **{"Human": "user", "USER": "user", "human": "user", "System": "system"},
}


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value"), ("role", "value"), ("from", "content")])
@pytest.mark.parametrize(("role", "is_"), ROLES.items())
def test_other_names_of_roles_and_keys(role: str, is_: str, keys: tuple[str, str]) -> None:
    found = _messages({keys[0]: role, keys[1]: "x"}, USER, {"role": "assistant", "content": "a"})
    assert found[0] == {"role": is_, "content": "x"}


@pytest.mark.parametrize(("found", "named"), [({"role": "user"}, "content"), ({"from": "human"}, "value")])
def test_a_message_without_content_is_told_by_the_usual_key(found: dict[str, Any], named: str) -> None:
    with pytest.raises(UnusableError, match=f"m has no '{named}'"):
        to_message(found, "m")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [], "completion": "a"}, "no_messages"),
        ({"prompt": [USER], "completion": []}, "no_messages"),
        ({"prompt": [USER], "completion": [USER]}, "no_assistant_turn"),
        ({"prompt": [USER], "completion": ["a"]}, "wrong_type"),
        ({"prompt": [{"role": "wizard", "content": "x"}], "completion": "a"}, "unknown_role"),
        ({"prompt": [USER], "completion": " "}, "empty_answer"),
        ({"prompt": 3, "completion": "a"}, "wrong_type"),
    ],
)
def test_bad_prompts_and_completions(row: dict[str, Any], reason: str) -> None:
    bad = to_messages(row, ColumnMap(prompt="prompt", completion="completion"), Templates())
    assert isinstance(bad, BadRow) and bad.reason == reason


def test_a_problem_may_be_one_message() -> None:
    mapping = ColumnMap(prompt="p")
    assert to_problem({"p": [USER]}, mapping) == to_problem({"p": "q"}, mapping) == "q"
    bad = to_problem({"p": [{"role": "system", "content": "x"}, USER]}, mapping)
    assert isinstance(bad, BadRow) and "one message" in bad.detail


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": "search"}, "wrong_type"),
        ({"tools": {"name": "f"}}, "wrong_type"),
        ({"tools": ["f"]}, "wrong_type"),
        ({"tools": [{"function": {"name": 3}}]}, "wrong_type"),
        ({"tools": [{"name": "f", "default": b"x"}]}, "wrong_type"),
        ({"chat_template_kwargs": [1]}, "wrong_type"),
        ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": {"y": {1}}}}, "wrong_type"),
    ],
)
def test_bad_tools_and_template_arguments(row: dict[str, Any], reason: str) -> None:
    bad = to_extras(row, ColumnMap(messages="messages"))
    assert isinstance(bad, BadRow) and bad.reason == reason


def test_optional_columns_are_found_in_later_rows_and_can_be_left_out() -> None:
    row = {"tools": [{"name": "f"}], "chat_template_kwargs": '{"x": 1, "y": null}'}
    assert to_extras(row, choose_columns("rows", ["messages"], None)) == Extras('[{"name": "f"}]', {"x": 1})
    assert to_extras(row | {"f": "[]"}, choose_columns("rows", ["messages", "f"], {"tools": "f"})).tools is None  # type: ignore[union-attr]
    out = choose_columns("rows", ["messages", "tools"], {"tools": None, "chat_template_kwargs": None, "system": None})
    assert to_extras(row, out) == Extras(None, {}) and out.described() == {"messages": "messages"}
    assert not out.needed() & {"tools", "system"}
    with pytest.raises(UsageError, match=r"columns\.messages is null"):
        choose_columns("rows", ["messages"], {"messages": None})
