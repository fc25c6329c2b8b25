"""Numbers as people write them, and which two are one."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.answers.numbers import Number, parse_number, same_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-1,234.50", Number(Fraction("-1234.5"), 2)),
        (r"-\frac{3}{4}", Number(Fraction(-3, 4))),
        (r"\frac12", Number(Fraction(1, 2))),
        ("1 1/2", Number(Fraction(3, 2))),
        (r"$\$32{,}000$", Number(Fraction(32000), unit="dollar", other=Fraction(32))),
        (r"10\,000", Number(Fraction(10000))),
        ("10 000", Number(Fraction(10000))),
        (r"1.5 \times 10^{-3}", Number(Fraction(3, 2000), 4)),
        (r"12.5\%", Number(Fraction("12.5"), 1, percent=True)),
        ("5 percent", Number(Fraction(5), percent=True)),
        (r"15\mbox{ cm}^2", Number(Fraction(15), unit="cm^2")),
        (r"90^\circ", Number(Fraction(90), unit="degree")),
        ("12 inches", Number(Fraction(12), unit="inch")),
        ("1,23", Number(Fraction("1.23"), 2, listed=True)),
        ("1.234,5", Number(Fraction("1234.5"), 1)),
        ("1,23,456", Number(Fraction(123456))),
        ("1,234", Number(Fraction(1234), other=Fraction("1.234"))),
        (r"0.1\overline{6}", Number(Fraction(1, 6))),
        ("101_2", Number(Fraction(5), other=Fraction(101), based=True)),
        ("2 million", Number(Fraction(2000000))),
        ("three and a half", Number(Fraction(7, 2))),
        ("1 hour 30 minutes", Number(Fraction(3, 2), unit="hour")),
        ("٣", Number(Fraction(3))),
        ("x = 5", Number(Fraction(5))),
    ],
)
def test_reads(text: str, number: Number) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "-",
            "+-3",
            "--3",
            "1.2.3",
            "5x",
            "5xy",
            "5m",
            "5i",
            "3 or 4",
            "2 pi",
            "5!",
        ),
        *(
            "1-2",
            "1/2/3",
            "1/0",
            r"\frac{1}{0}",
            "(1,2)",
            "one two",
            "102_2",
            "2. Add",
            "1e999999999",
            "10^{401}",
            "2^3",
            "nan",
        ),
        *("9" * 301, r"5\pi", r"5\mathrm{i}", r"5\text{ or }7", "1,2,3", "2 sin", r"2\sqrt{3}"),
    ],
)
def test_leaves_what_is_not_certainly_one_number(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ("0.333333", "1/3", True),
        ("0.66666667", "2/3", True),
        ("0.3333", "1/3", False),
        ("0.333335", "1/3", False),
        ("3.14159", "3.14159265", True),
        ("1e-9", "2e-9", False),
        ("33.3333%", "1/3", True),
        ("50%", "0.5", True),
        ("50%", "50", True),
        ("0.5%", "0.5", None),
        ("5 km", "5 miles", False),
        ("5 km", "5 kg", False),
        ("5 apples", "5 pears", None),
        ("5 apples", "6 pears", False),
        ("500 cm", "5 m", True),
        ("5%", "5 cm", False),
        ("1234567.8", "1234567.89", False),
        ("1,234", "1.234", None),
        ("101_2", "101", None),
        ("101_2", "101_3", False),
        ("5 km", "5", True),
    ],
)
def test_compares(mine: str, theirs: str, same: bool | None) -> None:
    one, other = parse_number(mine), parse_number(theirs)
    assert one is not None and other is not None
    assert same_number(one, other) is same and same_number(other, one) is same


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6), st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_fractions_are_equal_as_fractions_are(a: int, b: int, c: int, d: int) -> None:
    one, other = parse_number(f"\\frac{{{a}}}{{{b}}}"), parse_number(f"{c}/{d}")
    assert one is not None and one.value == Fraction(a, b)
    if c >= 0:
        assert other is not None and same_number(one, other) is (Fraction(a, b) == Fraction(c, d))
    else:
        assert other is not None and other.value == Fraction(c, d)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_what_python_reads(value: float) -> None:
    number = parse_number(repr(value))
    assert number is not None and float(number.value) == value
