"""Conversations to text, with the character spans that are trained on."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sft.data.read.message import Message, from_json, spelled
from sft.data.read.row import BadRow
from sft.data.tokenize.forms import Form, forms, unread
from sft.data.tokenize.marks import NONCHARACTER, Marked, Plain, Span, marked, said_in, unmarked, within
from sft.data.tokenize.template import TRAINING_TEMPLATE, has_marks, training_template
from sft.tokenizers.control import ControlTokens
from sft.tokenizers.dates import with_fixed_date
from sft.tokenizers.turns import RENDER_ERRORS, Turn, find_turn
from sft.utils.errors import UserError

LOST = "lost_text"
_TWICE = re.compile(r"<think>\s*</think>\s*<think>")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the text the model reads; `spans` are the [start, end) characters that are trained on, and
    `owners` say of each part of them, in order, whose it is: the message's number."""

    text: str
    spans: list[Span]
    owners: list[tuple[int, Span]] = field(default_factory=list, compare=False)


class _RefusedError(Exception):
    """Carries the reason out of the checks below."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.bad = BadRow(reason, detail)


class Renderer:
    """Renders conversations with a tokenizer's training template, and proves of each that nothing of it was lost."""

    def __init__(self, tokenizer: Any, most_characters: int | None = None) -> None:
        """`most_characters`: of a text nothing beyond so many is read; a longer one may lack its middle."""
        self._most = most_characters
        self.template = training_template(tokenizer)
        self._dated = with_fixed_date(self.template)
        self._special = dict(tokenizer.special_tokens_map)
        self._control = ControlTokens(tokenizer)
        self._turn = cast(Turn, find_turn(tokenizer, self.template))
        self._has_marks = has_marks(self.template)
        self._check_marks()

    def render(
        self,
        messages: Sequence[Message],
        untrained: Collection[int] = (),
        tools: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered | BadRow:
        """The conversation's text and trained spans, or why it can't be rendered.

        `untrained`: numbers of the assistant's messages that are context only. `tools` (JSON text of a list) and
        `chat_template_kwargs`: what the row tells the template beside the messages.

        Refused are a message that spells a control token out (such as `<|end|>`: it would be read as the real one, and
        end a turn or forge another's), and one whose words the template leaves out or changes.
        """
        arguments = chat_template_kwargs or {}
        try:
            _check_texts(messages, [tools or "", json.dumps(arguments, ensure_ascii=False)], self._control)
            if (name := unread(self.template, arguments)) is not None:
                raise _RefusedError("chat_template_kwargs", f"the chat template doesn't read {name}")
            if tools and any(from_json(message.get("tools", tools)) != from_json(tools) for message in messages):
                raise _RefusedError("tools", "the row declares tools, and its system message declares others")
        except _RefusedError as error:
            return error.bad
        messages = within(messages, self._most)
        refused = BadRow("tools", "")
        for form in forms(messages, tools, arguments):
            try:
                return self._rendered(form, [number + form.added for number in untrained])
            except _RefusedError as error:
                # That one form has no place for tools says nothing of the others.
                refused = error.bad if refused.reason == "tools" else refused
                if error.bad.reason not in (LOST, "template", "tools"):
                    break
        return refused

    def _rendered(self, form: Form, untrained: Collection[int]) -> Rendered:
        messages = form.messages
        made = marked(messages)
        text, marks = self._text(made.messages, form.options)
        made.messages.clear()  # copies, of what may be large
        plain = unmarked(text)
        del text
        # Our own template says every message as it is, whatever it says.
        if self.template != TRAINING_TEMPLATE and self._text(messages, form.options)[0] != plain.text:
            raise _RefusedError("template", "the chat template changes with a message's words: they can't be found")
        self._check_placed(form, plain.text)
        _check_lost(form, untrained, made, plain)
        if self._has_marks:
            owned = self._own_marks(made, plain, [(plain.place(start), plain.place(end)) for start, end in marks])
        else:
            owned = self._found(messages, made, plain)
        trained = [(number - form.added, span) for number, span in owned if number not in untrained]
        spans = [span for _, span in trained]
        _check_covered(untrained, made, plain, spans)
        return Rendered(plain.text, _merged(spans), trained)

    def _text(self, messages: Sequence[Message], options: Mapping[str, Any]) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = cast(Any, render_jinja_template)(
                conversations=[list(messages)],
                chat_template=self._dated,
                return_assistant_tokens_mask=self._has_marks,
                **{**self._special, **options},
            )
        except RENDER_ERRORS as error:
            raise _RefusedError("template", f"the chat template refused it: {error}") from error
        return texts[0], spans[0] if spans else []

    def _check_placed(self, form: Form, text: str) -> None:
        """Refuse tools and calls of which the template says nothing at all."""
        for key in ("tool_calls", "tools"):
            if not form.has(key):
                continue
            bare = form.without(key)
            try:
                said = self._text(bare.messages, bare.options)[0] != text
            except _RefusedError:  # it can't say the rest without them
                continue
            if not said:
                raise _RefusedError(
                    key, f"the chat template has no place for {key} (model.chat_template: one that has, such as qwen3)"
                )

    def _own_marks(self, made: Marked, plain: Plain, marks: list[Span]) -> list[tuple[int, Span]]:
        """(message, span) of what the template marks; what follows an answer, such as the end of the text, is its."""
        owned: list[tuple[int, Span]] = []
        words = deque(plain.found)
        owner = made.words[words[0][0]][0] if words else -1
        for start, end in marks:
            first = words[0][1][0] if words else end
            while words and words[0][1][0] < end:
                owner = made.words[words.popleft()[0]][0]
            # Some marks take in what stands before an answer, which the prompt ends with.
            head = plain.text.rfind(self._turn.header, 0, min(first, end)) if self._turn.header else -1
            after = head + len(self._turn.header)
            if head >= 0 and start < after and plain.text[start:after].strip():
                start = after
            owned.append((owner, (start, end)))
        return owned

    def _found(self, messages: Sequence[Mapping[str, Any]], made: Marked, plain: Plain) -> list[tuple[int, Span]]:
        """(message, span) of every answer, from where the prompt ends to the token that ends the turn."""
        text, turn = plain.text, self._turn
        around: dict[int, Span] = {}
        for word, (start, end) in plain.found:
            number = made.words[word][0]
            around[number] = (min(start, around.get(number, (start, end))[0]), end)
        owned, before = [], 0
        for number, (start, end) in around.items():
            head = text.rfind(turn.header, before, start)
            begin = head + len(turn.header) if turn.header and head >= 0 else _own_start(messages[number], text, start)
            stop = text.find(turn.end, end)
            if stop < 0 or (text[end:stop].strip() and not messages[number].get("tool_calls")):
                raise _RefusedError("template", f"message {number} (assistant) isn't followed by {turn.end!r}")
            before = stop + len(turn.end)
            if turn.last and number == len(messages) - 1 and text[before:].strip() == turn.last:
                before = len(text.rstrip())
            owned.append((number, (begin, before)))
        return owned

    def _check_marks(self) -> None:
        """Raise UserError unless the marks cover an answer and something after it: the token that ends the turn."""
        rendered = self.render([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}])
        if isinstance(rendered, BadRow):
            raise UserError(
                f"The tokenizer's chat template can't be trained with (a question and its answer): {rendered.detail}."
            )
        marked = "".join(rendered.text[start:end] for start, end in rendered.spans)
        answer, found, end = marked.partition("four")
        if not found or not end.strip() or "2+2?" in answer:
            raise UserError(
                "The tokenizer's chat template marks the wrong part as trained: put the assistant's content and its "
                f"end token, and nothing of the user's, inside {{% generation %}}; now it marks {marked!r}."
            )


