"""Multiple choice: which of the choices A to J an answer is, by its letter or by its text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sft.answers.normal import STYLE, bare
from sft.answers.numbers import parse_number, same_number

LETTERS = "ABCDEFGHIJ"
_LONGEST = 2000
NO_CHOICE = "no choice"
# "(B)", "B.", "**B**", "\textbf{(B)}\ 12", "Option B: because", "B".
# Repeats are bounded: two unbounded ones beside each other take quadratic time on hostile text.
_SAID = r"(?i:(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)(?:\s+is)?|choose|pick|therefore|thus|hence|so)\b)"
_LEADING = re.compile(
    rf"\W{{0,20}}(?:{STYLE}\s?\{{?)?\W{{0,20}}(?:{_SAID}\W{{0,20}}(?:{STYLE}\s?\{{?)?\W{{0,20}})?"
    r"([A-Ja-j])\s{0,3}(?:[).:}\]*]|,(?!\s?[A-J]\b)|$"
    r"|(?<=\s)(?:is (?:the )?(?:correct|right|best|answer)|only|because|since)\b)",
)
_MARKED = re.compile(r"\(\s{0,3}([A-J])\s{0,3}\)")
_ALONE = re.compile(rf"[\s$({{\[*]{{0,20}}(?:{STYLE}\s?\{{)?[\s({{\[*]{{0,20}}([A-J])[\s)}}\].:*$]*")
_GOLD_MARK = re.compile(rf"[\s$*]{{0,20}}(?:{STYLE}\s?\{{)?\s?(?:\(\s*([A-J])\s*\)|([A-J])[).:])(?:\}}|\s)")
# Where a problem lists its choices; the letters must follow each other.
_OPTION = re.compile(rf"(?:{STYLE}\s?\{{\s?|(?<![A-Za-z\\]))\(?([A-J])[).:](?:\s*\}})?(?=[\s\\~$])")
# "A, C", "(A) and (C)", "AC".
_SEVERAL = re.compile(
    r"(?:\\\{|[Bb]oth )?\(?[A-J]\)?(?:(?:\s?(?:[,;/]|\\?&)\s?|\s?,?\s?and\s|\s)?\(?[A-J]\)?){1,9}"
    r"(?:\\\}| are (?:correct|right|true)| only)?"
)


def gold_letter(gold: str, options: Mapping[str, str]) -> str | None:
    """The choice that a gold answer is: a letter, a marked letter and a text (`(B) Paris`), or one choice's text."""
    if letters_of(gold) or len(set(_MARKED.findall(gold[:_LONGEST]))) > 1:
        return None
    alone = _ALONE.fullmatch(gold) if len(gold) <= _LONGEST else None
    if alone:
        return alone[1]
    marked = _GOLD_MARK.match(gold)
    return (marked[1] or marked[2]) if marked else by_text(gold, options)


def letters_of(text: str) -> frozenset[str]:
    """The letters that a text of nothing else names, two or more: `A, C`; none where there are other things."""
    text = bare(text[:_LONGEST])
    several = _SEVERAL.fullmatch(text)
    letters = re.findall(r"[A-J](?![a-z])", text) if several else []
    return frozenset(letters) if 1 < len(letters) == len(set(letters)) else frozenset()


def listed_options(choices: Any) -> dict[str, str]:
    """Letter -> text of a column with choices: a list of texts, or a mapping `{text: [...]}` with such a list."""
    if isinstance(choices, Mapping):
        choices = choices.get("text") or choices.get("choices") or list(choices.values())
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        return {}
    return {letter: _without_mark(str(choice), letter) for letter, choice in zip(LETTERS, choices, strict=False)}


def options_in(problem: str) -> dict[str, str]:
    """Letter -> text of the choices that a problem lists at its end (`A) ...`, `(A) ...`, `A. ...`); empty without."""
    marks = list(_OPTION.finditer(problem))
    starts = [number for number, mark in enumerate(marks) if mark[1] == "A"]
    if not starts:
        return {}
    options: dict[str, str] = {}
    run = marks[starts[-1] :]
    for letter, mark, following in zip(LETTERS, run, [*run[1:], None], strict=False):
        if mark[1] != letter:
            break
        text = problem[mark.end() : following.start() if following else len(problem)].strip()
        options[letter] = text if following else text.partition("\n\n")[0]
    return options if len(options) > 1 else {}


def judge_choice(answer: str, gold: str, options: Mapping[str, str]) -> tuple[str, str]:
    """(right | wrong | undecided, reason) of an answer, where `gold` is one of the letters and `options` may be empty.

    An answer may say the letter, the text of the choice, or both; undecided where these are of different choices.
    """
    answer = answer[:_LONGEST]
    if letters_of(answer):
        return "wrong", "several choices"
    leading = _LEADING.match(answer)
    letters = {leading[1].upper()} if leading else set()
    letters |= set(_MARKED.findall(answer))
    text = answer[leading.end() :] if leading and answer[leading.end() :].strip(" }).$*") else answer
    meant = by_text(text, options)
    said = letters | ({meant} if meant else set())
    if len(said) > 1:
        return "undecided", f"several choices: {', '.join(sorted(said))}"
    if said:
        return ("right", "same choice") if said == {gold} else ("wrong", "other choice")
    if plain(options.get(gold, "")) and plain(options[gold]) in plain(answer):
        return "undecided", "the choice's text among others"
    return "wrong", NO_CHOICE


def by_text(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the only choice with this text (or this number), or None."""
    wanted = plain(text)
    found = [letter for letter, option in options.items() if wanted and plain(option) == wanted]
    if not found and (number := parse_number(wanted)) is not None:
        values = {letter: parse_number(plain(option)) for letter, option in options.items()}
        found = [letter for letter, value in values.items() if value is not None and same_number(number, value)]
    return found[0] if len(found) == 1 else None


def plain(text: str) -> str:
    """`text` as `bare` has it, in lower case, without emphasis."""
    return bare(text[:_LONGEST].replace("*", " ")).casefold()


def _without_mark(choice: str, letter: str) -> str:
    mark = _OPTION.match(choice)
    return choice[mark.end() :].strip() if mark and mark[1] == letter else choice
