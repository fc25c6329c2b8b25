"""Sentences of reasoning text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cpu_limit import at_most
from hypothesis import given
from hypothesis import strategies as st

from sft.data.text.sentences import sentence_spans


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in sentence_spans(text)]


# Each case is written with a bar where a sentence ends.
CASES = [
    "We have two. |Then three!| Is it four? |Yes.",
    "Pi is 3.14 and e is 2.718. |Done.",
    "Let $f(x) = x. And y$ be given. |Then $$a. B! C$$ holds.",
    "So \\[ x = 1. Y = 2.\n Z = 3 \\] holds. |And \\( a! B \\) too.",
    "\\begin{align} a. B\\\\\nc. D \\end{align}\n|Next.",
    "It costs $5. |Then it costs $6. |Total $11.",
    "See e.g. Newton, i.e. the one. |We compare a vs. B and Eq. 3 and Fig. (2). |No. |Really no. 5?",
    "Apples, pears, etc. are fruit. |We bought apples, etc. |Then left.",
    "Steps:\n|1. First do this. |Then that.\n|2. Second.\n|(a) Third.",
    "The answer is 5. |So we stop.",
    "5! = 120 and 3! + 4! = 30. |Wow! |Good.",
    "Hmm... wait. |Hmm... |Maybe… |No.",
    'He said "yes." |Then (he left.) |**Bold.** |End.',
    "Thus $x = 3.$ |Therefore $y = 4.$",
    "```python\nx = 1. # A. B\n\ny = 2\n```\n|After.",
    "Unclosed \\[ x = 1. |Then $y and ```code. |More.",
    "\n\n First.\n\n\n|Second.\n\n",
    "<think>\n|We add. |Done.\n|</think>\n\n|The answer is \\boxed{4}.",
    "我们计算。|然后！|好",
    "   ",
    "www.example.com is a site; v1.2.3 is a version. |Ok.",
]


@pytest.mark.parametrize("case", CASES)
def test_sentences_end_where_a_reader_would_end_them(case: str) -> None:
    # A bar before a space means the same as one after it: the space belongs to the sentence before.
    expected = case.replace("| ", " |")
    assert "|".join(sentences(expected.replace("|", ""))) == expected


def test_empty_text_has_no_sentence() -> None:
    assert sentences("") == []


MARKS = [
    "```",
    "\\[",
    "\\]",
    "\\(",
    "\\)",
    "$",
    "$$",
    ". ",
    "...",
    "!",
    "? ",
    "\n",
    " ",
    "e.g",
    "1",
    "A",
    "b",
    "。",
    "é",
]


@given(
    st.one_of(st.text(), st.lists(st.sampled_from([*MARKS, "\\begin{a}", "\\end{a}", "=", ")", "etc"])).map("".join))
)
def test_every_character_is_in_exactly_one_sentence(text: str) -> None:
    parts = sentences(text)
    assert "".join(parts) == text
    assert all(part.strip() for part in parts) or not text.strip()
    assert all(not part[:1].isspace() for part in parts[1:])


@pytest.mark.parametrize("unit", ["\\[ a. B ", "$x. Y ", "```a. B\n", "\\begin{a} ", "$$ x. ", ". ", "1. ", "e.g. "])
def test_time_is_linear_in_the_text_even_where_nothing_is_closed(unit: str) -> None:
    text = unit * (300_000 // len(unit)) + "x"
    with at_most(cpu_seconds=30):
        sentence_spans(text)


def test_real_solutions_fall_into_sentences_of_ordinary_length(shared_dir: Path) -> None:
    """MATH-500's solutions: no sentence boundary lies inside a formula (dollars and environments are balanced)."""
    lines = (shared_dir / "data" / "math500" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["solution"] for line in lines]
    parts = [part for text in texts for part in sentences(text)]
    assert "".join(parts) == "".join(texts)
    cut = [part for part in parts if part.replace("\\$", "").count("$") % 2 or part.count("\\[") != part.count("\\]")]
    assert len(cut) <= len(parts) // 200, cut[:5]
    assert 1500 < len(parts) < 6000
