"""One message of a row: `{"role": ..., "content": ...}`, or why it can't be used.

An assistant's may have `tool_calls`, a tool's `name` and `tool_call_id`, a system message `tools` (text); `weight: 0`
marks an answer that is context only.
"""

from __future__ import annotations

import json
from typing import Any

from sft.data.read.row import MOST_NESTED, BadRow, deeper
from sft.data.text.thinking import Broken, find_thinking

Message = dict[str, Any]

ROLES = frozenset({"system", "user", "assistant", "tool", "tool_response"})
# What ShareGPT-like sets call the roles, and OpenAI did before or does since.
ROLE_NAMES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "developer": "system",
    **dict.fromkeys(("function", "observation", "function_response", "ipython"), "tool"),
}
CALLING = ("function_call", "tool_call")
"""Roles of turns that are calls."""
TRAINED = ("weight", "train", "training", "loss", "loss_scale")
"""Keys by which messages say whether they are trained: OpenAI's, axolotl's, ms-swift's."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class UnusableError(Exception):
    """Carries the reason out of the checks."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.bad = BadRow(reason, detail)


def to_message(found: Any, where: str) -> Message:
    """The message `found`, which is called `where` in what is said of it. Raises UnusableError."""
    if not isinstance(found, dict):
        raise UnusableError(
            "wrong_type", f"{where} is {type(found).__name__}, expected a mapping with role and content"
        )
    keys = _keys(found)
    found = _turn_that_calls(found, keys, where)
    role = _role(found, keys[0], where)
    calls = _calls(found, role, where)
    content = "" if calls and found.get(keys[1]) is None else _content(found, keys[1], where)
    if role == "assistant" and (content.strip() or calls):
        content = with_thinking(_reasoning(found, where), content, where)
    if role in ("user", "assistant") and not content.strip() and not calls:
        reason = "empty_answer" if role == "assistant" else "empty_prompt"
        raise UnusableError(reason, f"{where} ({role}) is empty")
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    if found.get("tools"):
        message["tools"] = _tools(found["tools"], role, where)
    if role == "tool":
        named = {key: found[key] for key in ("name", "tool_call_id") if found.get(key) is not None}
        message |= {key: to_text(value, f"{where}.{key}") for key, value in named.items()}
    if not _trained(found, role, where):
        message["weight"] = 0
    return message


def _keys(found: dict[str, Any]) -> tuple[str, str]:
    """What a message calls its role and its content."""
    role = "role" if "role" in found else "from"
    usual, other = ("content", "value") if role == "role" else ("value", "content")
    return role, other if other in found and usual not in found else usual


def spelled(message: Message) -> str:
    """All text that a template may put of a message."""
    more = [value for key, value in message.items() if key not in ("role", "content")]
    texts = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in more)
    return "\n".join([message["content"], *texts])


def context_only(messages: list[Message]) -> list[int]:
    """Numbers of the assistant's messages that carry `weight: 0`, which is taken off them."""
    weights = [message.pop("weight", 1) for message in messages]
    return [n for n, message in enumerate(messages) if weights[n] == 0 and message["role"] == "assistant"]


def to_text(found: Any, what: str) -> str:
    """A text that files can hold. Raises UnusableError."""
    if not isinstance(found, str):
        raise UnusableError("wrong_type", f"{what} is {type(found).__name__}, expected text")
    if not found.isascii():
        try:
            found.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnusableError("invalid_unicode", f"{what} holds half of a surrogate pair, or isn't UTF-8") from error
    return found


def to_json(found: Any, what: str) -> str:
    """A value as JSON. Raises UnusableError for one that JSON can't say, or no template: it is nested too deeply."""
    if deeper(found, MOST_NESTED):
        raise UnusableError("wrong_type", f"{what} is nested more than {MOST_NESTED} deep")
    try:
        return to_text(json.dumps(found, ensure_ascii=False, allow_nan=False), what)
    except (TypeError, ValueError) as error:
        raise UnusableError("wrong_type", f"{what} can't be written as JSON: {error}") from error


def from_json(found: Any) -> Any:
    """A list or a mapping that is given as JSON text; anything else as it is."""
    if isinstance(found, str) and found.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(found)
        except (ValueError, RecursionError):
            return found
    return found


def with_thinking(reasoning: str, content: str, where: str) -> str:
    """An answer with the thinking in front of it, as its only `<think>` block: `content` may hold it too, or a blank
    one. Raises UnusableError where it thinks something else."""
    thought, found = find_thinking(reasoning), find_thinking(content)
    if isinstance(thought, Broken) or (thought is not None and thought.answer.strip()):
        raise UnusableError("broken_thinking", f"{where} has reasoning with marks of thinking in it")
    reasoning = (reasoning if thought is None else thought.text).strip()
    if not reasoning:
        return content
    if isinstance(found, Broken):
        raise UnusableError("broken_thinking", f"{where} has reasoning beside content in which {found.detail}")
    if found is not None:
        if found.text.split() not in ([], reasoning.split()):
            raise UnusableError("thinking_twice", f"{where} has reasoning, and content that thinks something else")
        content = found.answer.lstrip()
    return f"<think>\n{reasoning}\n</think>\n\n{content}"


