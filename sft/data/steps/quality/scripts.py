"""Which scripts a text is written in, to tell when an answer leaves the language of its question."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

# One language uses them together.
_EAST_ASIAN = {"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "IDEOGRAPHIC"}
# Mathematics uses Greek in every language.
_OF_NO_LANGUAGE = {"GREEK", "MODIFIER"}
# Letterlike symbols, mathematical letters, Arabic mathematical letters.
_MATHEMATICAL = ((0x2100, 0x214F), (0x1D400, 0x1D7FF), (0x1EE00, 0x1EEFF))

_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
# At least four words in a row: names, formulas and commands, which every language writes in Latin letters, are shorter.
# Possessive, and never begun within a word: linear on any text.
_PROSE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}+(?:[\s,;:.'’()-]++[A-Za-z]{2,}+){3,}+")
_ASCII_LETTERS = string.ascii_letters.encode()


class Foreign(NamedTuple):
    """Letters of a text in other scripts than its question's: `letters` of `total`, mostly `script`."""

    letters: int
    total: int
    script: str

    @property
    def share(self) -> float:
        """0 ... 1."""
        return self.letters / self.total if self.total else 0.0


def native_scripts(question: str) -> frozenset[str]:
    """The scripts that an answer to `question` may be written in; none where it has no letters.

    All that occur in it; but Latin, which formulas and names use in every language, only where nothing else does, or
    where it has prose in it (four words in a row).
    """
    scripts = frozenset(_letters(question))
    if scripts > {"LATIN"} and not _PROSE.search(question):
        scripts -= {"LATIN"}
    return scripts


def foreign_letters(text: str, native: frozenset[str]) -> Foreign:
    """The letters of `text` that aren't in one of the `native` scripts; where there are none, in its commonest.

    Greek and mathematical letters count nowhere. Latin letters are foreign to another script only in prose outside of
    code, and count nowhere else.
    """
    if text.isascii() and (not native or "LATIN" in native):
        return Foreign(0, 0, "")
    written = _letters(text)
    if not native and written:
        native = frozenset({max(written, key=lambda script: (written[script], script))})
    if "LATIN" not in native:
        written["LATIN"] = _latin_prose(text)
    foreign = {script: letters for script, letters in written.items() if script not in native and letters}
    most = max(foreign, key=lambda script: (foreign[script], script), default="")
    return Foreign(sum(foreign.values()), sum(written.values()), most)


def _letters(text: str) -> Counter[str]:
    """How many letters of each script."""
    ascii_letters = 0
    if text:
        raw = text.encode("utf-8", "surrogatepass")
        ascii_letters = len(raw) - len(raw.translate(None, _ASCII_LETTERS))
    counts = Counter({"LATIN": ascii_letters} if ascii_letters else {})
    for character, times in Counter("".join(_NOT_ASCII.findall(text))).items():
        script = _script(character)
        if script is not None:
            counts[script] += times
    return counts


def _latin_prose(text: str) -> int:
    outside_code = " ".join(text.split("```")[::2])
    return sum(sum(map(str.isalpha, found)) for found in _PROSE.findall(outside_code))


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str | None:
    """The script of a letter; None for anything else. Unicode's names of letters begin with it."""
    if not character.isalpha() or any(low <= ord(character) <= high for low, high in _MATHEMATICAL):
        return None
    plain = unicodedata.normalize("NFKC", character)[0]
    name = unicodedata.name(plain if plain.isalpha() else character, "")
    script = re.split("[ -]", name)[0]
    if not script or script in _OF_NO_LANGUAGE:
        return None
    return "CJK" if script in _EAST_ASIAN else script
