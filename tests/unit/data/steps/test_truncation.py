"""Texts that were cut off."""

from __future__ import annotations

import pytest

from sft.data.steps.quality.truncation import cut_off, in_the_middle


@pytest.mark.parametrize(
    "text",
    [
        "So it is \\boxed{12",
        "\\boxed{1} or \\boxed{\\frac{1}{2}",
        "\\fbox {a \\} b",
        "Code:\n```python\nprint(1)\n",
        "1. ```python\nprint(1)",
        "````\n```\ncode\n```\n",
        "> ```\n> a",
    ],
)
def test_an_open_box_or_fence_shows_it(text: str) -> None:
    assert cut_off(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is four",
        "\\boxed{\\frac{1}{2}}",
        "\\boxed{\\{1, 2\\}}",
        "\\boxed{a}, a set {1, 2",
        "Code:\n```python\nprint(1)\n```",
        "Here: ```python\nprint(1)\n```\nDone.",
        "1. ```python\n   print(1)\n   ```",
        "````md\n```python\nprint(1)\n```\n````",
        "Use ``` for code.",
        "````\n```\ncode\n````",
    ],
)
def test_a_whole_text_shows_nothing(text: str) -> None:
    assert cut_off(text) is None


def test_the_last_character_tells_the_middle_of_a_sentence() -> None:
    assert in_the_middle("so we ad") and in_the_middle("x =") and in_the_middle("f(")
    assert not in_the_middle("Done.") and not in_the_middle("$x$") and not in_the_middle("")
