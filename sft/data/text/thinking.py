"""Where an assistant's thinking is in its message, in whichever marks a data set writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class Marks(NamedTuple):
    """The marks around thinking.

    `prefilled`: a chat template may write the opening mark, so that answers may lack it. The other marks are words that
    ordinary markup has too: they mean thinking only where a message begins with them.
    """

    name: str
    open: str
    close: str
    prefilled: bool = True


MARKS = (
    Marks("think", THINK_OPEN, THINK_CLOSE),
    Marks("open_thoughts", "<|begin_of_thought|>", "<|end_of_thought|>"),
    Marks("seed", "<seed:think>", "</seed:think>"),
    Marks("magistral", "[THINK]", "[/THINK]"),
    Marks("kimi", "◁think▷", "◁/think▷"),
    Marks("thinking", "<thinking>", "</thinking>", prefilled=False),
    Marks("reasoning", "<reasoning>", "</reasoning>", prefilled=False),
    Marks("thought", "<thought>", "</thought>", prefilled=False),
)
HARMONY = "harmony"
"""Name of the marks of gpt-oss: `<|channel|>analysis<|message|>` ... `<|channel|>final<|message|>` ..."""

# What sets put around the answer that follows the thinking.
_ANSWER_MARKS = (("<|begin_of_solution|>", "<|end_of_solution|>"), ("<answer>", "</answer>"))

_BY_MARK = {mark: marks for marks in MARKS for mark in (marks.open, marks.close)}
_ANY_MARK = re.compile("|".join(map(re.escape, sorted(_BY_MARK, key=len, reverse=True))))
_HARMONY_START = re.compile(r"\s*(?:<\|start\|>assistant)?<\|channel\|>")
_HARMONY_HEADER = re.compile(r"\s*(?:<\|start\|>assistant)?<\|channel\|>(\w+)([^<]{0,200})<\|message\|>")
_HARMONY_TOKEN = re.compile(r"<\|(?:start|channel|message|constrain|call|end|return)\|>")


@dataclass(frozen=True, slots=True)
class Thought:
    """A message with closed thinking: `text` without its marks, and the `answer` after it, both as they stand.

    Attributes:
        marks: name of the marks it was written in.
        opened: False where only the closing mark was there.
        wrapped: the answer stood in marks of its own, which `answer` is without.
    """

    marks: str
    text: str
    answer: str
    opened: bool = True
    wrapped: bool = False


@dataclass(frozen=True, slots=True)
class Broken:
    """A message with marks of thinking that make no sense; `closed` is False where thinking was begun, never ended."""

    detail: str
    closed: bool = True


def find_thinking(content: str) -> Thought | Broken | None:
    """The thinking at the beginning of an assistant's message, or None where there are no marks of it. Linear time.

    Marks of one kind inside another's thinking, or words like `<reasoning>` in the middle of a text, are ordinary text.
    """
    if _HARMONY_START.match(content):
        return _harmony(content)
    first = _ANY_MARK.search(content)
    if first is None:
        return None
    marks = _BY_MARK[first.group()]
    if first.group() == marks.open and not content[: first.start()].strip():
        return _opened(content, first.end(), marks)
    return _not_opened(content)


def canonical(thought: Thought) -> str:
    """The message as it is trained: `<think>`, thinking, `</think>`, an empty line, the answer.

    What stands in these marks already keeps its own whitespace.
    """
    if thought.marks != "think":
        answer = thought.answer.strip()
        return f"{THINK_OPEN}\n{thought.text.strip()}\n{THINK_CLOSE}\n\n{answer}" if thought.text.strip() else answer
    text = thought.text if thought.opened or thought.text[:1].isspace() else "\n" + thought.text
    answer = "\n\n" + thought.answer.strip() if thought.wrapped else thought.answer
    return f"{THINK_OPEN}{text}{THINK_CLOSE}{answer}"


def _opened(content: str, start: int, marks: Marks) -> Thought | Broken:
    """A message that begins with `marks.open`, which ends at `start`."""
    end = content.find(marks.close, start)
    if end < 0:
        return Broken(f"{marks.open} is never closed", closed=False)
    after = end + len(marks.close)
    for mark in (marks.open, marks.close):
        if content.find(mark, start, end) >= 0 or content.find(mark, after) >= 0:
            return Broken(f"{mark} stands there twice")
    return _thought(marks, content[start:end], content[after:], opened=True)


def _not_opened(content: str) -> Thought | Broken | None:
    """A message that doesn't begin with an opening mark."""
    for marks in MARKS:
        if not marks.prefilled:
            continue
        at, opened = content.find(marks.close), content.find(marks.open)
        if opened >= 0:
            return Broken(f"{marks.open} doesn't stand at the beginning", closed=at > opened)
        if at >= 0 and content.find(marks.close, at + 1) >= 0:
            return Broken(f"{marks.close} stands there twice")
        if at >= 0:
            return _thought(marks, content[:at], content[at + len(marks.close) :], opened=False)
    return None


def _thought(marks: Marks, text: str, answer: str, *, opened: bool) -> Thought | Broken:
    for begin, end in _ANSWER_MARKS:
        inner = answer.strip()
        if not inner.startswith(begin):
            continue
        # <answer> is an ordinary word in the middle of a text, unlike OpenThoughts' marks.
        if inner.endswith(end) and inner.count(begin) == inner.count(end) == 1:
            return Thought(marks.name, text, inner[len(begin) : -len(end)], opened, wrapped=True)
        if begin.startswith("<|"):
            return Broken(f"{begin} is not closed by {end}")
    return Thought(marks.name, text, answer, opened)


def _harmony(content: str) -> Thought | Broken:
    """gpt-oss's form (OpenAI's harmony response format): messages with a channel, thinking in `analysis`."""
    thinking: list[str] = []
    answer: str | None = None
    content, position = content.rstrip(), 0
    while position < len(content):
        header = _HARMONY_HEADER.match(content, position)
        if header is None or answer is not None:
            return Broken("harmony marks in an unknown order")
        channel, more = header.group(1), header.group(2).strip()
        if channel not in ("analysis", "final") or more:
            return Broken(f"a harmony message in the channel {channel} {more}".rstrip())
        end = _HARMONY_TOKEN.search(content, header.end())
        token = end.group() if end else None
        if token not in (None, "<|end|>", "<|return|>"):
            return Broken(f"{token} inside a harmony message")
        text = content[header.end() : end.start() if end else len(content)]
        position = end.end() if end else len(content)
        if channel == "final":
            answer = text
        else:
            thinking.append(text.strip())
    if answer is None:
        return Broken("harmony's final message is missing", closed=False)
    return Thought(HARMONY, "\n\n".join(thinking), answer)
