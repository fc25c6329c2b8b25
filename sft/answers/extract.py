"""Where a completion gives its answer."""

from __future__ import annotations

import re
from fractions import Fraction

from sft.answers.numbers import parse_number
from sft.answers.units import SIGNS, in_unit

# Bounds on what is looked at, so that extraction stays linear on any text.
_LONGEST_ANSWER = 10_000
_MOST_BOXES = 50
_TAIL, _LONGEST_STATED = 4000, 300
# Boxes as near to each other as this give one answer in several parts.
_NEAR = 80
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_OPEN_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]{0,9}(\{(?!\s*\}))?([^\n]*)")
_AFTER_BOX = re.compile(
    r"(?:\s|\\[,;: ]|~){0,3}(?:\\%|\^\s?\{?\s?\\circ\s?\}?"
    r"|\\(?:text|mathrm|mbox)\s?\{[^{}]{1,30}\}(?:\^\s?(?:\{-?[123]\}|[123]))?)"
)
_A_COLON = re.compile(r"^[ \t]*A:[ \t]*([^\n]+)", re.MULTILINE)
_OPTION_B = re.compile(r"(?:^|\s)\(?B[:.)]")
_NUMBER = r"-?[$€£]?(?:(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|\d+(?:/\d+)?)(?:\.\d+)?(?:[eE][-+]?\d+)?\\?%?"
_STATED = re.compile(
    r"\b(?:(?:answer|option|choice)s?\b(?: is\b| are\b| to [^.:\n]{1,80} is\b|[ \t*]{0,4}[:=])"
    r"|(?:roots|solutions) are\b)"
    r"(?! (?:in)?(?:correct|right|wrong|reasonable|valid|consistent|good)\b)[ \t]{0,4}:?[ \t]{0,4}(?=[^\n])"
    r"|\b(?:option|choice|answer) \(?([A-J])\)?(?: is (?:the )?(?:correct|right|best|answer)\b|[.*]{0,3}$)"
    rf"|(?<![\w.,])({_NUMBER}) is the (?:final |correct )?answer\b",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?](?=[*\s]+[A-Z]|[*\s]*$)")
_TAKEN_BACK = re.compile(r"\b(?:wait|oops|actually|mistake|no, |(?:but|so) (?:it|that) is)", re.IGNORECASE)
_FILLER = re.compile(
    r"^(?:(?:therefore|thus|then|actually|simply|just|clearly|indeed|equal to|given by|about|approximately|now),?\s)"
    r"{1,3}",
    re.IGNORECASE,
)
_DENIED = re.compile(r"(?:not|n't|\bnever) (?:be |equal (?:to )?)?$")
_SUPPOSED = re.compile(r"\b(?:if|suppose|assum\w{1,4})(?: that)?(?: the)?(?: final| correct)? $", re.IGNORECASE)
_BRACKETED = re.compile(r"\s\((?:out of|not|or|since|because|i\.e|that is|of which)\b[^()\n]{0,200}\)")
_ASIDE = re.compile(
    r"\s\((?=not |since |because |i\.e|or )|, (?:or about|i\.e\.|that is)\s"
    r"|,?\s(?:because|since|as|which|where|so|rather than|and not|not) "
)
# A formula between dollars by Pandoc's rule, so that `$5 and $6` is money; two numbers with words; a number.
_PIECE = re.compile(
    r"\$\$?(?=\S)(?P<dollars>[^$\n]{1,300})(?<=\S)\$\$?(?!\d)|\\\((?P<round>[^\n]{1,300}?)\\\)|\\\[(?P<square>[^\[\]]{1,300})\\\]"
    rf"|(?P<pair>\d[\d.,]{{0,20}} ?[A-Za-z]{{1,12}},? (?:and )?(?P<second>{_NUMBER}) ?[A-Za-z]{{1,12}})"
    rf"|{_NUMBER}",
    re.ASCII,
)
_JOINT = re.compile(r",?\s(?:or|and)\s")
_UNIT_AFTER = re.compile(r" ?[A-Za-z/^\d]{1,12}(?: [A-Za-z/^\d]{1,12}){0,2}", re.ASCII)


def visible(text: str) -> str:
    """A completion without its thinking; nothing where it ends while thinking."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def extract_answer(text: str) -> str | None:
    r"""The explicit final answer of a completion, or None.

    Outside of the thinking: the last non-empty \boxed{}; else what follows a '####' that ends the text or precedes a
    number alone, or a line 'A: ...' that opens no list of options.
    """
    text = visible(text)
    boxed = last_boxed(text) or _open_box(text)
    return boxed if boxed is not None else _marked_line(text)


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} that has balanced braces and isn't empty, or None."""
    return next((content for _, _, content in _boxes(text)), None)


def near_boxes(text: str) -> list[str]:
    """The contents of the last boxes that stand in one sentence or line of formulas, in their order."""
    found: list[str] = []
    following = None
    for start, end, content in _boxes(visible(text)):
        if following is not None and not (0 <= following - end <= _NEAR and "\n\n" not in text[end:following]):
            break
        found.append(content)
        following = start
    return found[::-1]


def stated(text: str) -> str | None:
    """What the last `the answer is ...` of a text states, to the end of the sentence."""
    text = _BRACKETED.sub("", text[-_TAIL:])
    found = [m for m in _STATED.finditer(text) if not _SUPPOSED.search(text, max(0, m.start() - 40), m.start())]
    if not found:
        return None
    last = found[-1]
    answer = last[1] or last[2] or text[last.end() :].partition("\n")[0]
    end = _SENTENCE_END.search(answer)
    if end and (end[0] == "?" or _TAKEN_BACK.search(answer, end.end())):
        return None
    answer = answer[: end.start()] if end else answer
    answer = _FILLER.sub("", _ASIDE.split(answer, maxsplit=1)[0].strip(" *:\t,"), count=1)
    return answer if 0 < len(answer) <= _LONGEST_STATED else None


