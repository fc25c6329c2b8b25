"""What a model is asked, as the text that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sft.tokenizers.control import ControlTokens, template_of
from sft.tokenizers.dates import with_fixed_date
from sft.tokenizers.turns import RENDER_ERRORS
from sft.utils.errors import RefusedPromptError, UserError


def prompt_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], what: str = "The prompt") -> str:
    """The text that asks a model for the next message; `what` is what a refusal calls the messages.

    Raises:
        RefusedPromptError: for a message that spells a control token out, or messages that the template refuses.
        UserError: for a tokenizer without a template.
    """
    template = template_of(tokenizer)
    if template is None:
        raise UserError(
            "The tokenizer has no chat template: set model.chat_template, or use one that was made for chat."
        )
    refuse_spelt(ControlTokens(tokenizer), messages, what)
    try:
        options = {"chat_template": with_fixed_date(template), "add_generation_prompt": True}
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except RENDER_ERRORS as error:
        raise RefusedPromptError(f"{what}: the chat template refused it: {error}") from error


def refuse_spelt(control: ControlTokens, messages: Sequence[Mapping[str, Any]], what: str) -> None:
    """Raise RefusedPromptError for a message that spells a control token out, or is no text; `what` as above."""
    for message in messages:
        if not _encodable(str(message["content"])):
            raise RefusedPromptError(f"{what} holds bytes that are no UTF-8 text (in the {message['role']} message).")
        token = control.find(f"{message['content']}{message.get('tools') or ''}")
        if token is not None:
            raise RefusedPromptError(
                f"{what} spells out {token} (in the {message['role']} message), which the model would read as the real "
                "token: take it out or write it differently."
            )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
