"""One way of writing for texts that say the same."""

from __future__ import annotations

import random

import pytest
from cpu_limit import at_most
from planted_edits import spelled

from sft.data.text.normalize import tokens, words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("It costs $5.50.", "It costs 5.5 dollars"),
        ("It costs US$1,200", r"It costs \$1{,}200"),
        ("It costs 5€ or £3 or 7¢", "It costs 5 euros or 3 pounds or 7 cents"),
        ("It earned $5 million.", "It earned 5000000 dollars"),
        ("$x = 5$ and $5$", "x = 5 and 5"),
        (r"$\$5$ a day", "$5 a day"),
        ("10% of 5", r"ten percent of $5$"),
        ("ten per cent", r"10\%"),
        ("twenty-five of a hundred", "25 of 100"),
        ("two hundred and five thousand and twelve", "205,012"),
        ("a dozen eggs, two dozen, half a dozen", "12 eggs, 24, 6"),
        ("half of it", r"$\frac{1}{2}$ of it"),
        ("two-thirds of it and a quarter of it", "2/3 of it and 1/4 of it"),
        ("two and a half hours", "2 1/2 hrs"),
        ("twice as many", "two times as many"),
        ("he doesn't, can't and won't", "he does not, cannot and will not"),
        ("What's the sum?", "What is the sum?"),
        ("60 mph for 3 km", "60 miles per hour for 3 kilometers"),
        ("thre boxes, fvie bags", "3 boxes, 5 bags"),
        ("Compute 2 + 3", "What is 2 + 3?"),
        ("ten apples - 5 of them red", "ten apples, 5 of them red"),
        (r"$5{,}000{,}000$", "5000000"),
        ("100 000 people", "100,000 people"),
        ("It costs $ 5. A pen costs $ 7, and", "It costs $5. A pen costs $7, and"),
        ("It costs 5$. A pen costs 7$, and", "It costs $5. A pen costs $7, and"),
        ("It costs $0.25 or 0.50 dollars", "It costs 25 cents or 50 cents"),
        ("double the pay, triple it", "twice the pay, three times it"),
        ("5h at 30° and 20 m in 5 sec", "5 hours at 30 degrees and 20 meters in 5 seconds"),
        ("from 9a.m. to 5 P.M.", "from 9 AM to 5pm"),
        ("Bob&#x27;s 3 &lt; 5", "Bob's 3 < 5"),
        ("f\u043eur r\u043eses and a caf\u00e9", "four roses and a cafe"),
        (r"$\frac{137}{\sqrt{27}}$", "(137)/(sqrt(27))"),
        (r"${1 \over 2} < {x \over 7}$", "1/2 < x/7"),
        (r"$5^2 \cdot 3 \times (a + b)$", "5^2 * 3 * (a + b)"),
        (r"$\overline{AB} \text{ and so on}$", r"$\bar{AB}$ and so on"),
        ("*Find* the **sum**", "Find the sum"),
    ],
)
def test_the_same_in_other_words_has_the_same_tokens(one: str, other: str) -> None:
    assert tokens(one) == tokens(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("It costs $5", "It costs 5 cents"),
        ("It costs $5", "It costs £5"),
        ("5%", "5"),
        ("one, two, three", "6"),
        ("twenty and five", "25"),
        ("two hundred and five thousand", "205000 and 0"),
        ("the third of it", "1/3 of it"),
        ("there", "three"),
        ("2.5 000", "2.5000"),
        ("5 m", "5 min"),
        ("\u043c\u043e\u0440\u0435 5", "mope 5"),
        (r"$\sqrt{x + 1}$", r"$\sqrt{x} + 1$"),
        (r"$\frac{13}{7}$", r"$\frac{1}{37}$"),
        ("10 - 5", "10 5"),
    ],
)
def test_other_numbers_have_other_tokens(one: str, other: str) -> None:
    assert tokens(one) != tokens(other)


def test_numbers_in_words_are_the_numbers() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        number = int(10 ** rng.uniform(0, 9))
        assert tokens(f"It has {spelled(number, rng)} parts.") == ["it", "has", str(number), "parts"]


@pytest.mark.parametrize(
    "piece",
    [
        "\\\\[",
        "$a ",
        "\\$5 ",
        "million ",
        "hundred and ",
        "half a ",
        "five ",
        "a half of ",
        "9",
        " ",
        "{ ",
        "-1 ",
        "1 000 ",
        "$ 5 ",
        "5 a",
        "&a",
        "*a ",
        "\\frac{1",
        "e\u0301",
    ],
)
def test_no_text_takes_long(piece: str) -> None:
    text = (piece * 60_000)[:60_000]
    with at_most(cpu_seconds=15):  # a hundredth of it
        words(text), tokens(text)
