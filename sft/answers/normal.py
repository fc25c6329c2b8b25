"""One way of writing for what people write in many: Unicode's digits, fractions and signs, and LaTeX's dress."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_SIGNS = dict(zip("٬٫、−–—‐‑‒⁄∕÷’‘′“”″∶꞉º", ",.,------///'''\"\"\"::°", strict=True))
_SIGNS |= {"…": "...", "ℝ": r"\mathbb{R}", "°": r"^\circ ", "∛": r"\sqrt[3]"}
_COMMANDS = "times cdot cdot cdot cdot pm mp pi theta infty sqrt emptyset le ge le ge ne approx in cup cap langle"
_SIGNS |= {
    sign: f"\\{name} " for sign, name in zip("×⋅·∙•±∓πθ∞√∅≤≥⩽⩾≠≈∈∪∩⟨⟩", f"{_COMMANDS} rangle".split(), strict=True)
}
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))
_RAISED, _LOWERED = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ]+"), re.compile("[₀-₉₊₋]+")
_FRACTION = re.compile("[¼-¾⅐-⅞]")
_ROMAN = re.compile("[Ⅰ-Ⅿⅰ-ⅿ]")
_OVERLINED = re.compile("((?:[0-9][\u0305\u0307])+)")
STYLE = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|mbox|emph|underline|operatorname"
    r"|ensuremath|bf|rm|it)(?![A-Za-z])\*?"
)
WRAPPED = re.compile(rf"{STYLE}\s?\{{([^{{}}]*)\}}")
_TH = r"\s?(?:st|nd|rd|th)\s?"
# What LaTeX has several words for; the order counts.
_DRESS = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\s?\.?|\\(?:displaystyle|limits|[lL]arge)(?![A-Za-z])", ""),
        (r"\\(?:(?:text)?color|tag)\s?\{[^{}]{0,30}\}|\\(?:bf|rm|it)(?![A-Za-z]|\s?\{)|\\text\{[\s.]*\}", ""),
        (r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}"),
        (r"(?<=\d)\\[,!](?=\d)|(?<=\d,)\\!(?=\d)", ""),
        (r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\\hspace\{[^{}]{0,20}\}", " "),
        (r"\{,\}", ","),
        (r"\{:\}|\\colon(?![A-Za-z])", ":"),
        (r"\+/-", r"\\pm "),
        (r"(?<=\d)_(?=\d{3}(?!\d))", ""),
        (r"\\varnothing(?![A-Za-z])|\\emptyset(?![A-Za-z])|\\\{\s?\\\}", r"\\emptyset "),
        (r"\\l(?:brace|angle)(?![A-Za-z])", lambda m: r"\{" if "brace" in m[0] else "("),
        (r"\\r(?:brace|angle)(?![A-Za-z])", lambda m: r"\}" if "brace" in m[0] else ")"),
        (r"\\(le|ge)(?:q|qslant)(?![A-Za-z])|(<|>)=", lambda m: rf"\{m[1] or {'<': 'le', '>': 'ge'}[m[2]]} "),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
        (r"(?i)\\text\{\s?((?:[a-z]{4,8} )?infinity)\s?\}", r"\1"),
        (
            r"(?i)(?:(minus |negative )|plus |positive )?\\?\binfin(?:ity)?\b",
            lambda m: rf"{'-' if m[1] else ''}\infty ",
        ),
        (r"\\dot\s?\{?(\d)\}?(?:(\d{0,20})\\dot\s?\{?(\d)\}?)?", r"\\overline{\1\2\3}"),
        (r"(?:\\|(?<![A-Za-z\\]))sqrt(\[\d\])?\s?(?:\(([^()]{1,200})\)|(\d+(?:\.\d+)?))", r"\\sqrt\1{\2\3}"),
        (r"(?:\{\})?[_^](\{)?(\d{1,9})(?(1)\})\s?C_(\{)?(\d{1,9})(?(3)\})", r"\\binom{\2}{\4}"),
        (rf"(?<=\d)(?:\^?\s?\\text\{{{_TH}\}}|\^\{{\\text\{{{_TH}\}}\}}|\^\{{{_TH}\}}|{_TH}\b)", ""),
        (r"\^?\s?(\{)?\s?\\(?:circ|degree)(?![A-Za-z])\s?(?(1)\})", r"^\\circ "),
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"\\%", "%"),
        (r"\\(textdollar|pounds|euro)(?![A-Za-z])", lambda m: {"t": "$", "p": "£", "e": "€"}[m[1][0]]),
        (r"(?<=\\mathbb\{R\})\s?(?:-|\\backslash)\s?(?=\\\{)", r"\\setminus "),
        (r"\\mathbb\{R\}\s?\^\s?(?:\+|\{\+\})", r"(0,\\infty)"),
    )
]
_PREFIX = re.compile(r"^(?:\\approx|\\sim|\\therefore|\\Rightarrow|\\implies|=)\s?")
_SPOKEN = re.compile(
    r"(?:(?:so|thus|hence|therefore|and),? )?(?:the |my )?(?:final |correct )?"
    r"(?:answer|option|choice|result|solution|total|sum)s?(?: (?:is|are)\b:?|(?: is| are)?\s?[:=])[\s*]{0,9}",
    re.IGNORECASE,
)
# What leads up to an answer in a sentence.
LEADING = re.compile(r"^.*(?:\b(?:is|are|be|get|gives?|have|has|equals?)\b|(?<![\d\s]):\s)", re.DOTALL)


@lru_cache(maxsize=1024)
def normal(text: str) -> str:
    r"""`text` in ASCII where that can say it, without delimiters, `\left`, spacing, `The answer is`, a full stop.

    Time is linear in the text.
    """
    text = _spelled(text) if not text.isascii() else text
    text = _undollared(text.strip().strip("*`").strip())
    for pattern, by in _DRESS:
        text = pattern.sub(by, text)
    text = _PREFIX.sub("", " ".join(text.split()), count=1)
    spoken = _SPOKEN.match(unwrapped(text).lstrip())
    if spoken and (rest := unwrapped(text).lstrip()[spoken.end() :]).strip(" .:"):
        text = rest
    return text.strip().rstrip(".,;").strip() if not text.endswith("...") else text.strip()


def unwrapped(text: str) -> str:
    r"""`text` without `\text{...}` and its like around parts of it."""
    for _ in range(3):
        text = WRAPPED.sub(r"\1", text)
    return text


def bare(text: str) -> str:
    r"""The words of `text`: normal, without `\text{}`, single spaces between them."""
    return " ".join(unwrapped(normal(text)).split()).rstrip(".").strip()


def _spelled(text: str) -> str:
    text = _OVERLINED.sub(lambda m: rf"\overline{{{re.sub('[^0-9]', '', m[1])}}}", text)
    text = _RAISED.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0]).replace('−', '-')}}}", text)
    text = _LOWERED.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m[0]).replace('−', '-')}}}", text)
    text = _FRACTION.sub(_fraction, text)
    text = _ROMAN.sub(lambda m: str(int(unicodedata.numeric(m[0]))), text)
    text = _SIGN.sub(lambda m: _SIGNS[m[0]], text)
    text = unicodedata.normalize("NFKC", _SIGN.sub(lambda m: _SIGNS[m[0]], text))
    # What has no width (Cf) is nothing; digits of other scripts are digits.
    return "".join(
        c if c.isascii() else str(unicodedata.decimal(c, c)) for c in text if unicodedata.category(c) != "Cf"
    )


def _fraction(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{over}}}{{{under}}}"


def _undollared(text: str) -> str:
    r"""`$...$` is a delimiter; `\$`, and an odd `$`, is money."""
    text = text.replace("\\$", "\0")
    return (text.replace("$", "") if text.count("$") % 2 == 0 else text).replace("\0", "$")