def last_formula(text: str) -> str | None:
    """The formula with which a text ends, or None."""
    last = _last_piece(text)
    return last[0] if last and last[1] and not last[2] else None


def last_number(text: str, unit: str) -> str | None:
    """The last number in a text, or the formula after it; where `unit` can be compared with what follows, with that."""
    last = _last_piece(text)
    if last is None:
        return None
    piece, formula, after = last
    if formula:
        # `x = 3, x = 4` is two numbers, `x = 3 + 4 = 7` one.
        named = [name.strip() for name in re.findall("([^,=]+)=", piece)]
        return piece if len(named) > len(set(named)) else piece.rpartition("=")[2].strip()
    words = after.split(" ")
    for count in range(len(words), 0, -1) if unit else ():
        quantity = piece + " ".join(words[:count])
        number = parse_number(quantity)
        if number and number.unit and in_unit(Fraction(1), number.unit, unit) is not None:
            return quantity
    return piece


def _last_piece(text: str) -> tuple[str, bool, str] | None:
    """(the last number or formula in the end of a text, whether it is a formula, what follows it)."""
    last, text = None, _BRACKETED.sub("", text[-_TAIL:])
    formulas: list[str] = []
    for match in _PIECE.finditer(text):
        formula = match["dollars"] or match["round"] or match["square"]
        if _DENIED.search(text, max(0, match.start() - 20), match.start()):
            continue
        # The letter of `the value of $x$` is no answer.
        if last is None or formula is None or len(formula.strip()) > 1 or formula.strip().isdigit():
            # `$x = 3$ or $x = 4$` is one answer.
            go_on = last is not None and formulas and _JOINT.fullmatch(text, last.end(), match.start())
            formulas = [*(formulas if go_on else []), formula.strip()] if formula else []
            last = match
    if last is None:
        return None
    if formulas:
        return ", ".join(formulas), True, text[last.end() :].strip(" .*\n")
    if last["pair"] and parse_number(last["pair"]):
        return last["pair"], False, ""
    end = last.end("second") if last["pair"] else last.end()
    after = _UNIT_AFTER.match(text, end)
    return last["second"] or last[0], False, after[0] if after else ""


def gold_answer(value: object) -> str:
    r"""The answer in a gold column: after '####', the last \boxed{}, after 'A:', or the value as it stands."""
    text = str(value).strip()
    return extract_answer(text) or text


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the last boxes that are balanced and hold something, the last first."""
    found = []
    for match in list(_BOX.finditer(text))[: -_MOST_BOXES - 1 : -1]:
        end = _closing(text, match.end())
        content = text[match.end() : end].strip() if end is not None else ""
        if end is not None and content:
            found.append((match.start(), end + 1, _with_unit(text, end + 1, content)))
    return found


def _closing(text: str, start: int) -> int | None:
    """The place of the brace that closes the one before `start`; escaped braces don't count."""
    depth, position = 1, start
    end = min(len(text), start + _LONGEST_ANSWER)
    while position < end:
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def _with_unit(text: str, end: int, content: str) -> str:
    r"""What a box holds, with the unit that follows a number in it: `\boxed{3}\text{ cm}`, `\boxed{50}\%`."""
    after = _AFTER_BOX.match(text, end)
    number = parse_number(content) if after else None
    whole = f"{content} {after[0].strip()}" if after else content
    return whole if number and not number.unit and not number.percent and parse_number(whole) else content


def _open_box(text: str) -> str | None:
    r"""`\boxed 7`, and `\boxed{7` with nothing after it."""
    found = list(_OPEN_BOX.finditer(text))
    if not found:
        return None
    last = found[-1]
    content = last[2][:_LONGEST_ANSWER].strip()
    if last[1]:
        return (content.strip("$. }") and content.rstrip("$. ")) or None if not text[last.end() :].strip() else None
    alone = re.match(r"[^\s${}\\]+|\\[a-z]+(?:\{[^{}]*\}){0,2}", content)
    return alone[0].rstrip(".,") if alone else None


def _marked_line(text: str) -> str | None:
    """What follows the last '####', or the last 'A:' at the start of a line, where that is an answer."""
    place = text.rfind("####")
    if place >= 0:
        line, _, rest = text[place + 4 :].partition("\n")
        # `#### 2` over the second step is a heading, too.
        count = text.count("####")
        if _final(line, rest) and not (line.strip() == str(count) != "1" and _last_piece(rest)):
            return line.strip()[:_LONGEST_ANSWER]
    found = list(_A_COLON.finditer(text))
    if not found or not found[-1][1].strip() or _OPTION_B.search(text[found[-1].end(1) - len(found[-1][1]) :]):
        return None
    return found[-1][1].strip()[:_LONGEST_ANSWER] if _final(found[-1][1], text[found[-1].end() :]) else None


def _final(line: str, rest: str) -> bool:
    """Whether a marked line ends the text, or is a number that no later sentence replaces; else it's a heading."""
    if not line.strip() or not rest.strip():
        return bool(line.strip())
    number = parse_number(line.strip())
    return number is not None and number.unit in ("", *SIGNS.values()) and stated(rest) is None
