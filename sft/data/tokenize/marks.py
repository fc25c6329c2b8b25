"""Where each message's own words stand in the rendered text.

They are rendered between marks that no text holds (Unicode's noncharacters), which are then taken out again: so what a
template says of a message is known by place, not by searching for words that may stand there twice. A template that
says something else because of the marks is found out by rendering without them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Span = tuple[int, int]

_BEGIN, _END, _DONE = "\ufdd0", "\ufdd1", "\ufdd2"
MARK = re.compile(f"[{_BEGIN}{_END}](\\d+){_DONE}")
NONCHARACTER = re.compile(f"[{_BEGIN}{_END}{_DONE}]")
# Templates take thinking and answer apart at these, and put them together again in their own spelling.
_THINKING = re.compile("(</?think>)")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


@dataclass
class Marked:
    """Messages whose words are marked.

    Attributes:
        messages: to be rendered.
        words: (number of the message, what it says) of each mark, in order: a thought, an answer, a tool's name.
    """

    messages: list[dict[str, Any]]
    words: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Plain:
    """The rendered text without the marks: where the words stand, in order, and where a place of the marked text is."""

    text: str
    found: list[tuple[int, Span]]
    place: Callable[[int], int]


def thinking_apart(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the thinking that answers begin with under `reasoning_content`: some templates want it so."""
    apart = []
    for message in messages:
        found = _THOUGHT.match(message["content"] or "") if message["role"] == "assistant" else None
        apart.append(
            {**message, "content": found[2], "reasoning_content": found[1].strip()} if found else dict(message)
        )
    return apart


def within(messages: Sequence[dict[str, Any]], most: int | None) -> Sequence[dict[str, Any]]:
    """The messages without the middle of what they say at a stretch, where that is longer than twice `most`.

    Of such a text nobody reads more than its first `most` characters; rendering it takes ten copies.
    """
    if most is None or all(len(message["content"]) <= 2 * most for message in messages):
        return messages
    return [{**message, "content": _without_middle(message["content"], most)} for message in messages]


def _without_middle(text: str, most: int) -> str:
    parts = _THINKING.split(text)
    for place, part in enumerate(parts):
        words = part.strip()
        if len(words) > 2 * most:
            # Space around the words stays: a token may swallow it.
            begin = part.index(words[0])
            end = begin + len(words)
            parts[place] = part[: begin + most] + part[end - most :]
    return "".join(parts)


def marked(messages: Sequence[Mapping[str, Any]]) -> Marked:
    """Copies of the messages with the assistant's words marked."""
    made = Marked([dict(message) for message in messages])
    for number, message in enumerate(made.messages):
        if message["role"] != "assistant":
            continue

        def mark(words: str, number: int = number) -> str:
            made.words.append((number, words))
            at = len(made.words) - 1
            return f"{_BEGIN}{at}{_DONE}{words}{_END}{at}{_DONE}"

        if "reasoning_content" in message:
            message["reasoning_content"] = _around(message["reasoning_content"], mark)
        parts = _THINKING.split(message["content"] or "")
        parts[::2] = [_around(part, mark) for part in parts[::2]]
        message["content"] = "".join(parts) or message["content"]
        if message.get("tool_calls"):
            message["tool_calls"] = [_named(call, mark) for call in message["tool_calls"]]
    return made


def _around(text: str, mark: Callable[[str], str]) -> str:
    """Whitespace stays outside: templates trim it."""
    words = text.strip()
    if not words:
        return text
    before = text[: len(text) - len(text.lstrip())]
    return f"{before}{mark(words)}{text[len(before) + len(words) :]}"


def _named(call: Any, mark: Callable[[str], str]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _named(call["function"], mark)}
    return {**call, "name": mark(call["name"])} if isinstance(call.get("name"), str) else dict(call)


def unmarked(text: str) -> Plain:
    """Take the marks out of a rendered text."""
    begun: dict[str, int] = {}
    found: list[tuple[int, Span]] = []
    pieces, ends, removed = [], [0], [0]
    for mark in MARK.finditer(text):
        pieces.append(text[ends[-1] : mark.start()])
        at = mark.start() - removed[-1]
        ends.append(mark.end())
        removed.append(removed[-1] + mark.end() - mark.start())
        if mark[0][0] == _BEGIN:
            begun[mark[1]] = at
        elif mark[1] in begun:
            found.append((int(mark[1]), (begun[mark[1]], at)))
    pieces.append(text[ends[-1] :])
    return Plain("".join(pieces), found, lambda place: place - removed[bisect_left(ends, place + 1) - 1])


def said_in(text: str, value: Any) -> Iterator[str]:
    """The texts in `value` (JSON) that `text` doesn't hold, neither as they are nor as JSON writes them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from said_in(text, key)
            yield from said_in(text, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from said_in(text, inner)
    elif isinstance(value, str):
        words = value.strip()
        if not any(
            form in text for form in (words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1])
        ):
            yield words
