"""Sentences of reasoning text: prose mixed with formulas, code and lists, where a dot is often no end of a sentence."""

from __future__ import annotations

import re

Span = tuple[int, int]

# What may end a sentence, and what opens a stretch in which nothing does.
_MARK = re.compile(r"```|\\\[|\\\(|\$\$|\$|\\begin\{[A-Za-z]+\*?\}|\n|[.!?…]+|[。！？]+")
_CLOSING = {"```": "```", "\\[": "\\]", "\\(": "\\)", "$$": "$$"}
# An inline formula as pandoc knows it (no space inside the dollars, no digit after): "$5 and $6" are sums of money.
_INLINE = re.compile(r"\$(?![\s$])[^$\n]{0,998}(?<!\s)\$(?!\d)")
_CLOSERS = re.compile(r"[\"'”’)\]}*_`]*")
_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[A-Za-z.]*$")
_LIST_NUMBER = re.compile(r"(?:^|\n)[ \t>*#-]*\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{1,4})$")

# fmt: off
_ABBREVIATIONS = frozenset(
    ["e.g", "i.e", "vs", "cf", "dr", "mr", "mrs", "prof", "approx", "resp", "w.r.t", "viz", "al", "s.t", "a.k.a"]
)
_BEFORE_A_NUMBER = frozenset(
    ["no", "nos", "eq", "eqs", "fig", "figs", "thm", "lem", "prop", "cor", "def", "sec", "ch", "p", "pp", "vol", "ex"]
)
# fmt: on
_OPERATOR = re.compile(r"[=+/^,;:)\]}]|\*\s")


def sentence_spans(text: str) -> list[Span]:
    """The [start, end) of each sentence of `text`, in order and without gaps: every character is in exactly one.

    A sentence ends at a newline, or after `.`, `!`, `?` or `…` (and closing quotes and brackets) before a space; the
    space belongs to it. It doesn't end inside `$...$`, `$$...$$`, `\\(...\\)`, `\\[...\\]`, an environment or a code
    fence that is closed; nor after a decimal's dot, an abbreviation or a list's number, nor before an operator
    (`5! = 120`).
    Each has a character that is no space, unless the whole text has none. Empty text has no sentences.
    """
    spans: list[Span] = []
    start, first, last = 0, _after_space(text, 0), len(text.rstrip())
    for end in _ends(text):
        if max(start, first) < end < last:
            spans.append((start, end))
            start = end
    return [*spans, (start, len(text))] if text else []


def _ends(text: str) -> list[int]:
    """Where sentences end, the space behind them included."""
    ends: list[int] = []
    position, never_closed = 0, set[str]()
    while (mark := _MARK.search(text, position)) is not None:
        found, position = mark.group(), mark.end()
        if found == "\n":
            ends.append(_after_space(text, position))
        elif found[0] in ".!?…":
            if (end := _sentence_end(text, mark.start(), position)) is not None:
                ends.append(end)
        elif found[0] in "。！？":
            ends.append(_after_space(text, _match_end(_CLOSERS, text, position)))
        else:
            position, closer = _protected_end(text, mark.start(), found, never_closed)
            # "$x = 3.$ Then": the formula ends with the sentence's dot.
            last = position - len(closer) - 1
            if closer and text[last] in ".!?" and (end := _sentence_end(text, last, last + 1, position)) is not None:
                ends.append(end)
    return ends


def _protected_end(text: str, start: int, opener: str, never_closed: set[str]) -> tuple[int, str]:
    """(end of the stretch that `opener` at `start` opens, its closing mark), or (end of the opener, "")."""
    after = start + len(opener)
    if opener == "$":
        inline = _INLINE.match(text, start)
        return (inline.end(), "$") if inline else (after, "")
    closer = _CLOSING.get(opener) or opener.replace("\\begin", "\\end")
    # What isn't closed from here on isn't closed further on either: without this, many openers would cost a scan each.
    end = -1 if closer in never_closed else text.find(closer, after)
    if end < 0:
        never_closed.add(closer)
        return after, ""
    return end + len(closer), closer


def _sentence_end(text: str, start: int, end: int, closed: int | None = None) -> int | None:
    """Where the sentence ends whose stop is `text[start:end]`, or None when it goes on."""
    closed = _match_end(_CLOSERS, text, end if closed is None else closed)
    after = _after_space(text, closed)
    if after == closed and closed < len(text):
        return None
    follows = text[after : after + 1]
    if _OPERATOR.match(text, after):
        return None
    stop = text[start:end]
    if stop == ".":
        return None if _is_no_stop(text, start, follows) else after
    return None if stop[-1] in ".…" and follows.islower() else after


def _is_no_stop(text: str, dot: int, follows: str) -> bool:
    """Whether the dot ends an abbreviation or a list's number, with `follows` as the next character."""
    before = text[max(0, dot - 16) : dot]
    match = _WORD.search(before)
    word = match.group().lower().lstrip(".") if match else ""
    if word in _ABBREVIATIONS or (word in _BEFORE_A_NUMBER and (follows.isdigit() or follows in ("(", "$"))):
        return True
    if word == "etc":
        return follows.islower()
    # A stretch that doesn't reach back to the start of the text mustn't look as if a line began there.
    return bool(_LIST_NUMBER.search(before if dot <= 16 else "x" + before))


def _after_space(text: str, position: int) -> int:
    return _match_end(_SPACE, text, position)


def _match_end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position
