"""A row's conversation: its messages by turns, and what the chat template is told beside them; or why it has none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from sft.data.read.columns import UNREAD, ColumnMap
from sft.data.read.message import Message, UnusableError, from_json, to_json, to_message, to_text, with_thinking
from sft.data.read.row import BadRow
from sft.recipe.schema import Templates

# What the renderer says itself. A row that set a special token would forge it.
_RESERVED = frozenset(
    (
        *("messages", "conversations", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
        "strftime_now",
    )
)


class Extras(NamedTuple):
    """What a chat template is told beside the messages.

    `tools`: JSON text of a list of functions; `arguments`: the template's own arguments.
    """

    tools: str | None
    arguments: dict[str, Any]


def to_messages(value: Mapping[str, Any], mapping: ColumnMap, data: Templates) -> list[Message] | BadRow:
    """The conversation that the row `value` holds, or why it holds none.

    Prompt and completion are text, to which their templates apply, or messages; then a prompt's answers are context.
    `reasoning_content` of an assistant message is put in front of its content as a `<think>` block, so that no template
    can lose it. Answers that are context only carry `weight: 0`.
    """
    try:
        _check_good(value, mapping)
        if mapping.messages is not None:
            messages = _conversation(_get(value, mapping.messages), mapping.messages)
        else:
            messages = _pair(value, mapping, data)
        messages = _with_system(messages, value, mapping, data)
    except UnusableError as error:
        return error.bad
    return messages


def to_problem(value: Mapping[str, Any], mapping: ColumnMap) -> str | BadRow:
    """The problem that the row `value` holds, without an answer, or why it holds none."""
    assert mapping.prompt is not None
    try:
        problem = _asked(value, mapping)
        if _history(value, mapping):
            return BadRow("wrong_type", f"'{mapping.optional('history')}' holds turns before the problem, which is one")
    except UnusableError as error:
        return error.bad
    if not isinstance(problem, str):
        if [message["role"] for message in problem] != ["user"]:
            return BadRow("wrong_type", f"'{mapping.prompt}' holds messages, expected text or one message of the user")
        problem = str(problem[0]["content"])
    return problem if problem.strip() else BadRow("empty_prompt", f"'{mapping.prompt}' is empty")


def to_conversation(found: Any, where: str) -> list[Message] | BadRow:
    """The conversation that the list `found` holds, or why it holds none; `where` is what it is called in messages."""
    try:
        return _conversation(found, where)
    except UnusableError as error:
        return error.bad


def to_extras(value: Mapping[str, Any], mapping: ColumnMap) -> Extras | BadRow:
    """The tools and template arguments that the row `value` gives, or why they can't be used."""
    try:
        columns = mapping.optional("tools"), mapping.optional("chat_template_kwargs")
        tools, arguments = (from_json(value.get(column)) for column in columns)
        return Extras(
            _tools(tools, f"'{columns[0]}'") if tools else None,
            _arguments(arguments, f"'{columns[1]}'") if arguments else {},
        )
    except UnusableError as error:
        return error.bad


def row_id(value: Mapping[str, Any], mapping: ColumnMap, source: str, line: int) -> str:
    """The row's own id where it has one, else `source:line`."""
    own = value.get(mapping.id) if mapping.id is not None else None
    if isinstance(own, (str, int)) and str(own).isprintable() and str(own).strip():
        return str(own)
    return f"{source}:{line}"


def _get(value: Mapping[str, Any], column: str) -> Any:
    if column not in value:
        raise UnusableError("missing_key", f"no '{column}'")
    if value[column] is None:
        raise UnusableError("null_value", f"'{column}' is null")
    return value[column]


def _pair(value: Mapping[str, Any], mapping: ColumnMap, data: Templates) -> list[Message]:
    assert mapping.prompt is not None and mapping.completion is not None
    prompt, completion = _asked(value, mapping), _side(value, mapping.completion)
    if not isinstance(prompt, list) and not prompt.strip():
        raise UnusableError("empty_prompt", f"'{mapping.prompt}' is empty")
    if not isinstance(completion, list) and not completion.strip():
        raise UnusableError("empty_answer", f"'{mapping.completion}' is empty")
    if mapping.reasoning is not None:
        if isinstance(completion, list):
            raise UnusableError(
                "wrong_type", f"'{mapping.completion}' holds messages, and columns.reasoning takes text"
            )
        reasoning = to_text(_get(value, mapping.reasoning), f"'{mapping.reasoning}'")
        completion = with_thinking(reasoning, completion, f"'{mapping.completion}'")
    if isinstance(completion, list) and not any(message["role"] == "assistant" for message in completion):
        raise UnusableError("no_assistant_turn", f"'{mapping.completion}' has no assistant message")
    asked, answered = data.turns(*(side if isinstance(side, str) else "" for side in (prompt, completion)))
    before = [{**message, "weight": 0} for message in prompt] if isinstance(prompt, list) else [asked]
    if history := _history(value, mapping):
        if isinstance(prompt, list):
            raise UnusableError("wrong_type", f"'{mapping.prompt}' holds messages, and so does columns.history")
        before = [*history, asked]
    if isinstance(completion, list):
        _check_once(before, completion, mapping)
    return [*before, *(completion if isinstance(completion, list) else [answered])]


