"""Chat templates by name: as published for Phi-4-mini, ChatML, and those that TRL brings with their training twins."""

from __future__ import annotations

from functools import cache

from sft.recipe.chat_templates import OWN, trl_templates

PUBLISHED_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)

CHATML_END = "<|im_end|>"
# As Qwen's and many others' templates say messages, without what those add of their own.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def known_template(family: str) -> str:
    """The template of a family that `model.chat_template` knows."""
    own = dict(zip(OWN, (CHATML_TEMPLATE, PUBLISHED_TEMPLATE), strict=True))
    return own[family] if family in own else trl_templates()[family].read_text(encoding="utf-8")


def trained_twin(template: str) -> str | None:
    """TRL's training twin of a template, which marks what is trained on; None where TRL has none."""
    return _twins().get(template)


@cache
def _twins() -> dict[str, str]:
    texts = {name: path.read_text(encoding="utf-8") for name, path in trl_templates().items()}
    return {text: texts[f"{name}_training"] for name, text in texts.items() if f"{name}_training" in texts}
