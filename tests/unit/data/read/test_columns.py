"""Columns become conversations, or a stated reason why not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.data.read.columns import ColumnMap, choose_columns
from sft.data.read.conversation import question, row_id, to_extras, to_messages, to_problem
from sft.data.read.message import context_only
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


# ---- what other trainers read ----

ALPACA = {"instruction": "And 3+3?", "input": "", "output": "6"}


def _read(row: dict[str, Any], asked: dict[str, str | None] | None = None) -> Any:
    return to_messages(row, choose_columns("rows.jsonl", row, asked), _data())


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("names", [("instruction", "output"), ("query", "response"), ("prompt", "completion")])
def test_history_is_the_turns_before_and_its_answers_are_trained(names: tuple[str, str], text: bool) -> None:
    history: Any = [["2+2?", "4"], ["And 5+5?", "10"]]
    row = {names[0]: "And 3+3?", names[1]: "6", "history": json.dumps(history) if text else history}
    messages = _read({**row, "system": "Be brief."})
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", "Be brief."),
        *(("user", "2+2?"), ("assistant", "4"), ("user", "And 5+5?"), ("assistant", "10")),
        *(("user", "And 3+3?"), ("assistant", "6")),
    ]
    assert context_only(messages) == []
    assert question(row, choose_columns("rows.jsonl", row, None)) is None


def test_history_may_be_messages_or_come_in_later_rows_or_be_left_out() -> None:
    mapping = choose_columns("rows.jsonl", ["instruction", "output"], None)
    row = {**ALPACA, "history": [USER, ASSISTANT]}
    assert [m["content"] for m in to_messages(row, mapping, _data())] == ["q", "a", "And 3+3?", "6"]  # type: ignore[union-attr]
    assert len(_read(row, {"history": None})) == 2
    assert len(_read({**ALPACA, "turns": [["q", "a"]]}, {"history": "turns"})) == 4
    assert [len(_read({**ALPACA, "history": none})) for none in ([], "", None)] == [2, 2, 2]


@pytest.mark.parametrize("history", [["q", "a"], [["q"]], [["q", "a", "b"]], "earlier: q", 3, [["q", 2]], [["q", ""]]])
def test_a_history_that_is_none_makes_its_row_bad(history: Any) -> None:
    assert isinstance(_read({**ALPACA, "history": history}), BadRow)


def test_a_problem_with_turns_before_it_is_bad() -> None:
    row = {"instruction": "And 3+3?", "history": [["q", "a"]]}
    mapping = choose_columns("rows.jsonl", row, None, problems=True)
    assert isinstance(to_problem(row, ColumnMap(prompt=mapping.prompt)), BadRow)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "", "input": "2+2?", "output": "4"}, ["2+2?", "4"]),
        ({"instruction": "Sum up.", "context": "Long.", "response": "S"}, ["Sum up.\nLong.", "S"]),
        ({"system_prompt": "Be brief.", "question": "2+2?", "response": "4"}, ["Be brief.", "2+2?", "4"]),
    ],
)
def test_other_names_of_what_stands_beside(row: dict[str, str], messages: list[str]) -> None:
    assert [message["content"] for message in _read(row)] == messages


def test_tools_may_be_called_functions() -> None:
    row = {"messages": [USER, ASSISTANT], "functions": [{"name": "f"}]}
    assert to_extras(row, choose_columns("rows.jsonl", row, None)).tools == '[{"name": "f"}]'  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"functions.*tools.*\{tools: tools\}|tools and functions"):
        choose_columns("rows.jsonl", ["messages", "tools", "functions"], None)
    assert choose_columns("rows.jsonl", ["messages", "tools", "functions"], {"tools": "tools"}).tools == "tools"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["text"], "holds texts .*`messages`, or a prompt and a completion"),
        (["id", "meta", "text"], "holds texts"),
        (["input_ids", "labels"], "token ids"),
        (["prompt", "chosen", "rejected"], r"preference data.*\{prompt: prompt, completion: chosen\}, or \{messages"),
        (["instruction", "input", "chosen", "rejected"], r"\{prompt: instruction, completion: chosen\}"),
        (["conversations", "chosen", "rejected"], r"\{prompt: conversations, completion: chosen\}"),
        (["chosen", "rejected", "score"], r"say so in the source's `columns`: \{messages: chosen\}\."),
        (["messages", "rejected_response"], r"\{messages: messages\}"),
        (["instruction", "output", "images"], r"only text.*\{prompt: instruction, completion: output\}"),
    ],
)
def test_rows_of_another_kind_are_told_as_what_they_are(columns: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_columns("rows.jsonl", columns, None)


CHOSEN = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "prompt", "completion": "chosen"}),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": []}, {"prompt": "prompt", "completion": "chosen"}),
    ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, {"messages": "chosen"}),
    (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"prompt": "conversations", "completion": "chosen"},
    ),
]


@pytest.mark.parametrize(("row", "columns"), CHOSEN)
def test_the_better_answers_of_preference_data_are_learned_as_the_sentence_says(row: Any, columns: Any) -> None:
    with pytest.raises(UserError) as told:
        choose_columns("rows.jsonl", row, None)
    assert ", ".join(f"{role}: {column}" for role, column in columns.items()) in str(told.value)
    assert [(m["role"], m["content"]) for m in _read(row, columns)] == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize("prompt", ["q", [USER], [{"role": "system", "content": "s"}, USER]])
def test_a_prompt_that_the_answer_holds_too_is_not_said_twice(prompt: Any) -> None:
    row = {"prompt": prompt, "chosen": [USER, ASSISTANT], "rejected": [USER]}
    found = _read(row, {"prompt": "prompt", "completion": "chosen"})
    assert isinstance(found, BadRow) and "{messages: chosen}" in found.detail


@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_answers_that_are_labelled_as_bad_are_not_learned(column: str) -> None:
    row = {"prompt": "q", "completion": "a", column: False}
    assert _read(row).reason == "rejected_answer"
    assert len(_read(row, {"prompt": "prompt", "completion": "completion"})) == 2
    assert [len(_read({**row, column: fine})) for fine in (True, None, 0, "false", 7)] == [2] * 5


def test_what_cant_be_read_makes_later_rows_bad() -> None:
    mapping = choose_columns("rows.jsonl", ["messages"], None)
    for extra in ({"images": ["a.png"]}, {"rejected_response": "b"}, {"chosen": "c"}):
        bad = to_messages({"messages": [USER, ASSISTANT], **extra}, mapping, _data())
        assert isinstance(bad, BadRow) and bad.reason == "unread_column"
    assert len(to_messages({"messages": [USER, ASSISTANT], "images": []}, mapping, _data())) == 2  # type: ignore[arg-type]
