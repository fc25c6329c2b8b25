"""Answers in words: yes and no, names, days."""

from __future__ import annotations

import calendar
import re

from sft.answers.normal import bare

_LONGEST = 300
_WORDS = re.compile(r"[^\W\d_]+\.?(?:(?:, ?|; ?| ?& ?|[ '-])[^\W\d_]+\.?)*")
_SHORT = set(["yes", "no", "true", "false", "none", "both", "odd", "even"])
_POLAR = {"yes": True, "true": True, "correct": True, "no": False, "false": False, "incorrect": False}
_LETTERS = {"t": "true", "f": "false", "y": "yes", "n": "no"}
_SHORTENED = {"dne": "does not exist"}
_SHORTENED |= {"tues": "tuesday", "thur": "thursday", "thurs": "thursday", "sept": "september"}
_SHORTENED |= {name[:3].casefold(): name.casefold() for name in (*calendar.day_name, *calendar.month_name) if name}
# What stands around a word without changing what it says.
_AROUND = set("the a an on in at to by of is it its it's was dr mr mrs ms miss prof".split())
_SUBJECT = re.compile(r"^(?:it|this|that|the (?:statement|claim|proposition)) is ", re.IGNORECASE)
_JOINED = re.compile(r",? and |, ?|; ?| ?& ?", re.IGNORECASE)
NOTHING = re.compile(
    r"\\emptyset|(?:there (?:is|are) |there's |(?:the (?:equation|system|inequality|problem)|it) has )?"
    r"(?:no(?: (?:real|such|integer|possible|valid))* (?:solutions?|roots?|values?|answers?|numbers?|[a-z])|none)"
    r"(?: exists?| of [a-z]+)?|(?:the )?empty set",
    re.IGNORECASE,
)
REALS = re.compile(r"(?:all |the )?(?:real numbers?|reals)|\\mathbb\s?\{?R\}?|R", re.IGNORECASE)


def is_words(text: str) -> bool:
    r"""Whether `text` is words of a language: in `\text{}`, or certainly no product of variables."""
    plain = bare(text[: _LONGEST + 1])
    if len(plain) > _LONGEST or not _WORDS.fullmatch(plain):
        return False
    words = re.split(r"[^\w]+", plain.casefold())
    return "\\" in text or any(word in _SHORT or (len(word) > 3 and set(word) & set("aeiou")) for word in words)


def within(gold: str, text: str) -> bool:
    """Whether the words of `gold` are in `text`, as whole words."""
    return re.search(rf"(?<!\w){re.escape(bare(gold).casefold())}(?!\w)", bare(text).casefold()) is not None


def compare_words(mine: str, gold: str) -> tuple[str, str] | None:
    """(right | wrong | undecided, reason), or None where `gold` isn't words."""
    one, other = (_SHORTENED.get(text, text) for text in (bare(mine[:_LONGEST]).casefold(), bare(gold).casefold()))
    # The letter of a variable is a word only beside that word.
    one, other = (
        _LETTERS.get(one, one) if other in _POLAR else one,
        _LETTERS.get(other, other) if one in _POLAR else other,
    )
    said, meant = polar(one), polar(other)
    if meant is not None and (other in _POLAR or one in _POLAR):
        if said is None:
            return ("undecided", "neither yes nor no") if _WORDS.fullmatch(one) else ("wrong", "neither yes nor no")
        return ("right", "same words") if said == meant else ("wrong", "the opposite")
    if not (is_words(gold) or is_words(other)) or NOTHING.fullmatch(other) or REALS.fullmatch(other):
        return None
    if one.startswith("not ") != other.startswith("not ") or _miscalled(one, other) or _miscalled(other, one):
        return "wrong", "other words"
    if one == other or (_WORDS.fullmatch(one) and "".join(_core(one)) == "".join(_core(other))):
        return "right", "same words"
    if _WORDS.fullmatch(one) and _turned(one) & _turned(other):
        return "right", "same words in another order"
    if within(other, mine) or (_WORDS.fullmatch(one) and within(mine, gold)):
        parts = [_JOINED.split(text) for text in (one, other)]
        if len(parts[0]) != len(parts[1]) and " or " not in one:
            return "wrong", "other words"
        return "undecided", "the gold answer among other words"
    return "wrong", "other words"


def polar(text: str) -> bool | None:
    """What a text that begins with yes, no, true or false says; None where it says neither, or both."""
    text = _SUBJECT.sub("", text)
    words = re.findall(r"[a-z']+", text.casefold())
    negated = bool(words) and words[0] in ("not", "isn't")
    words = words[negated:]
    if not words or words[0] not in _POLAR or (text.casefold() != words[0] and NOTHING.fullmatch(text)):
        return None
    # `No, it converges` says no; `yes and no` says nothing, and `no solution` isn't `no`.
    others = [_POLAR[word] for word in words[1:] if word in ("yes", "no", "true", "false")]
    if any(other != _POLAR[words[0]] for other in others) or (words[0] == "no" and re.match(r"\s*no [a-z]", text)):
        return None
    return _POLAR[words[0]] != negated


def _miscalled(man: str, woman: str) -> bool:
    return re.search(r"\bmr\b", man) is not None and re.search(r"\b(?:mrs|ms|miss)\b", woman) is not None


def _core(text: str) -> list[str]:
    words = re.findall(r"\w+", text)
    return [word for word in words if word not in _AROUND] or words


def _turned(text: str) -> set[tuple[str, ...]]:
    """The ways to say it: `smith, alice` is `alice smith`, and `a and b` is `b and a`."""
    parts = [" ".join(_core(part)) for part in _JOINED.split(text)]
    ways: set[tuple[str, ...]] = {tuple(sorted(parts))}
    if len(parts) == 2 and re.fullmatch(r"[^,]+,[^,]+", text):
        ways |= {(f"{parts[1]} {parts[0]}",)}
    return ways