def _role(found: dict[str, Any], key: str, where: str) -> str:
    if key not in found:
        raise UnusableError("missing_key", f"{where} has no 'role'")
    said = found[key]
    role = ROLE_NAMES.get(said.lower(), said.lower()) if isinstance(said, str) else said
    if not isinstance(role, str) or role not in ROLES:
        raise UnusableError("unknown_role", f"{where} has the role {str(said)[:40]!r}")
    return role


def _content(found: dict[str, Any], key: str, where: str) -> str:
    if key not in found:
        raise UnusableError("missing_key", f"{where} has no '{key}'")
    content = found[key]
    if content is None:
        raise UnusableError("null_content", f"{where} has null content")
    if isinstance(content, list):  # the form with parts, each {"type": "text", "text": ...}
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UnusableError("wrong_type", f"{where} has content parts that aren't text")
        content = "".join(part["text"] for part in content)
    return to_text(content, where)


def _reasoning(found: dict[str, Any], where: str) -> str:
    given = [to_text(found[key], f"{where}.{key}") for key in REASONING_KEYS if found.get(key)]
    given = [text for text in given if text.strip()]
    if any(text.split() != given[0].split() for text in given):
        raise UnusableError("thinking_twice", f"{where} has two reasonings that differ")
    return given[0] if given else ""


def _calls(found: dict[str, Any], role: str, where: str) -> list[dict[str, Any]]:
    """The functions that a message calls, in OpenAI's form; arguments are a mapping or text, as they are given."""
    calls, one = from_json(found.get("tool_calls")), from_json(found.get("function_call"))
    if not calls and not one:
        return []
    if calls and one:
        raise UnusableError("tool_calls", f"{where} has both tool_calls and a function_call")
    calls = calls or [one]
    if role != "assistant":
        raise UnusableError("tool_calls", f"{where} ({role}) has tool_calls, which only an assistant's message may")
    if not isinstance(calls, list):
        raise UnusableError("tool_calls", f"{where}.tool_calls is {type(calls).__name__}, expected a list")
    return [_call(from_json(call), f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _turn_that_calls(found: dict[str, Any], keys: tuple[str, str], where: str) -> dict[str, Any]:
    """ShareGPT-like sets have calls as turns of their own, `{"from": "function_call", "value": '{"name": ...}'}`."""
    if found.get(keys[0]) not in CALLING:
        return found
    called = from_json(found.get(keys[1]))
    if not called or found.get("tool_calls") or found.get("function_call"):
        raise UnusableError(
            "tool_calls", f"{where} has the role '{found[keys[0]]}', whose {keys[1]} alone says the call"
        )
    return {
        **found,
        keys[0]: "assistant",
        keys[1]: None,
        "tool_calls": called if isinstance(called, list) else [called],
    }


def _call(found: Any, where: str) -> dict[str, Any]:
    function = found.get("function", found) if isinstance(found, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise UnusableError("tool_calls", f"{where} names no function")
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, (dict, str)):
        raise UnusableError("tool_calls", f"{where} has arguments that are {type(arguments).__name__}")
    own = {"id": found["id"]} if found.get("id") is not None else {}
    function = {"name": name, "arguments": {} if arguments is None else arguments}
    call: dict[str, Any] = json.loads(to_json({**own, "type": "function", "function": function}, where))
    return call


def _tools(found: Any, role: str, where: str) -> str:
    if role != "system":
        raise UnusableError("tools", f"{where} ({role}) has tools, which only a system message may declare")
    # Checkpoints were trained on tools as JSON text; sets hold them as text already or as the list itself.
    return to_text(found, f"{where}.tools") if isinstance(found, str) else to_json(found, f"{where}.tools")


def _trained(found: dict[str, Any], role: str, where: str) -> bool:
    """Whether what a message says lets it be trained; of other roles than the assistant's no message is."""
    for key in TRAINED:
        if found.get(key) not in (None, 0, 1):
            raise UnusableError("wrong_type", f"{where}.{key} is {found[key]!r:.40}, expected 0 or 1")
    wanted = next((key for key in TRAINED[1:] if found.get(key)), None)
    if role != "assistant" and wanted:
        raise UnusableError(
            "untrainable", f"{where} ({role}) says {wanted}, and only an assistant's message can be trained"
        )
    if found.get("train_detail"):
        raise UnusableError("untrainable", f"{where} has train_detail, and an answer is trained whole here, or not")
    return all(found.get(key) not in (0,) for key in TRAINED)