def _check_once(before: list[Message], completion: list[Message], mapping: ColumnMap) -> None:
    """Preference sets may have the prompt in a column of its own and in front of the answer: refuse to say it twice."""
    asked, again = ([m["content"] for m in side if m["role"] != "system"] for side in (before, completion))
    if completion[0]["role"] != "assistant" and asked and again[: len(asked)] == asked:
        raise UnusableError(
            "prompt_twice",
            f"'{mapping.completion}' begins with the prompt: map the conversation, {{messages: {mapping.completion}}}",
        )


def _history(value: Mapping[str, Any], mapping: ColumnMap) -> list[Message]:
    """The turns before a prompt: [question, answer] pairs (as LLaMA-Factory and ms-swift have them), or messages."""
    column = mapping.optional("history")
    found = from_json(value.get(column))
    if found is None or found == "" or found == []:
        return []
    if isinstance(found, list) and all(isinstance(turn, dict) for turn in found):
        return _list(found, column)
    turns: list[Message] = []
    for number, pair in enumerate(found if isinstance(found, list) else [None]):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UnusableError(
                "wrong_type",
                f"'{column}' isn't a list of [question, answer] pairs, the turns before the prompt; "
                f"columns.{{history: null}} leaves it out",
            )
        for role, said in zip(("user", "assistant"), pair, strict=True):
            turns.append(to_message({"role": role, "content": said}, f"{column}[{number}]"))
    return turns


def _check_good(value: Mapping[str, Any], mapping: ColumnMap) -> None:
    """Refuse an answer that its row says isn't a good one, and what only later rows have of what can't be read."""
    if mapping.label is not None and value.get(mapping.label) is False:
        raise UnusableError(
            "rejected_answer",
            f"'{mapping.label}' is false, which marks an answer that isn't to be learned; take such rows out, or name "
            "what to learn in the source's `columns`",
        )
    if not mapping.named:
        for column in UNREAD:
            if value.get(column):
                raise UnusableError(
                    "unread_column", f"has '{column}', which isn't read: text and one answer are trained"
                )


def _asked(value: Mapping[str, Any], mapping: ColumnMap) -> str | list[Message]:
    """The prompt, with what it is about on a line of its own (as LLaMA-Factory reads Alpaca's rows)."""
    assert mapping.prompt is not None
    prompt = _side(value, mapping.prompt)
    about = value.get(mapping.input) if mapping.input else None
    if about is None or about == "":
        return prompt
    text = to_text(about, f"'{mapping.input}'")
    if isinstance(prompt, list):
        raise UnusableError("wrong_type", f"'{mapping.prompt}' holds messages, and columns.input takes text")
    return "\n".join(part for part in (prompt, text) if part.strip())


def question(value: Mapping[str, Any], mapping: ColumnMap) -> str | None:
    """What a row asks by its prompt's column, without templates; None where it holds messages, or turns before it."""
    if mapping.messages is not None or mapping.prompt is None or _history(value, mapping):
        return None
    asked = _asked(value, mapping)
    return asked if isinstance(asked, str) else None


def _side(value: Mapping[str, Any], column: str) -> str | list[Message]:
    """A prompt or a completion: text, or messages."""
    found = _get(value, column)
    if isinstance(found, dict):
        found = [found]
    return _list(found, column) if isinstance(found, list) else to_text(found, f"'{column}'")


def _with_system(
    messages: list[Message], value: Mapping[str, Any], mapping: ColumnMap, data: Templates
) -> list[Message]:
    if messages[0]["role"] == "system":
        return messages
    column = mapping.optional("system")
    own = value.get(column)
    system = to_text(own, f"'{column}'") if own is not None else ""
    system = system if system.strip() else (data.system_prompt or "")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _conversation(found: Any, column: str) -> list[Message]:
    found = from_json(found)
    if not isinstance(found, list):
        raise UnusableError("wrong_type", f"'{column}' is {type(found).__name__}, expected a list of messages")
    messages = _list(found, column)
    if not any(message["role"] == "assistant" for message in messages):
        raise UnusableError("no_assistant_turn", f"'{column}' has no assistant message")
    return messages


def _list(found: list[Any], column: str) -> list[Message]:
    if not found:
        raise UnusableError("no_messages", f"'{column}' is an empty list")
    return [to_message(message, f"{column}[{i}]") for i, message in enumerate(found)]


def _tools(found: Any, what: str) -> str:
    tools = [from_json(tool) for tool in found] if isinstance(found, list) else [None]
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnusableError("wrong_type", f"{what} isn't a list of functions, each a mapping with a name")
    return to_json(tools, what)


def _arguments(found: Any, what: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UnusableError("wrong_type", f"{what} is {type(found).__name__}, expected a mapping")
    given = {name: value for name, value in found.items() if value is not None}
    for name in given:
        if name in _RESERVED or name.endswith(("_token", "_tokens")):
            raise UnusableError("chat_template_kwargs", f"{what} can't set {name}, which the renderer does")
    arguments: dict[str, Any] = json.loads(to_json(given, what))
    return arguments
