"""Conversations to text, with the character spans that are trained on."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sft.data.read.conversation import Message
from sft.data.read.row import BadRow
from sft.data.tokenize.template import training_template
from sft.utils.errors import UserError

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the text the model reads; `spans` are the [start, end) characters that are trained on."""

    text: str
    spans: list[Span]


class Renderer:
    """Renders conversations with a tokenizer's training template."""

    def __init__(self, tokenizer: Any) -> None:
        self.template = training_template(tokenizer)
        self._special = dict(tokenizer.special_tokens_map)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {token for token in tokenizer.all_special_tokens if token}
        ordered = sorted(special, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._check_marks()

    def render(self, messages: Sequence[Message], untrained: Collection[int] = ()) -> Rendered | BadRow:
        """The conversation's text and trained spans, or why it can't be rendered.

        `untrained`: numbers of the assistant's messages that are context only.

        A message that spells a special token out (such as `<|end|>`) is refused: it would be read as the real one, and
        end a turn or forge another's.
        """
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        for i, message in enumerate(messages):
            if not _encodable(message["content"]):
                return BadRow("invalid_unicode", f"message {i} ({message['role']}) holds half of a surrogate pair")
            found = self._control and self._control.search(message["content"] + message.get("tools", ""))
            if found:
                return BadRow("control_token", f"message {i} ({message['role']}) spells out {found.group()}")
        try:
            texts, spans = cast(Any, render_jinja_template)(
                conversations=[list(messages)],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self._special,
            )
        except (TemplateError, TypeError) as error:
            return BadRow("template", f"the chat template refused it: {error}")
        trained = spans[0]
        if untrained:
            said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            # What follows the last message's own span, such as the end of the text, is marked apart.
            if len(trained) not in (len(said), len(said) + 1):
                return BadRow("template", f"the chat template marks {len(trained)} parts of {len(said)} answers")
            owners = [*said, *said[-1:]]
            trained = [span for span, owner in zip(trained, owners, strict=False) if owner not in untrained]
        return Rendered(texts[0], _merged(trained))

    def _check_marks(self) -> None:
        """Raise UserError unless the marks cover an answer and something after it: the token that ends the turn."""
        rendered = self.render([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}])
        if isinstance(rendered, BadRow):
            raise UserError(f"The tokenizer's chat template can't render a question and its answer: {rendered.detail}.")
        marked = "".join(rendered.text[start:end] for start, end in rendered.spans)
        answer, found, end = marked.partition("four")
        if not found or not end.strip() or "2+2?" in answer:
            raise UserError(
                "The tokenizer's chat template marks the wrong part as trained: put the assistant's content and its "
                f"end token, and nothing of the user's, inside {{% generation %}}; now it marks {marked!r}."
            )


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
