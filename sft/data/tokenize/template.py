"""The chat template with marks around what is trained on.

Two templates matter: the published one renders conversations (and stays with the tokenizer that is handed on); the
training one renders the very same text and marks the spans to learn with `{% generation %}`.

What is marked: each assistant message's content and its `<|end|>`, the token that ends a turn. The `<|endoftext|>` that
the published template puts after the last message is marked too when that message is the assistant's. Generation stops
at either token, so `<|end|>` is what stops a turn; but servers that know only the tokenizer's eos (which is
`<|endoftext|>`) stop there alone, and a model that was never taught to follow `<|end|>` with it runs on.
"""

from __future__ import annotations

import re
from typing import Any

from sft.tokenizers.control import template_of
from sft.tokenizers.templates import PUBLISHED_TEMPLATE, trained_twin
from sft.tokenizers.turns import find_turn
from sft.utils.errors import UserError

TRAINING_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% elif messages and messages[-1]['role'] == 'assistant' %}"
    "{% generation %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ eos_token }}{% endif %}"
)

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_marks(template: str) -> bool:
    """Whether a template says itself what is trained on."""
    return _MARK.search(template) is not None


def training_template(tokenizer: Any) -> str:
    """The template that conversations are rendered with for training.

    The published Phi-4-mini template gets ours; one that has marks is taken as it is; one that TRL knows gets TRL's
    training twin. Any other stays: `Renderer` finds the answers in what it renders. Raises UserError for a tokenizer
    without a template, and for one whose answers can't be found.
    """
    template = template_of(tokenizer)
    if template is None:
        raise UserError(
            "The tokenizer has no chat template; set `model.chat_template` to a known one (chatml, llama3, ...), "
            "a file or its text, or `model.tokenizer` to a tokenizer that has one."
        )
    if template.removesuffix("\n") == PUBLISHED_TEMPLATE:  # jinja renders nothing for a last newline
        return TRAINING_TEMPLATE
    template = template if has_marks(template) else trained_twin(template) or template
    turn = find_turn(tokenizer, template)
    why = turn if isinstance(turn, str) else "nothing ends its answers" if not (turn.end or has_marks(template)) else ""
    if why:
        raise UserError(
            f"What is trained on can't be found in what the tokenizer's chat template renders: {why}. Set "
            "`model.chat_template` to another one, or put {% generation %} ... {% endgeneration %} around the "
            "assistant's content and its end token in it."
        )
    return template
