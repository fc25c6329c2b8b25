"""Token ids of ASCII text by Python's `re` and a dictionary of words, in a quarter of the library's time.

Nine tenths of a byte-level BPE tokenizer's time go into the expression that splits a text into words. In ASCII text
its Unicode classes are ranges of characters, so Python's `re` finds the same words; the ids of a word are what the
library's own BPE model gives, asked once and kept. A tokenizer that is built otherwise, or whose expression holds
anything that isn't known to mean the same to both, isn't taken apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

# Unicode's general categories in ASCII; what has no member there is a character that ASCII text doesn't hold.
CLASSES = {
    "L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "Lt": "\x80", "Lm": "\x80", "Lo": "\x80", "M": "\x80", "N": "0-9",
}  # fmt: skip
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel splits by where it does that itself (Radford et al. 2019)."""
# What both read alike. Not: groups that capture, possessive and lazy repetition, `.`, borders of lines, sets of sets.
_CATEGORY, _ESCAPED = r"\\p\{(?P<category>\w+)\}", r"\\[sSrnt]|\\[^\w]"
_REPEATED = r"(?:[*+?]|\{\d+(?:,\d*)?\})(?![*+?{])"
_OUTSIDE = re.compile(rf"{_CATEGORY}|{_ESCAPED}|\(\?(?:i:|:|!|=)|{_REPEATED}|\[\^?|[^\\.^$(\[\]{{}}*+?]")
_IN_CLASS = re.compile(rf"{_CATEGORY}|{_ESCAPED}|(?!&&|--|~~|\|\|)[^\\\[]")
_MOST_WORDS, _LONGEST_WORD = 1 << 19, 64
"""Kept, and of how many characters: longer ones hardly come again."""


class AsciiWords:
    """Ids of ASCII text, as a byte-level BPE tokenizer gives them."""

    def __init__(self, pattern: str, added: dict[int, Any], model: Any) -> None:
        self._split = re.compile(pattern, re.ASCII).findall
        self._words = _Words(model)
        self._added = {token.content: (number, token.lstrip, token.rstrip) for number, token in added.items()}
        # The library looks for those that normalizers don't concern first, then for the others in what is left.
        kinds = ([token.content for token in added.values() if token.normalized == kind] for kind in (False, True))
        self._cuts = [_cut(contents) for contents in kinds if contents]

    def encode(self, text: str) -> list[int] | None:
        """The ids; None where the library has to say: text beyond ASCII, space that an added token swallows, characters
        that the expression passes over."""
        return self._encode(text, self._cuts) if text.isascii() else None

    def _encode(self, text: str, cuts: list[Callable[[str], list[str]]]) -> list[int] | None:
        if not cuts:
            words = self._split(text)
            whole = sum(map(len, words)) == len(text)
            return list(chain.from_iterable(map(self._words.__getitem__, words))) if whole else None
        ids: list[int] = []
        parts = cuts[0](text)
        for place, part in enumerate(parts):
            if place % 2:
                number, left, right = self._added[part]
                if (left and parts[place - 1][-1:] in _SPACES) or (right and parts[place + 1][:1] in _SPACES):
                    return None
                ids.append(number)
            elif part:
                found = self._encode(part, cuts[1:])
                if found is None:
                    return None
                ids += found
        return ids


_SPACES = frozenset(" \t\n\v\f\r")


def _cut(contents: list[str]) -> Callable[[str], list[str]]:
    """A function that splits a text at these tokens, the longest first; they stand at its odd places."""
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})").split


class _Words(dict[str, list[int]]):
    """The ids of every word that was met."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __missing__(self, word: str) -> list[int]:
        ids = [token.id for token in self._model.tokenize(word.translate(_BYTE_LEVEL))]
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


# How a byte-level vocabulary writes bytes that have no visible character: from U+0100 on, in their order (GPT-2).
_BYTE_LEVEL = {byte: 0x100 + place for place, byte in enumerate([*range(0x21), 0x7F])}


def ascii_words(backend: Any) -> AsciiWords | None:
    """For a `tokenizers.Tokenizer`; None where it can't be taken apart, or where a trial gives other ids than it."""
    pattern = _pattern(backend)
    added = backend.get_added_tokens_decoder()
    if pattern is None or any(token.single_word or token.content.strip() != token.content for token in added.values()):
        return None
    words = AsciiWords(pattern, added, backend.model)
    return words if all(words.encode(text) in (None, _own(backend, text)) for text in _trials(added)) else None


def _own(backend: Any, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _trials(added: dict[int, Any]) -> list[str]:
    """Every pair of ASCII characters, and words, numbers and spaces between all added tokens."""
    pairs = ["".join(chr(a) + chr(b) for b in range(128)) for a in range(128)]
    return [*pairs, " I'll   aBC 12345\n\n".join(token.content for token in added.values())]


def _pattern(backend: Any) -> str | None:
    """The expression that splits a text, for `re`; None for a tokenizer of another build."""
    model, steps = backend.model, backend.pre_tokenizer
    if type(model).__name__ != "BPE" or model.dropout or backend.normalizer is not None or steps is None:
        return None
    state = json.loads(steps.__getstate__())
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    *first, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(first) > 1 or last["use_regex"] == bool(first):
        return None
    if not first:
        return translated(GPT2)
    (split,) = first
    plain = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    return translated(split["pattern"]["Regex"]) if plain and "Regex" in split["pattern"] else None


def translated(pattern: str) -> str | None:
    """An expression of the library's for ASCII text in Python's words; None where one of its parts isn't known."""
    made, place, inside = "", 0, False
    while place < len(pattern):
        found = (_IN_CLASS if inside else _OUTSIDE).match(pattern, place)
        if found is None or (found["category"] or "L") not in CLASSES:
            return None
        if found["category"]:
            made += CLASSES[found["category"]] if inside else f"[{CLASSES[found['category']]}]"
        else:
            made += found[0]
            inside = found[0].startswith("[") or (inside and found[0] != "]")
        place = found.end()
    return made
