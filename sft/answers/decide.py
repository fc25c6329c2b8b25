"""The verdict on what a completion gives as its answer, kind by kind."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from sft.answers.choices import NO_CHOICE, gold_letter, judge_choice, letters_of
from sft.answers.compare import Found, Math, compare
from sft.answers.extract import last_formula, last_number
from sft.answers.normal import LEADING, normal, unwrapped
from sft.answers.numbers import parse_number
from sft.answers.parts import parts_of
from sft.answers.words import NOTHING, is_words, within

Kind = Literal["math", "choice", "exact", "number", "words"]
_LONGEST = 300


@dataclass(frozen=True)
class Question:
    """What is to be decided; it travels between processes.

    Attributes:
        answer: what the completion gives as its answer, marked or stated; None where neither.
        gold: the gold answer.
        kind: how they are compared.
        boxes: the answers in the last boxes that stand together.
        text: the end of a completion in which an answer may be looked for; None where it may not.
        strict: whether the settings name the kind: what isn't a number isn't compared as one then.
        options: the choices, letter -> text.
    """

    answer: str | None
    gold: str
    kind: Kind
    boxes: tuple[str, ...] = ()
    text: str | None = None
    strict: bool = False
    options: dict[str, str] = field(default_factory=dict)


def kind_of(gold: str, options: dict[str, str]) -> Kind:
    r"""How answers to `gold` are compared: letters as choices, a number as one, `\text{east}` as words, else as math.

    `options` are the problem's choices (letter -> text), if it has any.
    """
    if gold_letter(gold, options) is not None or (letters_of(gold) and re.search(r"[,;&]|and", gold)):
        return "choice"
    number = parse_number(gold)
    if number is not None and not number.listed:
        return "number"
    return "words" if is_words(gold) else "math"


def decide(question: Question, math: Math) -> tuple[str, str, str | None]:
    """(right | wrong | undecided, reason, answer). Time is linear in the question, but for `math`."""
    answer, gold, kind = question.answer, question.gold, question.kind
    if answer is None and question.text is not None:
        answer = _found(question.text, gold, kind)
    if answer is None:
        if question.text is not None and kind == "words" and within(gold, question.text):
            return "undecided", "no marked answer, but the gold answer's words are in the text", None
        return "wrong", "no answer found", None
    found = _decide(answer, question, math)
    if found[1] == NO_CHOICE and question.answer is None and within(gold, answer):
        return "undecided", "no marked answer, but the gold answer's letter is in the text", answer
    # Several boxes are one answer where several things are asked for; else the last one counts.
    if found[0] != "right" and len(question.boxes) > 1 and parts_of(normal(gold)) is not None:
        joined = ", ".join(question.boxes)
        found, answer = max(
            (_decide(joined, question, math), joined), (found, answer), key=lambda f: f[0][0] == "right"
        )
    return *found, answer


def _found(text: str, gold: str, kind: Kind) -> str | None:
    """The answer in a text that marks and states none: its last number or formula, or its last line if it is short."""
    number = parse_number(gold) if kind == "number" else None
    if number is not None:
        return last_number(text, number.unit)
    formula = last_formula(text) if kind != "choice" else None
    line = text.rpartition("\n")[2] if kind in ("choice", "math") else text
    if kind == "math" and not NOTHING.fullmatch(normal(gold)):
        line = LEADING.sub("", line[-_LONGEST:])
    return formula or (line if 0 < len(line) <= _LONGEST and "\n" not in line else None)


def _decide(answer: str, question: Question, math: Math) -> Found:
    gold = question.gold
    if question.kind == "choice":
        return _choice(answer, gold, question.options, math)
    if question.kind == "exact":
        return ("right", "same text") if answer == gold or _plain(answer) == _plain(gold) else ("wrong", "other text")
    if question.kind == "number" and question.strict and (parse_number(answer) is None or parse_number(gold) is None):
        return "undecided", "the answer or the gold answer is no plain number"
    letters = letters_of(gold)
    return ("right", "same choices") if letters and letters == letters_of(answer) else compare(answer, gold, math)


def _choice(answer: str, gold: str, options: dict[str, str], math: Math) -> Found:
    letter, several = gold_letter(gold, options), letters_of(gold)
    if several and letter is None:
        mine = letters_of(answer) or frozenset(filter(None, [gold_letter(answer, {})]))
        if mine:
            return ("right", "same choices") if mine == several else ("wrong", "other choices")
        return ("undecided", "one choice or the other") if " or " in answer else ("wrong", NO_CHOICE)
    if letter is None:
        return "undecided", "the gold answer is no choice"
    text = gold.partition(")")[2].strip() if ")" in gold[:8] else gold.partition(".")[2].strip()
    options = {letter: text, **options}
    status, reason = judge_choice(answer, letter, options)
    if reason == NO_CHOICE and options[letter] and compare(answer, options[letter], math)[0] == "right":
        return "right", "same as the choice"
    return status, reason  # type: ignore[return-value]


def _plain(text: str) -> str:
    r"""`text` without `$` and `\text{}` around it, single spaces between its words."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1]
    return " ".join(unwrapped(text).replace("\\ ", " ").split())
