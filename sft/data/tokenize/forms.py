"""One conversation in the forms that chat templates take, which disagree on where tools and thinking stand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft.data.read.message import Message, from_json
from sft.data.tokenize.marks import thinking_apart


@dataclass(frozen=True)
class Form:
    """Messages, and what the template is told beside them; `added`: how many messages were put in front."""

    messages: Sequence[Message]
    options: dict[str, Any]
    added: int = 0

    def without(self, key: str) -> Form:
        """The same without its tools or its tool_calls."""
        messages = [{name: value for name, value in message.items() if name != key} for message in self.messages]
        return Form(messages, {name: value for name, value in self.options.items() if name != key}, self.added)

    def has(self, key: str) -> bool:
        """Whether there are tools or tool_calls."""
        return key in self.options or any(message.get(key) for message in self.messages)


def forms(messages: Sequence[Message], tools: str | None, arguments: Mapping[str, Any]) -> Iterator[Form]:
    """The conversation as it is given, then the others that say the same.

    Tools go to the template as a list; as text in a system message where it only takes that (Phi-4-mini's). Arguments
    of calls may be mappings or JSON text. Thinking may be under `reasoning_content`.
    """
    seen: list[Form] = []
    for placed in _placed(messages, tools, dict(arguments)):
        for spelled in _spelled(placed.messages):
            for apart in (False, True):
                said = thinking_apart(spelled) if apart else spelled
                form = Form(said, placed.options, placed.added)
                if form not in seen:
                    seen.append(form)
                    yield form


def _placed(messages: Sequence[Message], tools: str | None, options: dict[str, Any]) -> Iterator[Form]:
    own = next((message["tools"] for message in messages if message.get("tools")), None)
    listed = from_json(tools or own)
    if isinstance(listed, list) and all(isinstance(tool, Mapping) for tool in listed):
        yield Form(messages, {**options, "tools": listed})
    elif listed is None:
        yield Form(messages, options)
    if own is not None:
        yield Form(messages, options)
    elif tools is not None and messages[0]["role"] == "system":
        yield Form([{**messages[0], "tools": tools}, *messages[1:]], options)
    elif tools is not None:
        yield Form([{"role": "system", "content": "", "tools": tools}, *messages], options, 1)


def _spelled(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    yield messages
    if any("tool_calls" in message for message in messages):
        yield [_rewritten(message, from_json) for message in messages]
        yield [_rewritten(message, _text) for message in messages]


def _rewritten(message: Message, rewrite: Any) -> Message:
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [
        {**call, "function": {**function, "arguments": rewrite(function["arguments"])}}
        for call, function in zip(message["tool_calls"], functions, strict=True)
    ]
    return {**message, "tool_calls": calls}


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def unread(template: str, arguments: Mapping[str, Any]) -> str | None:
    """The first of a row's template arguments that says something which the template never asks for.

    A switch (true, false, a number) that a template doesn't have has no effect; a text would be lost.
    """
    asked = (name for name, value in arguments.items() if not re.search(rf"\b{re.escape(name)}\b", template))
    return next((name for name in asked if _holds_text(arguments[name])), None)


def _holds_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_text, value.values()))
    return any(map(_holds_text, value)) if isinstance(value, list) else isinstance(value, str) and bool(value.strip())
