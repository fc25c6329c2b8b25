"""Columns become conversations, or a stated reason why not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.data.read.columns import ColumnMap, choose_columns
from sft.data.read.conversation import question, row_id, to_messages
from sft.data.read.row import BadRow
from sft.recipe.schema import DataSection
from sft.utils.errors import UsageError, UserError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def _data(**keys: Any) -> DataSection:
    return DataSection.model_validate({"sources": [{"path": "x.jsonl"}], **keys})


def _messages(found: Any, column: str = "messages") -> Any:
    return to_messages({column: found}, ColumnMap(messages=column), _data())


@pytest.mark.parametrize(
    ("columns", "given_", "expected"),
    [
        (["question", "answer"], None, {"prompt": "question", "completion": "answer"}),
        (["problem", "solution", "answer"], None, {"prompt": "problem", "completion": "solution"}),
        (["prompt", "completion", "answer", "id"], None, {"prompt": "prompt", "completion": "completion", "id": "id"}),
        (["messages", "prompt", "completion"], None, {"messages": "messages"}),
        (["conversations", "system"], None, {"messages": "conversations", "system": "system"}),
        (["q", "a"], {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}),
        (["q", "answer", "messages"], {"prompt": "q"}, None),
        (["question", "best"], {"completion": "best"}, {"prompt": "question", "completion": "best"}),
        (["chat", "messages"], {"messages": "chat"}, {"messages": "chat"}),
        (["instruction", "input", "output"], None, {"prompt": "instruction", "completion": "output", "input": "input"}),
        (["instruction", "output"], None, {"prompt": "instruction", "completion": "output", "input": "input"}),
        (["instruction", "output"], {"input": None}, {"prompt": "instruction", "completion": "output"}),
        (
            ["instruction", "context", "response"],
            {"completion": "response", "input": "context", "prompt": "instruction"},
            {"prompt": "instruction", "completion": "response", "input": "context"},
        ),
        (["prompt", "input", "completion"], None, {"prompt": "prompt", "completion": "completion"}),
    ],
)
def test_columns_are_found(columns: list[str], given_: dict[str, str] | None, expected: dict[str, str] | None) -> None:
    if expected is None:
        expected = {"prompt": "q", "completion": "answer"}
    assert choose_columns("rows.jsonl", columns, given_).described() == expected


@pytest.mark.parametrize(("about", "asked"), [("2, 3", "Add.\n2, 3"), ("", "Add."), (" ", "Add."), (None, "Add.")])
def test_what_an_instruction_is_about_is_part_of_the_question(about: Any, asked: str) -> None:
    row = {"instruction": "Add.", "input": about, "output": "5"}
    mapping = choose_columns("rows.jsonl", row, None)
    messages = to_messages(row, mapping, _data())
    assert isinstance(messages, list) and [message["content"] for message in messages] == [asked, "5"]
    assert question(row, mapping) == asked


def test_unknown_columns_are_named() -> None:
    with pytest.raises(UserError, match=r"rows.jsonl: .*it has body, head.*\{prompt: question"):
        choose_columns("rows.jsonl", ["head", "body"], None)


@pytest.mark.parametrize(("named", "missing"), [("prompt", "completion"), ("completion", "prompt")])
def test_a_pair_that_is_half_named(named: str, missing: str) -> None:
    with pytest.raises(UserError, match=rf"`columns` names no {missing} beside the {named}.*It has body, head"):
        choose_columns("rows.jsonl", ["head", "body"], {named: "head"})


def test_a_mapped_column_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"columns.prompt names a column 'questoin'.*did you mean 'question'"):
        choose_columns("rows.jsonl", ["question", "answer"], {"prompt": "questoin"})


def test_a_missing_id_column_is_told_and_done_without(caplog: pytest.LogCaptureFixture) -> None:
    chosen = choose_columns("rows.jsonl", ["messages"], {"messages": "messages", "id": "uuid"})
    assert chosen.described() == {"messages": "messages"} and "no column 'uuid' for ids" in caplog.text


def test_both_forms_mapped_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="both"):
        choose_columns("rows.jsonl", ["m", "p"], {"messages": "m", "prompt": "p"})


def test_templates_and_system_prompt() -> None:
    data = _data(
        prompt_template="Box it: \\boxed{}. {prompt}", completion_template="<think>{completion}", system_prompt="S"
    )
    messages = to_messages({"p": "{x}", "c": "y"}, ColumnMap(prompt="p", completion="c"), data)
    assert messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Box it: \\boxed{}. {x}"},
        {"role": "assistant", "content": "<think>y"},
    ]


def test_own_system_message_and_column_win_over_the_prompt() -> None:
    data = _data(system_prompt="S")
    own = {"role": "system", "content": "mine"}
    assert to_messages({"m": [own, USER, ASSISTANT]}, ColumnMap(messages="m"), data) == [own, USER, ASSISTANT]
    by_column = to_messages({"m": [USER, ASSISTANT], "s": "theirs"}, ColumnMap(messages="m", system="s"), data)
    assert by_column == [{"role": "system", "content": "theirs"}, USER, ASSISTANT]


def test_sharegpt_and_parts_and_reasoning() -> None:
    assert _messages([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]) == [USER, ASSISTANT]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _messages([USER, {"role": "assistant", "content": parts}])[1]["content"] == "ab"
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    assert _messages([USER, thought])[1]["content"] == "<think>\n2+2\n</think>\n\n4"


def test_tools_become_text() -> None:
    system = {"role": "system", "content": "s", "tools": [{"name": "add"}]}
    assert _messages([system, USER, ASSISTANT])[0]["tools"] == '[{"name": "add"}]'


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "null_value"),
        ("text", "wrong_type"),
        ([], "no_messages"),
        (["q"], "wrong_type"),
        ([USER], "no_assistant_turn"),
        ([{"content": "q"}, ASSISTANT], "missing_key"),
        ([{"role": "user"}, ASSISTANT], "missing_key"),
        ([{"role": "wizard", "content": "q"}, ASSISTANT], "unknown_role"),
        ([{"role": 3, "content": "q"}, ASSISTANT], "unknown_role"),
        ([{"role": ["user"], "content": "q"}, ASSISTANT], "unknown_role"),
        ([USER, {"role": "assistant", "content": None}], "null_content"),
        ([USER, {"role": "assistant", "content": 4}], "wrong_type"),
        ([USER, {"role": "assistant", "content": [{"type": "image"}]}], "wrong_type"),
        ([USER, {"role": "assistant", "content": " \n"}], "empty_answer"),
        ([{"role": "user", "content": ""}, ASSISTANT], "empty_prompt"),
        ([USER, {"role": "assistant", "content": "a", "tool_calls": [{}]}], "tool_calls"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "invalid_unicode"),
    ],
)
def test_bad_conversations(found: Any, reason: str) -> None:
    bad = _messages(found)
    assert isinstance(bad, BadRow) and bad.reason == reason and bad.detail


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"p": "q"}, "missing_key"),
        ({"p": "q", "c": None}, "null_value"),
        ({"p": 1, "c": "a"}, "wrong_type"),
        ({"p": "q", "c": "\n"}, "empty_answer"),
        ({"p": "", "c": "a"}, "empty_prompt"),
        ({"p": "\udfff", "c": "a"}, "invalid_unicode"),
    ],
)
def test_bad_pairs(row: dict[str, Any], reason: str) -> None:
    bad = to_messages(row, ColumnMap(prompt="p", completion="c"), _data())
    assert isinstance(bad, BadRow) and bad.reason == reason


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tools"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(found=junk)
def test_junk_is_a_conversation_or_bad_but_never_an_error(found: Any) -> None:
    result = _messages(found)
    assert isinstance(result, BadRow) or all(isinstance(m["content"], str) for m in result)


def test_row_id() -> None:
    mapping = ColumnMap(messages="m", id="id")
    assert row_id({"id": 7}, mapping, "rows.jsonl", 3) == "7"
    for unusable in ({"id": None}, {"id": " "}, {"id": "a\nb"}, {"id": ["x"]}, {}):
        assert row_id(unusable, mapping, "rows.jsonl", 3) == "rows.jsonl:3"
