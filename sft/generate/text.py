"""An answer's text while its tokens come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

Kind = Literal["mark", "thought", "answer"]

_CUT_CHARACTER = "\ufffd"


class TextStream:
    """Text of tokens that come piece by piece: altogether what the tokenizer reads in all of them, in front of the stop
    text that ended them.

    Args:
        stop: what may become a stop text, or a character, is held back until that is decided.
    """

    def __init__(self, tokenizer: Any, stop: Iterable[str] = (), *, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.stop, self.skip = tokenizer, tuple(stop), skip_special_tokens
        self._ids: list[int] = []
        self._before = 0  # tokens that are read along, so that the new ones read as they do in the whole text
        self._read = 0
        self._held = ""

    def add(self, ids: list[int]) -> str:
        """The text that is certain with these tokens."""
        self._ids += ids
        before = self._decode(self._ids[self._before : self._read])
        text = self._decode(self._ids[self._before :])
        if len(text) <= len(before) or text.endswith(_CUT_CHARACTER):
            return ""
        self._ids = self._ids[self._read :]
        self._before, self._read = 0, len(self._ids)
        return self._release(text[len(before) :])

    def finish(self, ids: list[int], stop: str | None = None) -> str:
        """The rest with the last tokens, in front of the stop text that they complete."""
        self._ids += ids
        before = self._decode(self._ids[self._before : self._read])
        text = self._held + self._decode(self._ids[self._before :])[len(before) :]
        self._held = ""
        # A stop text that a special token spelled isn't in a text without those.
        return text if stop is None else text.partition(stop)[0]

    def _release(self, text: str) -> str:
        text = self._held + text
        held = max((overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=self.skip, clean_up_tokenization_spaces=False) if ids else ""
        )


def overlap(text: str, mark: str) -> int:
    """How many of the text's last characters are the first ones of `mark`, which may be whole."""
    return next((size for size in range(min(len(mark), len(text)), 0, -1) if text.endswith(mark[:size])), 0)


class Thinking:
    """Tells the thinking that an answer begins with from what follows.

    Args:
        opened: the prompt ends with the mark that opens it.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self._state: Literal["before", "within", "behind"] = "within" if opened else "before"
        self._held = ""

    def add(self, text: str) -> list[tuple[Kind, str]]:
        """The text in parts; what may become a mark is held back."""
        text, self._held = self._held + text, ""
        found: list[tuple[Kind, str]] = []
        if self._state == "before":
            begun = text.lstrip()
            if begun.startswith(THINK_OPEN):
                lead = len(text) - len(begun) + len(THINK_OPEN)
                found.append(("mark", text[:lead]))
                text, self._state = text[lead:], "within"
            elif THINK_OPEN.startswith(begun):
                self._held = text
                return []
            else:
                self._state = "behind"
        if self._state == "within":
            thought, closed, text = text.partition(THINK_CLOSE)
            if closed:
                self._state = "behind"
                found += [("thought", thought), ("mark", closed)]
            else:
                held = overlap(thought, THINK_CLOSE)
                self._held, text = thought[len(thought) - held :], ""
                found.append(("thought", thought[: len(thought) - held]))
        return [(kind, part) for kind, part in [*found, ("answer", text)] if part]

    def finish(self) -> list[tuple[Kind, str]]:
        """The rest."""
        held, self._held = self._held, ""
        return [("thought" if self._state == "within" else "answer", held)] if held else []


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends with the mark that opens thinking."""
    return prompt.rstrip().endswith(THINK_OPEN)
