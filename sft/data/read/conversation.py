"""A row's conversation: `{"role": ..., "content": ...}` by turns (a system message may carry `tools`, a string), or why
it has none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sft.data.read.columns import ColumnMap
from sft.data.read.row import BadRow
from sft.recipe.schema import Templates

Message = dict[str, str]

ROLES = frozenset({"system", "user", "assistant", "tool", "tool_response"})
# What ShareGPT-like sets call the roles.
ROLE_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class _UnusableError(Exception):
    """Carries the reason out of the checks below."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.bad = BadRow(reason, detail)


def to_messages(value: Mapping[str, Any], mapping: ColumnMap, data: Templates) -> list[Message] | BadRow:
    """The conversation that the row `value` holds, or why it holds none.

    Prompt and completion templates apply to prompt/completion rows. `reasoning_content` of an assistant message is
    put in front of its content as a `<think>` block, so that no template can lose it.
    """
    try:
        if mapping.messages is not None:
            messages = _conversation(_get(value, mapping.messages), mapping.messages)
        else:
            messages = _pair(value, mapping, data)
        messages = _with_system(messages, value, mapping, data)
    except _UnusableError as error:
        return error.bad
    return messages


def to_problem(value: Mapping[str, Any], mapping: ColumnMap) -> str | BadRow:
    """The problem that the row `value` holds, without an answer, or why it holds none."""
    assert mapping.prompt is not None
    try:
        problem = _text(_get(value, mapping.prompt), f"'{mapping.prompt}'")
    except _UnusableError as error:
        return error.bad
    return problem if problem.strip() else BadRow("empty_prompt", f"'{mapping.prompt}' is empty")


def to_conversation(found: Any, where: str) -> list[Message] | BadRow:
    """The conversation that the list `found` holds, or why it holds none; `where` is what it is called in messages."""
    try:
        return _conversation(found, where)
    except _UnusableError as error:
        return error.bad


def row_id(value: Mapping[str, Any], mapping: ColumnMap, source: str, line: int) -> str:
    """The row's own id where it has one, else `source:line`."""
    own = value.get(mapping.id) if mapping.id is not None else None
    if isinstance(own, (str, int)) and str(own).isprintable() and str(own).strip():
        return str(own)
    return f"{source}:{line}"


def _get(value: Mapping[str, Any], column: str) -> Any:
    if column not in value:
        raise _UnusableError("missing_key", f"no '{column}'")
    if value[column] is None:
        raise _UnusableError("null_value", f"'{column}' is null")
    return value[column]


def _text(found: Any, what: str) -> str:
    if not isinstance(found, str):
        raise _UnusableError("wrong_type", f"{what} is {type(found).__name__}, expected text")
    if not found.isascii():
        try:
            found.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _UnusableError("invalid_unicode", f"{what} holds half of a surrogate pair") from error
    return found


def _pair(value: Mapping[str, Any], mapping: ColumnMap, data: Templates) -> list[Message]:
    assert mapping.prompt is not None and mapping.completion is not None
    prompt = _text(_get(value, mapping.prompt), f"'{mapping.prompt}'")
    completion = _text(_get(value, mapping.completion), f"'{mapping.completion}'")
    if not prompt.strip():
        raise _UnusableError("empty_prompt", f"'{mapping.prompt}' is empty")
    if not completion.strip():
        raise _UnusableError("empty_answer", f"'{mapping.completion}' is empty")
    if mapping.reasoning is not None:
        reasoning = _text(_get(value, mapping.reasoning), f"'{mapping.reasoning}'")
        completion = _thought(reasoning, completion)
    return data.turns(prompt, completion)


def _with_system(
    messages: list[Message], value: Mapping[str, Any], mapping: ColumnMap, data: Templates
) -> list[Message]:
    if messages[0]["role"] == "system":
        return messages
    own = value.get(mapping.system) if mapping.system is not None else None
    system = _text(own, f"'{mapping.system}'") if own is not None else ""
    system = system if system.strip() else (data.system_prompt or "")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _conversation(found: Any, column: str) -> list[Message]:
    if not isinstance(found, list):
        raise _UnusableError("wrong_type", f"'{column}' is {type(found).__name__}, expected a list of messages")
    if not found:
        raise _UnusableError("no_messages", f"'{column}' is an empty list")
    messages = [_message(message, f"{column}[{i}]") for i, message in enumerate(found)]
    if not any(message["role"] == "assistant" for message in messages):
        raise _UnusableError("no_assistant_turn", f"'{column}' has no assistant message")
    return messages


def _message(found: Any, where: str) -> Message:
    if not isinstance(found, dict):
        raise _UnusableError(
            "wrong_type", f"{where} is {type(found).__name__}, expected a mapping with role and content"
        )
    keys = ("role", "content") if "role" in found else ("from", "value")
    if keys[0] not in found:
        raise _UnusableError("missing_key", f"{where} has no 'role'")
    said = found[keys[0]]
    role = ROLE_NAMES.get(said, said) if isinstance(said, str) else said
    if not isinstance(role, str) or role not in ROLES:
        raise _UnusableError("unknown_role", f"{where} has the role {str(said)[:40]!r}")
    if found.get("tool_calls"):
        raise _UnusableError("tool_calls", f"{where} has tool_calls, which can't be rendered as text")
    if keys[1] not in found:
        raise _UnusableError("missing_key", f"{where} has no '{keys[1]}'")
    content = _content(found[keys[1]], where)
    if role == "assistant":
        content = _with_reasoning(found, content, where)
    if role in ("user", "assistant") and not content.strip():
        reason = "empty_answer" if role == "assistant" else "empty_prompt"
        raise _UnusableError(reason, f"{where} ({role}) is empty")
    message = {"role": role, "content": content}
    if role == "system" and found.get("tools"):
        message["tools"] = _tools(found["tools"], where)
    return message


def _content(found: Any, where: str) -> str:
    if found is None:
        raise _UnusableError("null_content", f"{where} has null content")
    if isinstance(found, list):  # the form with parts, each {"type": "text", "text": ...}
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in found):
            raise _UnusableError("wrong_type", f"{where} has content parts that aren't text")
        found = "".join(part["text"] for part in found)
    return _text(found, where)


def _with_reasoning(found: dict[str, Any], content: str, where: str) -> str:
    if not content.strip():
        return content
    reasoning = next((found[key] for key in REASONING_KEYS if found.get(key)), None)
    if reasoning is None:
        return content
    return _thought(_text(reasoning, where + " reasoning"), content)


def _thought(reasoning: str, content: str) -> str:
    """An answer with the thinking in front of it, as a <think> block."""
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"


def _tools(found: Any, where: str) -> str:
    # Checkpoints were trained on tools as JSON text; sets hold them as text already or as the list itself.
    return _text(found if isinstance(found, str) else json.dumps(found, ensure_ascii=False), f"{where} tools")
