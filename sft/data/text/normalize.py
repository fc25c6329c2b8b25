r"""One way of writing for texts that say the same: LaTeX, Unicode, numbers and case brought to one form.

`tokens` are all that carries meaning (words, numbers, operators); `words` are those without operators and figures'
code, for looking for a text in others. Nothing here knows what a formula means: `2x` and `x+x` stay different.
What has a word and a sign is its word: `$5` is `5 dollar`, 5% is `5 percent`; units are singular (`spelling`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial
from html import unescape

from sft.data.text.spelling import plain_words

_ENTITY = re.compile(r"&(?:#\d{2,6}|#x[\da-fA-F]{2,5}|[a-zA-Z]{2,8}\d?);")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_FIGURE = re.compile(r"\[asy\](?:(?!\[asy\]).)*?\[/asy\]", re.DOTALL | re.IGNORECASE)

# Thousands: 1,000 and LaTeX's 1{,}000, 1,\!000, 1\,000. A space only in whole groups of three.
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!|,\\!|,)(?=\d{3}(?:\d{3})?(?!\d))")
_SPACED_THOUSANDS = re.compile(r"\b(?<![.,])\d{1,3}(?: \d{3})+\b")
_DECIMAL = re.compile(r"(?<![\d.])(\d+)\.(\d+)(?!\.?\d)")
_BARE_DECIMAL = re.compile(r"(?<![\w.])\.(?=\d)")

# A formula as pandoc knows it (no space inside the dollars, no digit after): "$5 and $6" are sums of money.
_INLINE = re.compile(r"\$\$|\$(?![\s$,;:?!)]|\.(?!\d))([^$]{0,998})(?<![\s\\])\$(?!\d)")
_SPACED_DOLLAR = re.compile(r"\$\s(?=\d[\d,.]*[.,;:?!)]*(?:\s(?:[a-zA-Z]{2}|[aA]\s)|$))")
_ESCAPED_DOLLAR = "＄"  # never left in a text by NFKC
_MONEY = re.compile(
    r"([$＄€£¥₹¢])(?:(?:(?<!\$)\s)?(\d+(?:\.\d+)?|\.\d+)(\s(?:[hH]undred|[tT]housand|[mMbB]illion)(?![a-zA-Z]))?)?"
)
_CENTS = re.compile(r"(?<![\d.])(?:0\.|\.)(\d\d) (?:dollar|euro)s?\b")
_CURRENCIES = {"$": "dollar", "＄": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "¢": "cent"}

_SPACING = re.compile(
    r"\\(?:quad|qquad|thinspace|enspace|displaystyle|textstyle|limits|left|right|middle"
    r"|[bB]igg?[lrm]?|hfill|noindent|par|nonumber)(?![a-zA-Z])"
)
_SPACE_SIGNS = re.compile(r"\\[,!;:> ()\[\]]|~")  # spaces, and where formulas begin and end
_SKIP = re.compile(r"\\[hv]space\*?\{[^{}]*\}|\\(?:begin|end)\{[^{}]*\}(?:\{[lcr| ]*\}|\[[a-z]\])?")
_LINE_BREAK = re.compile(r"\\\\(?:\[[^\[\]]{0,20}\])?|&")
# Fonts and boxes whose argument is what is said.
_FONT = re.compile(
    r"\\(?:text(?:rm|bf|it|sf|tt|normal|up|sc)?|math(?:rm|bf|it|sf|tt|bb|cal|frak|scr|normal)|bold(?:symbol)?|bm|rm|bf"
    r"|mbox|hbox|emph|operatorname\*?|ensuremath)(?![a-zA-Z])\s*(?:\{([^{}]*)\})?"
)
_PART = r"\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\w))"
_FRACTION = re.compile(rf"\\[dtc]?frac(?![a-zA-Z]){_PART}{_PART}")
_OVER = re.compile(r"\{([^{}\\]*)\\over(?![a-zA-Z])([^{}\\]*)\}")
_RAISED = re.compile(r"\^\s*(?:\{\s*\\(?:circ|prime)\s*\}|\\(?:circ|prime)(?![a-zA-Z]))")
_ESCAPED = re.compile(r"\\([%#_])")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_SINGLE_BRACED = re.compile(r"\{\s*([^\W_]|\d[\d.]*|[^\W\d_]{2,})\s*\}")
_FORMULA_PARENTHESES = re.compile(r"\(((?:(?![^\W\d_]{3})[^()])*)\)")
_LETTER = r"[^\W\d_]"
# Writing systems without spaces between words: each character stands alone.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = rf"\d+(?:\.\d+)?|[{_UNSPACED}]|(?:(?![{_UNSPACED}]){_LETTER})+"
_SIGNS = "=<>+*/^×·÷±∓≤≥≠≈≡∈∉⊂⊆∪∩∑∏∫√∞∠△⊥∥→⇒⟨⟩|‼−′"
_TOKEN = re.compile(rf"{_WORD}|[{re.escape(_SIGNS)}]|[.?;](?=[\s$\"'”)*]|$)|!(?=\s|$)")
_WORDS = re.compile(_WORD)

# Sign or name, LaTeX's commands for it. Greek letters become names, which they are in LaTeX already.
_MEANINGS = """
    × times; · cdot bullet; ÷ div; ± pm; ∓ mp; ≤ le leq leqslant; ≥ ge geq geqslant; ≠ ne neq; < lt; > gt; ≈ approx;
    ≡ equiv; ∈ in; ∉ notin; ⊂ subset; ⊆ subseteq; ∪ cup; ∩ cap; ∑ sum; ∏ prod; ∫ int; √ sqrt; ∞ infty; ° circ degree;
    ∠ angle measuredangle; △ triangle; ⊥ perp; ∥ parallel; → to rightarrow longrightarrow; ⇒ implies Rightarrow;
    ′ prime; | mid vert lvert rvert; bar overline; binom dbinom tbinom choose