def _check_texts(messages: Sequence[Message], beside: Sequence[str], control: ControlTokens) -> None:
    """Refuse texts that can't be written, or spell a control token out; `beside`: the row's tools and arguments."""
    texts = [(f"message {number} ({message['role']})", spelled(message)) for number, message in enumerate(messages)]
    for where, text in (*texts, *(("what the chat template is told", text) for text in beside)):
        if not _encodable(text):
            raise _RefusedError("invalid_unicode", f"{where} holds half of a surrogate pair")
        if not text.isascii() and NONCHARACTER.search(text):
            raise _RefusedError("invalid_unicode", f"{where} holds a noncharacter of Unicode")
        found = control.find(text)
        if found:
            raise _RefusedError("control_token", f"{where} spells out {found}")


def _check_lost(form: Form, untrained: Collection[int], made: Marked, plain: Plain) -> None:
    """Refuse a conversation of which the rendered text leaves something out that is trained, or that it answers."""
    messages = form.messages
    places = dict(plain.found)
    for number, (owner, words) in enumerate(made.words):
        start, end = places.get(number, (0, 0))
        if owner not in untrained and plain.text[start:end] != words:
            raise _RefusedError(
                LOST, f"the chat template leaves out what message {owner} (assistant) says: {words[:60]!r}"
            )
    twice = _TWICE.search(plain.text)
    if twice and not any(_TWICE.search(message["content"] or "") for message in messages):
        raise _RefusedError(LOST, "the chat template puts an empty thought before a message's own")
    for number, message in enumerate(messages):
        said: list[Any] = [message["content"]] if message["role"] != "assistant" else []
        said += [call for call in message.get("tool_calls") or [] if number not in untrained]
        tools = from_json(message.get("tools"))
        said += tools if isinstance(tools, list) else [tools]
        for call in said:
            for lost in _lost(plain.text, call):
                where = f"message {number} ({message['role']})"
                raise _RefusedError(LOST, f"the chat template leaves out what {where} says: {lost[:60]!r}")
    for tool in form.options.get("tools", ()):
        for lost in _lost(plain.text, tool):
            raise _RefusedError("tools", f"the chat template leaves the tool {lost[:60]!r} out")


def _check_covered(untrained: Collection[int], made: Marked, plain: Plain, spans: Sequence[Span]) -> None:
    """Refuse a conversation of which the template's marks leave an answer's words out."""
    ends = [end for _, end in spans]
    for number, (start, end) in plain.found:
        owner = made.words[number][0]
        at = bisect_left(ends, end)
        if owner not in untrained and not (at < len(spans) and spans[at][0] <= start):
            raise _RefusedError("template", f"it marks the wrong part as trained, not what message {owner} says")


def _lost(text: str, call: Any) -> Iterator[str]:
    """What `text` leaves out of the name and arguments of a tool or of a call; or of a text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        yield from said_in(text, call)
        return
    arguments = function.get("arguments")
    yield from said_in(text, [function.get("name"), from_json(arguments)])
    if isinstance(arguments, str) and arguments.strip() not in text:
        yield arguments  # JSON in quotes, as some templates write what they take for a mapping


def _own_start(message: Mapping[str, Any], text: str, start: int) -> int:
    """Where the message begins: its first words stand at `start`, and what it says before them may stand before it."""
    content = message["content"]
    before = content[: len(content) - len(content.lstrip())]
    for opened in (f"{before}<think>\n", "<think>\n", "<think>"):
        if content.startswith(opened) and text.endswith(opened, 0, start):
            return start - len(opened)
    return start


def _encodable(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        elif end > start:
            merged.append((start, end))
    return merged
