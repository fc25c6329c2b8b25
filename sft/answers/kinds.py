"""Kinds of answers that are compared without math-verify, and which kind a gold answer is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from sft.answers.checker import Verdict, extract_answer, quick_verdict
from sft.answers.choices import gold_letter, judge_choice, unwrapped
from sft.answers.numbers import Number, parse_number, same_number

Kind = Literal["math", "choice", "exact", "number", "words"]

# How far from the end of a completion an answer without a mark is looked for, and how long it may be.
_TAIL, _LONGEST = 4000, 300
_STATED = re.compile(r"\banswer\b(?: is\b| to [^.:\n]{1,80} is\b)?[ \t]{0,4}:?[ \t]{0,4}([^\n]+)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z]|\s*$)")
_ANY_NUMBER = re.compile(
    r"-?(?:(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|\d+(?:/\d+)?)(?:\.\d+)?(?:[eE][-+]?\d+)?\\?%?", re.ASCII
)
_WORDS = re.compile(r"[^\W\d_]+(?:[ '’-][^\W\d_]+)*")
_SHORT_WORDS = frozenset(["yes", "no", "true", "false", "none", "both", "odd", "even"])


def kind_of(gold: str, options: Mapping[str, str]) -> Kind:
    r"""How answers to `gold` are compared: a letter is a choice, a number a number, `\text{east}` words, the rest math.

    `options` are the problem's choices (letter -> text), if it has any.
    """
    if gold_letter(gold, options) is not None:
        return "choice"
    if parse_number(gold) is not None:
        return "number"
    return "words" if _is_words(gold) else "math"


def compare(kind: Kind, text: str, gold: str, options: Mapping[str, str], *, free_form: bool) -> Verdict | None:
    """The verdict on a completion, or None for `math` and where nothing but a comparison as math can tell.

    Without an answer that is marked as one (`extract_answer`), a kind of `free_form` looks for `the answer is ...` and
    then for the last number (`number`) or at a short text as a whole (the others). Time is linear in the text.
    """
    answer = extract_answer(text)
    if kind == "math":
        return None if answer is None else quick_verdict(answer, gold)
    text = text.rpartition("</think>")[2][-_TAIL:].strip()
    if answer is None and free_form:
        answer = _stated(text) or (_last_number(text) if kind == "number" else _short(text))
    if answer is None:
        if free_form and kind == "words" and _within(gold, text):
            return Verdict("undecided", "no marked answer, but the gold answer's words are in the text")
        return Verdict("wrong", "no answer found")
    if kind == "choice":
        return _compare_choice(answer, gold, options)
    if kind == "number":
        return _compare_number(answer, gold)
    return _compare_exact(answer, gold) if kind == "exact" else _compare_words(answer, gold)


def _compare_choice(answer: str, gold: str, options: Mapping[str, str]) -> Verdict:
    letter = gold_letter(gold, options)
    if letter is None:
        return Verdict("undecided", "the gold answer is no choice", answer)
    status, reason = judge_choice(answer, letter, {letter: _text_of(gold), **options})
    return Verdict(status, reason, answer)  # type: ignore[arg-type]


def _text_of(gold: str) -> str:
    """The text of a gold answer like `(B) Paris`, or nothing."""
    return gold.partition(")")[2].strip() if ")" in gold[:8] else gold.partition(".")[2].strip()


def _compare_number(answer: str, gold: str) -> Verdict | None:
    mine, theirs = parse_number(answer), parse_number(gold)
    if mine is None or theirs is None:
        return None
    same = same_number(mine, theirs)
    if same is None:
        return Verdict("undecided", f"depends on the unit: {_unit(mine)}, {_unit(theirs)}", answer)
    return Verdict("right", "same number", answer) if same else Verdict("wrong", "other number", answer)


def _unit(number: Number) -> str:
    return "%" if number.percent else number.unit or "none"


def _compare_exact(answer: str, gold: str) -> Verdict:
    if answer == gold or _bare(answer) == _bare(gold):
        return Verdict("right", "same text", answer)
    return Verdict("wrong", "other text", answer)


def _compare_words(answer: str, gold: str) -> Verdict | None:
    mine, theirs = _bare(answer).rstrip(".").casefold(), _bare(gold).rstrip(".").casefold()
    if mine == theirs:
        return Verdict("right", "same words", answer)
    if not _WORDS.fullmatch(mine):
        return None
    if _within(gold, answer):
        return Verdict("undecided", "the gold answer among other words", answer)
    return Verdict("wrong", "other words", answer)


def _is_words(gold: str) -> bool:
    r"""Whether `gold` is words of a language: in `\text{}`, or certainly no product of variables."""
    bare = _bare(gold[: _LONGEST + 1]).rstrip(".")
    if len(bare) > _LONGEST or not _WORDS.fullmatch(bare):
        return False
    words = re.split(r"[ '’-]", bare.casefold())
    return "\\" in gold or any(word in _SHORT_WORDS or (len(word) > 3 and set(word) & set("aeiou")) for word in words)


def _within(gold: str, text: str) -> bool:
    """Whether the words of `gold` are in `text`, as whole words."""
    return re.search(rf"(?<!\w){re.escape(_bare(gold).casefold())}(?!\w)", text.casefold()) is not None


def _bare(text: str) -> str:
    r"""`text` without `$` and `\text{}` around it, single spaces between its words."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1]
    return " ".join(unwrapped(text).replace("\\ ", " ").split())


def _stated(text: str) -> str | None:
    """What the last `the answer is ...` of a text states, to the end of the sentence."""
    found = _STATED.findall(text)
    stated = _SENTENCE_END.split(found[-1], maxsplit=1)[0].strip(" *:\t") if found else ""
    return stated if 0 < len(stated) <= _LONGEST else None


def _last_number(text: str) -> str | None:
    found: list[str] = _ANY_NUMBER.findall(text)
    return found[-1] if found else None


def _short(text: str) -> str | None:
    return text if 0 < len(text) <= _LONGEST and "\n" not in text else None
