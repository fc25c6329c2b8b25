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

from sft.tokenizers.templates import PUBLISHED_TEMPLATE
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


def training_template(tokenizer: Any) -> str:
    """The tokenizer's chat template with generation marks.

    The published Phi-4-mini template gets ours; one that has marks is taken as it is; one that TRL knows gets TRL's
    training twin. Raises UserError for a tokenizer without a template and for any other template.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise UserError("The tokenizer has no chat template; set `model.tokenizer` to one that has.")
    if template.removesuffix("\n") == PUBLISHED_TEMPLATE:  # jinja renders nothing for a last newline
        return TRAINING_TEMPLATE
    if _MARK.search(template):
        return str(template)
    twin = _trl_twin(tokenizer)
    if twin is not None and _MARK.search(twin):
        return twin
    raise UserError(
        "The tokenizer's chat template doesn't mark what is trained on and isn't one that is known; put "
        "{% generation %} ... {% endgeneration %} around the assistant's content and its end token in "
        "the tokenizer's chat_template.jinja."
    )


def _trl_twin(tokenizer: Any) -> str | None:
    from trl.chat_template_utils import get_training_chat_template  # imported late: it takes seconds

    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None
