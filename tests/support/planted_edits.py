"""Edits that a person makes to a problem: such that it stays the same problem, and such that it becomes another."""

from __future__ import annotations

import random
import re

SYNONYMS = [
    ("students", "pupils"), ("kids", "children"), ("children", "kids"), ("buys", "purchases"), ("bought", "purchased"),
    ("buy", "purchase"), ("big", "large"), ("house", "home"), ("store", "shop"), ("car", "vehicle"), ("earns", "makes"),
    ("wants", "would like"), ("in total", "altogether"), ("total", "overall"),
    ("friends", "buddies"), ("gave", "handed"),
    ("Find", "Determine"), ("Compute", "Calculate"), ("What is", "Determine"), ("Evaluate", "Compute"),
    ("Let", "Suppose"),
    ("such that", "so that"), ("each", "every"), ("decides", "chooses"), ("spends", "uses"), ("has", "owns"),
    ("makes", "creates"), ("takes", "needs"), ("costs", "is priced at"), ("box", "crate"), ("money", "cash"),
]  # fmt: skip


CALENDAR_WORDS = """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August
    September October November December How What The If
"""
CALENDAR = set(CALENDAR_WORDS.split())


def typo(text: str, rng: random.Random) -> str | None:
    """One or two letters of words slip."""
    for _ in range(rng.randint(1, 2)):
        places = [match.start() for match in re.finditer(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}", text)]
        if not places:
            return None
        place = rng.choice(places) + rng.randint(1, 2)
        kind = rng.randrange(3)
        if kind == 0:
            text = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
        elif kind == 1:
            text = text[:place] + text[place + 1 :]
        else:
            text = text[:place] + text[place] + text[place:]
    return text


def synonym(text: str, rng: random.Random) -> str | None:
    """A word or two by others of the same meaning."""
    there = [(old, new) for old, new in SYNONYMS if re.search(rf"\b{old}\b", text)]
    for old, new in rng.sample(there, min(len(there), rng.randint(1, 2))):
        text = re.sub(rf"\b{old}\b", new, text, count=1)
    return text if there else None


def filler(text: str, rng: random.Random) -> str | None:
    """A word more, or `the` left out."""
    if rng.random() < 0.3 and " the " in text:
        return text.replace(" the ", " ", 1)
    return rng.choice(["Please answer: {}", "Question: {}", "{} Explain.", "{} Show your work."]).format(text)


def renamed(text: str, rng: random.Random) -> str | None:
    """Somebody with another name throughout."""
    names = sorted({name for name in re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", text)} - CALENDAR)
    return re.sub(rf"\b{rng.choice(names)}\b", rng.choice(["Zoe", "Ravi", "Olga"]), text) if names else None


def other_number(text: str, rng: random.Random) -> str | None:
    """A number is another."""
    numbers = [match.span() for match in re.finditer(r"(?<![\d.])\d+(?![\d.])", text)]
    if not numbers:
        return None
    start, end = rng.choice(numbers)
    return f"{text[:start]}{int(text[start:end]) + rng.randint(1, 9)}{text[end:]}"


def other_word(text: str, rng: random.Random) -> str | None:
    """A word on which the answer hangs is another."""
    pairs = [
        ("more", "fewer"), ("less", "more"), ("twice", "half"), ("half", "a third of"), ("hours", "minutes"),
        ("days", "weeks"),
        ("first", "second"), ("largest", "smallest"), ("smallest", "largest"), ("positive", "negative"),
        ("area", "perimeter"),
        ("sum", "product"), ("three", "four"), ("two", "five"), ("even", "odd"), ("minutes", "hours"),
        ("sold", "bought"),
        (r"\\sin", r"\\cos"), (r"\\cos", r"\\tan"), (r"\+", "-"), ("x", "y"), ("=", r"\\le"),
    ]  # fmt: skip
    there = [(old, new) for old, new in pairs if re.search(rf"(?<![a-z]){old}(?![a-z])", text)]
    if not there:
        return None
    old, new = rng.choice(there)
    return re.sub(rf"(?<![a-z]){old}(?![a-z])", new, text, count=1)


def other_role(text: str, rng: random.Random) -> str | None:
    """The question is about somebody else of the story."""
    body, found, question = text.rpartition(". ")
    named = re.findall(r"\b[A-Z][a-z]{2,}\b", question)[1:]
    others = sorted(set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", body)) - set(named))
    if not found or not named or not others or named[0] not in body:
        return None
    return body + found + question.replace(named[0], rng.choice(others))


SAME = (typo, synonym, filler, renamed)
ANOTHER = (other_number, other_word, other_role)
