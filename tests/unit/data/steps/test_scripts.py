"""Letters of other languages than the question's."""

from __future__ import annotations

import pytest

from sft.data.steps.quality.scripts import foreign_letters, native_scripts

ENGLISH = "How many apples are left in the basket?"
CHINESE = "篮子里还剩下多少个苹果？设 $x = \\sin(y)$。"
RUSSIAN = "Сколько яблок осталось в корзине?"
MATHS = "Let $\\alpha\\in\\mathbb{R}$, so α + β ≥ ℵ₀ and 𝑥 ∈ ℝ, ℓ² = Å."


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (ENGLISH, "There are three left."),
        (ENGLISH, MATHS),
        (ENGLISH, "Élodie's naïve café"),
        (CHINESE, "设苹果数为 x，则 \\frac{x}{2} = 3，所以 print(x) 输出 6，即 GPU 数。"),
        (CHINESE, "リンゴは三つです。"),
        (CHINESE, "代码：```python\nfor each apple in the basket do count\n```"),
        (RUSSIAN, "Осталось три яблока: x = 3, то есть sin(x) < 1."),
        ("Translate into Russian: the apple is red. Например: яблоко", "Яблоко красное. The word apple is яблоко."),
        ("2+2=?", "四"),
        ("2+2=?", "The answer is four."),
        ("", ""),
    ],
)
def test_what_belongs_to_the_question_s_language_counts_nothing(question: str, answer: str) -> None:
    assert foreign_letters(answer, native_scripts(question)).share == 0.0


def test_letters_of_another_script_are_counted() -> None:
    found = foreign_letters("There are 三个 left", native_scripts(ENGLISH))
    assert (found.letters, found.total, found.script) == (2, 14, "CJK")
    found = foreign_letters("Осталось three apples, and so on and on", native_scripts(RUSSIAN))
    assert (found.letters, found.total, found.script) == (23, 31, "LATIN")
    # An English answer to a Chinese question, though the question has Latin letters in its formulas.
    assert foreign_letters("Let me see how many apples there are.", native_scripts(CHINESE)).share == 1.0
    # Without letters in the question, the text's own language is the commonest one.
    found = foreign_letters("Да, это так. 是", native_scripts("2+2=?"))
    assert (found.letters, found.script) == (1, "CJK")
