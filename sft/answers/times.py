"""Times of day and dates: `3:30 PM` is `15:30`, `March 5` is `5 March`."""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable
from datetime import datetime

from sft.answers.normal import bare

_LONGEST = 60
_CLOCK = re.compile(
    r"(?:at )?(?P<hour>\d{1,2})(?:[:.h](?P<minute>[0-5]\d))?(?::(?P<second>[0-5]\d))?\s?"
    r"(?P<half>[ap]\.? ?m\b\.?|noon|midday|midnight|o'clock|hours|hrs|h)?"
    r"(?: (?:in the )?(?P<part>morning|afternoon|evening))?",
    re.IGNORECASE,
)
_NAMES = re.compile(r"^(?=(?:noon|midday|midnight)$)", re.IGNORECASE)
_DAY = re.compile(rf"\b({'|'.join(calendar.day_abbr)})", re.IGNORECASE)
_RATIO = re.compile(r"(\d{1,12})\s?(?::| to )\s?(\d{1,12})", re.ASCII)
_NAMED = re.compile(rf"\b(?:{'|'.join(filter(None, calendar.month_abbr))})", re.IGNORECASE)
_NUMERIC = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{2,4}", re.ASCII)
_AROUND = re.compile(r"\b(?:the|of|on)\b", re.IGNORECASE)


def same_time(mine: str, theirs: str) -> bool | str | None:
    """Whether two times of day or two dates are one; None where either is none; a reason where nobody can know."""
    mine, theirs = (_NAMES.sub("12 ", bare(text)) for text in (mine, theirs))
    times, others = _clock(mine), _clock(theirs)
    if times and others:
        # 3:30 beside 3:30 p.m. leaves out what the other says; beside 15:30 it may be another time.
        same_hour = mine.lstrip("at 0")[:2].rstrip(":. ") == theirs.lstrip("at 0")[:2].rstrip(":. ")
        return bool(times & others) and (times == others or same_hour or "in the morning or not")
    fits = [_fits(one, other) for one in _date(mine) for other in _date(theirs)]
    if not fits:
        return None
    days = [set(map(str.casefold, _DAY.findall(text))) for text in (mine, theirs)]
    if all(days) and days[0] != days[1]:
        return False
    return fits[0] if len(set(fits)) == 1 and fits[0] is not None else "the dates can be read in two ways"


def same_ratio(mine: str, theirs: str) -> bool | None:
    """Whether `6:2` and `3 to 1` are the same ratio; None where either is none."""
    one, other = _RATIO.fullmatch(bare(mine)), _RATIO.fullmatch(bare(theirs))
    if not one or not other:
        return None
    return int(one[1]) * int(other[2]) == int(one[2]) * int(other[1]) and (int(one[1]) > 0) == (int(other[1]) > 0)


def _clock(text: str) -> set[tuple[int, ...]]:
    """The times of day (hour, minute, second) that `text` may be."""
    match = _CLOCK.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None or not ((match["minute"] and re.search("[:h]", text)) or match["half"] or match["part"]):
        return set()
    word = (match["half"] or match["part"] or "").casefold()[:4]
    half = "p" if word in ("afte", "even", "noon", "midd") else "a" if word in ("morn", "midn") else word[:1]
    hour, rest = int(match["hour"]), (int(match["minute"] or 0), int(match["second"] or 0))
    if hour > 24 or (half == "h" and not match["minute"]):
        return set()
    if half in ("a", "p"):
        return {(hour % 12 + 12 * (half == "p"), *rest)}
    return {(hour % 24, *rest)} if hour > 12 or hour == 0 else {(hour, *rest), ((hour + 12) % 24, *rest)}


def _date(text: str) -> set[tuple[int | None, ...]]:
    """The dates (year, month, day) that `text` may be; None for what it leaves out."""
    if len(text) > _LONGEST or not (_NAMED.search(text) or _NUMERIC.fullmatch(text)):
        return set()
    text = " ".join(_AROUND.sub(" ", text).replace(",", " ").split())
    found = {_read_date(text, day_first) for day_first in ((False,) if text[:4].isdigit() else (False, True))}
    return {date for date in found if date is not None}


def _fits(one: tuple[int | None, ...], other: tuple[int | None, ...]) -> bool | None:
    """Whether two dates (year, month, day) are one. A year may be left out; None without a day on one side only."""
    if any(a is not None and b is not None and a != b for a, b in zip(one, other, strict=True)):
        return False
    return True if one[1:] == other[1:] else None


def _read_date(text: str, day_first: bool) -> tuple[int | None, ...] | None:
    from dateutil import parser

    read: Callable[..., datetime] = parser.parse
    try:
        # What both defaults leave their mark on isn't said.
        one, other = (
            read(text, dayfirst=day_first, default=day) for day in (datetime(1904, 1, 1), datetime(1908, 2, 2))
        )
    except (ValueError, OverflowError, TypeError):
        return None
    return tuple(a if a == b else None for a, b in zip(one.timetuple()[:3], other.timetuple()[:3], strict=True))
