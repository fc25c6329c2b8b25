"""Where a completion gives its answer."""

from __future__ import annotations

import pytest

from sft.answers.extract import extract_answer, gold_answer, last_boxed, near_boxes, stated


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"<think>\boxed{1}</think> It is \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> I don't know", None),
        (r"<think>\boxed{1} and it never ends", None),
        (r"\boxed{1}</think> It is \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> \boxed{2} <think> \boxed{3}", "2"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a \\{b} c}", r"a \\{b} c"),
        (r"\boxed{3} and an unfinished \boxed{4", "3"),
        (r"an unfinished \boxed{4", "4"),
        (r"an unfinished \boxed{4 and" + "\nmore text", None),
        (r"\boxed 4 is it", "4"),
        (r"I put the answer within \boxed{}. \boxed{7} as in \boxed{}", "7"),
        ("steps\n#### 1,234", "1,234"),
        ("steps\n#### 1,234\n\n", "1,234"),
        ("steps\n#### 1,234\nI hope this helps.", "1,234"),
        ("#### Step 2: add\nWe add.", None),
        ("#### 2. Add\nWe add.", None),
        ("#### 2\nWe add. The answer is 3.", None),
        ("steps\nA: 18", "18"),
        ("A: 1\nmore\nA: $20\n", "$20"),
        ("A: 10\nB: 12\nthe correct answer is B", None),
        ("A: 10 B: 12 C: 14", None),
        (r"#### 5 and \boxed{6}", "6"),
        ("the answer is 12", None),
        ("####", None),
        ("", None),
    ],
)
def test_extracts_the_explicit_final_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_gold_answers_of_the_usual_data_sets() -> None:
    assert gold_answer("He has 2+2=<<2+2=4>>4.\n#### 4") == "4"
    assert gold_answer(r"Thus $x=\boxed{\frac{3}{4}}.$") == r"\frac{3}{4}"
    assert gold_answer("so\nA: 18") == "18"
    assert gold_answer(7) == "7"


def test_boxes_that_stand_together() -> None:
    assert near_boxes(r"\boxed{1}, \boxed{2} and \boxed{3}") == ["1", "2", "3"]
    assert near_boxes(r"first \boxed{1}." + "\n\n" + r"So \boxed{2} and \boxed{3}") == ["2", "3"]
    assert near_boxes(r"\boxed{\boxed{7}}") == ["7"]
    assert last_boxed(r"\boxed{1} \boxed{2}") == "2"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 12. Not 13.", "12"),
        ("**Answer:** B", "B"),
        ("The answer to the first question is 5.", "5"),
        ("The answer is 3.5. Done.", "3.5"),
        ("The answer is therefore 12, because 5 + 7 = 12.", "12"),
        ("I will answer the question.", None),
        ("Option C is correct.", "C"),
    ],
)
def test_what_a_text_states(text: str, answer: str | None) -> None:
    assert stated(text) == answer
