"""Answers that break parsers, from a seeded generator: the same ones in every run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

_COMMANDS = (
    *(r"\frac", r"\sqrt", r"\sum", r"\int", r"\prod", r"\lim", r"\binom", r"\left(", r"\right)", r"\\", "&"),
    *(r"\begin{pmatrix}", r"\end{pmatrix}", "^", "_", "{", "}", "!", "%", "$", "#"),
)
_CONTROL = "".join(map(chr, [*range(32), 127, 0x85, 0xA0, 0x200B, 0x202E, 0x2028, 0xFEFF, 0xFFFF, 0x1F600]))


def hostile_completions(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(family, completion) of `count` texts, the families in turn."""
    rng = random.Random(seed)
    families = list(FAMILIES.items())
    for number in range(count):
        name, make = families[number % len(families)]
        body = make(rng)
        yield name, rng.choice(["\\boxed{%s}", "The answer is $%s$.", "#### %s"]).replace("%s", body)


def _tower(rng: random.Random) -> str:
    text = str(rng.randint(2, 99))
    for _ in range(rng.randint(2, 9)):
        text = rng.choice(["{}^{{{}}}", "({})^{{{}}}", "{}**{}", "\\exp({}+{})"]).format(rng.randint(2, 99), text)
    return text


def _huge_integer(rng: random.Random) -> str:
    digits = "".join(rng.choices("0123456789", k=rng.choice([310, 2_000, 9_000, 20_000])))
    return rng.choice(["{}", "{}!", "\\frac{{{}}}{{7}}", "\\sqrt{{{}}}", "10^{{{}}}", "1e{}", "0.{}", "{}\\%"]).format(
        digits
    )


def _factorials(rng: random.Random) -> str:
    return f"{rng.randint(10, 10**9)}!" * rng.randint(1, 3) + rng.choice(["", "!", "^{9!}", f"-{rng.randint(1, 99)}"])


def _nested(rng: random.Random) -> str:
    depth = rng.choice([50, 200, 800, 2_500])
    before, after = rng.choice(
        [("(", ")"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("{", "}"), ("\\left(", "\\right)"), ("|", "|"), ("-", "")]
        if rng.random() < 0.5
        else [("\\sin(", ")"), ("\\{", "\\}"), ("[", ")"), ("x^{", "}"), ("\\text{", "}"), ("\\boxed{", "}")]
    )
    return before * depth + str(rng.randint(2, 9)) + after * depth


def _unbalanced(rng: random.Random) -> str:
    return "".join(rng.choices([*_COMMANDS, "x", "1", " "], k=rng.randint(1, 300)))


def _control(rng: random.Random) -> str:
    return "".join(rng.choices(_CONTROL + "12x+^{}\\", k=rng.randint(1, 200)))


def _polynomial(rng: random.Random) -> str:
    names = rng.sample("abcxyzuvw", rng.randint(2, 6))
    return "+".join(
        f"({'+'.join(names)}+{rng.randint(1, 9)})^{{{rng.randint(5, 200)}}}" for _ in range(rng.randint(1, 6))
    )


def _analysis(rng: random.Random) -> str:
    n = rng.randint(10, 10**9)
    return rng.choice(
        [
            f"\\sum_{{k=1}}^{{{n}}} \\frac{{\\sin(k)}}{{k!}}",
            f"\\int_0^{{{n}}} e^{{-x^{{{rng.randint(3, 99)}}}}} \\sin(x^x) dx",
            f"\\prod_{{k=1}}^{{{n}}} (k^{{k}}+1)",
            f"\\lim_{{x\\to 0}} \\frac{{\\sin(x^{{{n}}})}}{{x^{{{n}}}}}",
            f"\\binom{{{n}}}{{{n // 2}}}",
            f"\\log_{{{n}}}({n}^{{{n}}}+x)",
        ]
    )


def _listing(rng: random.Random) -> str:
    size = rng.choice([50, 500, 1_500])
    items = ",".join(str(rng.randint(-(10**6), 10**6)) for _ in range(size))
    return rng.choice(["\\{{{}\\}}", "({})", "\\begin{{pmatrix}}{}\\end{{pmatrix}}", "{}"]).format(items)


_CODE = (
    *("__import__('os')._exit({})", "lambda: {}", "().__class__.__bases__[0].__subclasses__()[{}]", "exec('x={}')"),
    *("[i for i in range({}**9)]", "{}*'x'*10**9", "os.kill(os.getpid(),{})", "'\\\\x00'*{}"),
)


def _code(rng: random.Random) -> str:
    return rng.choice(_CODE).format(rng.randint(1, 10**6))


def _repeats(rng: random.Random) -> str:
    piece = rng.choice(
        ["B) ", "(B", "**", "\\text{", "answer is ", "1,", "1 ", "A: ", "$", "= x", "x = ", "</think>", "1/", "%"]
    )
    return piece * rng.randint(100, 3_000)


def _words(rng: random.Random) -> str:
    return " ".join(
        "".join(rng.choices("abcdefgilnoprstuxyzáß中", k=rng.randint(1, 40))) for _ in range(rng.randint(1, 200))
    )


FAMILIES: dict[str, Callable[[random.Random], str]] = {
    "tower": _tower,
    "huge integer": _huge_integer,
    "factorials": _factorials,
    "nested": _nested,
    "unbalanced": _unbalanced,
    "control": _control,
    "polynomial": _polynomial,
    "analysis": _analysis,
    "listing": _listing,
    "code": _code,
    "repeats": _repeats,
    "words": _words,
}
