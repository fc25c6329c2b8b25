"""How a chat template writes an answer: what stands before it, and what ends it, found out by rendering."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from sft.tokenizers.control import ControlTokens, template_of
from sft.tokenizers.dates import with_fixed_date

RENDER_ERRORS: tuple[type[Exception], ...] = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What a template may raise that can't say a conversation."""

_PROBE = (("user", "What is 2+2?"), ("assistant", "It is four."), ("user", "And 3+3?"), ("assistant", "It is six."))


@dataclass(frozen=True)
class Turn:
    """An answer's surroundings.

    Attributes:
        header: what stands before every answer, and at the end of a prompt: such as `<|im_start|>assistant\\n`.
        end: what ends every answer: such as `<|im_end|>`. Empty where nothing does.
        last: what follows `end` after a conversation's last answer: such as an end of text. Mostly empty.
    """

    header: str
    end: str
    last: str


def find_turn(tokenizer: Any, template: str) -> Turn | str:
    """What stands around answers, or a sentence's end that says why it can't be told."""
    question, answer, again, last = (text for _, text in _PROBE)
    try:
        whole = render(template, _messages(4), tokenizer.special_tokens_map)
        prompt = render(template, _messages(1), tokenizer.special_tokens_map, add_generation_prompt=True)
    except RENDER_ERRORS as error:
        line = getattr(error, "lineno", None)
        return f"it can't render two questions with their answers{f' (line {line})' if line else ''}: {error}"
    places = [whole.find(text) for _, text in _PROBE]
    if min(places) < 0 or sorted(places) != places or question not in prompt:
        missing = next((role for (role, _), place in zip(_PROBE, places, strict=True) if place < 0), "turns' order")
        return f"of two questions with their answers it loses what the {missing} says"
    between = whole[places[1] + len(answer) : places[2]]
    after = whole[places[3] + len(last) :]
    pieces = re.compile(rf"{ControlTokens(tokenizer).pattern.pattern}|<[^<>\s]*>|.", re.DOTALL)
    end = _common(pieces.findall(between), pieces.findall(after)).strip()
    if not any(len(piece) > 1 for piece in pieces.findall(end)):
        end = ""  # no token: a bracket of a list, say
    heads = [_without(whole[places[i] + len(asked) : places[i + 1]], end) for i, asked in ((0, question), (2, again))]
    header = _without(prompt[prompt.rindex(question) + len(question) :], end)
    for head in heads:
        header = _common(pieces.findall(header), pieces.findall(head))
    header = header.partition("<think>")[0]  # where a thought begins belongs to the answer
    return Turn(header, end, _without(after, end).rstrip())


def end_of_turn(tokenizer: Any) -> int | None:
    """The id of the one token that ends an answer under the tokenizer's chat template; None where none is known."""
    template = template_of(tokenizer)
    turn = find_turn(tokenizer, template) if template is not None else ""
    if isinstance(turn, str) or not turn.end:
        return None
    ids = tokenizer(turn.end, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if len(ids) == 1 else None


def spelled_end(tokenizer: Any, template: str) -> str | None:
    """What ends the template's answers, where no token does: it is spelled in several, and no end of text follows."""
    turn = find_turn(tokenizer, template)
    if isinstance(turn, str) or not turn.end or end_of_turn(tokenizer) is not None:
        return None
    return None if tokenizer.eos_token and tokenizer.eos_token in turn.end + turn.last else turn.end


def largest_format_id(tokenizer: Any, template: str) -> int:
    """The largest id in questions and answers as the template writes them. Control tokens are a vocabulary's last."""
    text = render(template, _messages(4), tokenizer.special_tokens_map)
    return max(tokenizer(text, add_special_tokens=False)["input_ids"], default=-1)


def render(template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, Any], **options: Any) -> str:
    """The text of a conversation. Raises what the template raises."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversations: Any = [list(messages)]
    fixed = with_fixed_date(template)
    return str(render_jinja_template(conversations, chat_template=fixed, **special, **options)[0][0])


def _messages(count: int) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in _PROBE[:count]]


def _common(one: list[str], other: list[str]) -> str:
    """The pieces that both begin with."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return "".join(one[:same])


def _without(text: str, end: str) -> str:
    """What follows the end of a turn, where one is there."""
    bare = text.lstrip()
    return bare.removeprefix(end).lstrip() if end and bare.startswith(end) else text