"""
_COMMANDS = {name: meaning for entry in _MEANINGS.split(";") for meaning, *names in [entry.split()] for name in names}
_COMMANDS |= dict.fromkeys("ldots dots cdots dotsc dotsb vdots item".split(), "")
_GREEK = {
    chr(code): " " + unicodedata.name(chr(code)).rsplit(" ", 1)[-1].lower().replace("lamda", "lambda") + " "
    for code in range(0x3B1, 0x3CA)
    if code != 0x3C2
}
_CHARACTERS = str.maketrans({**_GREEK, **dict(zip("⋅∙•∗∣⩽⩾⁄∕", "···*|≤≥//", strict=True))})
_LOOKALIKES = str.maketrans({**dict.fromkeys("´’‘`", "'"), "º": "°"})
_ACCENTS = re.compile("(?<=[a-zA-Z])[\u0300-\u0333]+")
# Cyrillic letters that look like Latin ones; a text that has no others is meant to be Latin.
_CYRILLIC = re.compile("[\u0400-\u052f]")
_AS_LATIN = str.maketrans("аеорсхуіѕјһАВЕКМНОРСТХУІЅЈ", "aeopcxyisjhABEKMHOPCTXYISJ")
_DASHES = re.compile("[‐‑‒–—―−﹣－]")
# Not a sign but emphasis; products of numbers or groups, which the signs say alike (of vectors they don't).
_STAR = re.compile(r"(?<![\w)}]\s)(?<![\w)}])\*|\*(?!\s*(?:[\d(√\\⟨{−-]|[^\W\d_](?![^\W\d_])))")
_TIMES = re.compile(r"[*·](?=\s*[\d(√])|(?<=[\d)}])\s*[*·]|(?<=[\d)}]\s)[*·]")
_CLOCK = re.compile(r"(\d)\s?([ap])\.?\s?m\b\.?")
# A minus sign, not a hyphen or a dash: before a number, a variable, a formula; never between spaces after a word.
_MINUS = re.compile(r"(?:(?<![^\W\d_]{2}\s)-|-(?!\s))(?=\s*(?:[\d(√\\⟨{]|[^\W\d_](?![^\W\d_])))")
# Not the end of a sentence: after a number, a variable, a group.
_FACTORIAL = re.compile(rf"(?:(?<=[\d)}}])|(?<=(?<![^\W_]){_LETTER}))!(?!=)")
_APOSTROPHE = re.compile(rf"(?<={_LETTER}{{2}})'(?={_LETTER})|(?<=[IiOo])'(?={_LETTER}{{1,2}}\b)")
_POSSESSIVE = re.compile(rf"(?<={_LETTER}{{2}})'s\b")
_IS = re.compile(r"\b(what|that|there|here|it|he|she|who|where|how)'s\b")
_PRIME = re.compile(rf"(?<![^\W_]{{1}}{_LETTER})(?<={_LETTER})'(?!{_LETTER})")


def tokens(text: str) -> list[str]:
    """Words, numbers and signs of `text`, in order. Punctuation, `$` and layout are gone; `two` is `2`."""
    return plain_words(as_spelled(text))


def as_spelled(text: str) -> list[str]:
    """The tokens of `text` before numbers, units and short forms get one spelling, with the ends of sentences."""
    return _TOKEN.findall(canonical(text))


def words(text: str) -> list[str]:
    """Words and numbers of `text`, in order, without signs and without the code of figures ([asy])."""
    if "[" in text:
        text = _FIGURE.sub(" ", text)
    return [token for token in tokens(text) if token[0].isalnum()]


def canonical(text: str) -> str:
    """`text` in lower case, without LaTeX's layout, with one sign for each operator. Still has its punctuation."""
    if "&" in text:
        text = _ENTITY.sub(lambda found: unescape(found[0]), text)
    if not text.isascii():
        text = _plain_characters(text)
    if "," in text or "\\" in text:
        text = _THOUSANDS.sub("", text)
    text = _SPACED_THOUSANDS.sub(lambda found: found[0].replace(" ", ""), text)
    text = _without_dollars(text)
    if "\\" in text:
        text = _without_latex(text)
    text = text.casefold().replace("%", " percent ").replace("sqrt", "√")
    if "." in text:
        text = _CENTS.sub(lambda found: f"{int(found[1])} cent", text)
    if not text.isascii():
        text = text.translate(_CHARACTERS)
    if "." in text:
        text = _DECIMAL.sub(_short_decimal, _BARE_DECIMAL.sub("0.", text))
    if "'" in text:
        text = _APOSTROPHE.sub("", _POSSESSIVE.sub("", _PRIME.sub("′", _IS.sub(r"\1 is", text))))
    if "-" in text:
        text = _MINUS.sub("−", text)
    if "!" in text:
        text = _FACTORIAL.sub("‼", text)
    text = text.replace("<=", "≤").replace(">=", "≥").replace("!=", "≠").replace("**", " ")
    if "*" in text or "·" in text:
        text = _TIMES.sub("×", _STAR.sub(" ", text))
    text = _CLOCK.sub(r"\1 \2m ", text)
    return (_formula_groups(text) if "(" in text or "{" in text else text).replace("°", " degree ")


