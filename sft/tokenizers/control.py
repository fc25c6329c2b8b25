"""Tokens by which a chat format speaks, and that no text may spell out: it would end a turn, or forge another's."""

from __future__ import annotations

import re
from typing import Any

_THINKING = ("<think>", "</think>")
_SHAPED = re.compile(r"[<\[][|\uff5c].*[|\uff5c][>\]]", re.DOTALL)


class ControlTokens:
    """Every special token, and of the other added ones those that the chat template writes or that are shaped <|so|>.

    The marks of thinking are none: answers hold them as text.
    """

    def __init__(self, tokenizer: Any) -> None:
        template = str(template_of(tokenizer) or "")
        found = {token for token in tokenizer.all_special_tokens if token}
        for token in tokenizer.added_tokens_decoder.values():
            if token.special or token.content in template or _SHAPED.fullmatch(token.content):
                found.add(token.content)
        ordered = sorted(found.difference(_THINKING), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered)) if ordered else "(?!)")

    def find(self, text: str) -> str | None:
        """The first one that `text` spells out."""
        found = self.pattern.search(text)
        return found.group() if found else None


def template_of(tokenizer: Any) -> str | None:
    """The tokenizer's chat template; of several the default one."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template or None
