"""Texts that end an answer."""

from __future__ import annotations

from typing import Any


class StopTexts:
    """Finds stop texts at the end of an answer, whichever way its tokens cut them."""

    def __init__(self, tokenizer: Any, texts: tuple[str, ...]) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        # A token that is text holds at least a byte of it, and what stands in front of a stop text may need some to be
        # read as text at all.
        self._reach = max(len(text.encode()) for text in texts) + 8

    def find(self, ids: list[int]) -> str | None:
        """The stop text that the last token completes: the one that begins first."""
        text = self.tokenizer.decode(ids[-self._reach :], skip_special_tokens=False)
        found = [(text.index(stop), stop) for stop in self.texts if stop in text]
        return min(found)[1] if found else None


def cut(text: str, stop: str | None) -> str:
    """The answer's text in front of the stop text that ended it."""
    return text if stop is None else text[: text.index(stop)]