def _plain_characters(text: str) -> str:
    """Unicode's many forms of one character as one (NFKC), without what can't be seen; `x²` is `x^2`."""
    text = _INVISIBLE.sub("", text.translate(_LOOKALIKES))
    text = _SUPERSCRIPTS.sub(lambda found: "^" + unicodedata.normalize("NFKC", found[0]), text)
    text = _ACCENTS.sub("", unicodedata.normalize("NFD", text))
    if all(ord(letter) in _AS_LATIN for letter in _CYRILLIC.findall(text)):
        text = text.translate(_AS_LATIN)
    return _DASHES.sub("-", unicodedata.normalize("NFKC", text))


def _without_dollars(text: str) -> str:
    """`text` without the marks of formulas, and with currencies' names behind their numbers."""
    if "$" in text:
        text = _SPACED_DOLLAR.sub("$", text.replace("US$", "$"))
        text = _INLINE.sub(r" \1 ", text.replace("\\$", _ESCAPED_DOLLAR))
    return text if "$" not in text and text.isascii() else _MONEY.sub(_money, text)


def _money(found: re.Match[str]) -> str:
    sign, amount, scale = found.groups(default="")
    if sign == "$" and not amount and not found.string[: found.start()][-1:].isdigit():
        return " "  # a formula's mark without its other half
    return f"{amount}{scale} {_CURRENCIES[sign]} "


def _without_latex(text: str) -> str:
    """`text` with LaTeX's commands as signs or names, and without those that are about layout."""
    text = _LINE_BREAK.sub(" ", _SKIP.sub(" ", text))
    text = _FONT.sub(r" \1 ", _SPACING.sub(" ", _SPACE_SIGNS.sub(" ", text)))
    text = text.replace("\\{", "(").replace("\\}", ")").replace("\\|", "|")
    text = _ESCAPED.sub(r"\1", text)
    text = _RAISED.sub(lambda found: "°" if "circ" in found[0] else "′", text)
    text = _OVER.sub(r"\\frac{\1}{\2}", text)
    text = _repeated(partial(_FRACTION.sub, _fraction), text)
    return _COMMAND.sub(lambda found: f" {_COMMANDS.get(found[1], found[1])} ", text)


def _repeated(change: Callable[[str], str], text: str) -> str:
    """`change` from the innermost groups outwards; deeper than this nobody writes."""
    for _ in range(6):
        changed = change(text)
        if changed == text:
            break
        text = changed
    return text


def _fraction(found: re.Match[str]) -> str:
    above, below = (found[1] or found[2] or "").strip(), (found[3] or found[4] or "").strip()
    return f" ({above})/({below}) "


def _short_decimal(found: re.Match[str]) -> str:
    fraction = found[2].rstrip("0")
    return f"{found[1]}.{fraction}" if fraction else found[1]


def _formula_groups(text: str) -> str:
    """Parentheses that group a formula as ⟨ ⟩; those around one thing, and those of prose, mean nothing."""
    text = _repeated(lambda part: _FORMULA_PARENTHESES.sub(_group, _SINGLE_BRACED.sub(r" \1 ", part)), text)
    return text.replace("{", "⟨").replace("}", "⟩")


def _group(found: re.Match[str]) -> str:
    inner = found[1].strip()
    return f" {inner} " if re.fullmatch(r"[^\W_]*", inner) else f"⟨{inner}⟩"
