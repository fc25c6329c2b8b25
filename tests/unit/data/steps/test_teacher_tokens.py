"""Teacher tokens laid over the answer that they spell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_toys import tiny_tokenizer

from sft.data.steps.score.teacher_tokens import HARMONY, NoMatchError, TeacherVocabulary
from sft.tokenizers.load import load_tokenizer

MARK = {name: number for number, name in HARMONY.items()}


@pytest.fixture(scope="module")
def phi(shared_dir: Path) -> Any:
    return load_tokenizer(str(shared_dir / "models" / "Phi-4-mini-flash-reasoning"))


@pytest.fixture(scope="module")
def teacher(phi: Any) -> TeacherVocabulary:
    return TeacherVocabulary(phi)


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def harmony(tokenizer: Any, analysis: str, final: str, *, header: bool = False) -> list[int]:
    """What gpt-oss writes: its thinking, then its answer, each in a channel."""
    start = [MARK["<|channel|>"], *encode(tokenizer, "analysis"), MARK["<|message|>"]] if header else []
    middle = [MARK["<|end|>"], MARK["<|start|>"], *encode(tokenizer, "assistant"), MARK["<|channel|>"]]
    return [
        *start, *encode(tokenizer, analysis), *middle, *encode(tokenizer, "final"), MARK["<|message|>"],
        *encode(tokenizer, final), MARK["<|return|>"],
    ]  # fmt: skip


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize(
    "form", ["<think>\n{}\n</think>\n\n{}", "<think>{}</think>{}", "{}\n\n{}", "<think>\n\n{}\n</think>\n{}\n"]
)
def test_harmony_channels_become_thinking_and_answer(
    phi: Any, teacher: TeacherVocabulary, header: bool, form: str
) -> None:
    analysis, final = "We need é🧮 x. So 3.14!\nThe final channel says 4.", "The answer is \\(4\\)."
    text, ids = form.format(analysis, final), harmony(phi, analysis, final, header=header)
    tokens, covered = teacher.align(ids, [-0.01 * i for i in range(len(ids))], text)
    said = "".join(character for character, inside in zip(text, covered, strict=True) if inside)
    assert said == analysis + final
    # Exactly the tokens of both texts, each with its own log probability.
    words = [index for index, number in enumerate(ids) if number < 199_998]
    first = 1 if header else 0
    own = words[first : first + len(encode(phi, analysis))] + words[-len(encode(phi, final)) :]
    np.testing.assert_allclose(tokens.logprobs, [-0.01 * index for index in own])
    assert (np.diff(tokens.starts) >= 0).all() and tokens.ends[-1] == text.rindex(final) + len(final)
    for start, end, number in zip(tokens.starts, tokens.ends, [ids[index] for index in own], strict=True):
        piece = phi.decode([number])
        assert "�" in piece or text[start:end] == (piece.lstrip(" ") or piece)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<think>\nWe need y.\n</think>\n\nFour.", "at character 16 the answer has 'y.*the tokens 'x."),
        ("<think>\nWe need x.\n</think>\n\nFour. More.", "go on|goes on: 'More"),
        ("<think>\nWe need x.\n</think>", "the tokens 'Four"),
        ("Four.", "the tokens 'We need"),
    ],
)
def test_an_answer_that_the_tokens_do_not_spell_is_told_apart(
    phi: Any, teacher: TeacherVocabulary, text: str, message: str
) -> None:
    ids = harmony(phi, "We need x.", "Four.")
    with pytest.raises(NoMatchError, match=message):
        teacher.align(ids, [-1.0] * len(ids), text)


def test_a_number_that_is_no_token_is_no_match(teacher: TeacherVocabulary) -> None:
    with pytest.raises(NoMatchError, match="250000 is no token"):
        teacher.align([250000], [-1.0], "x")


def test_tokens_of_a_teacher_that_writes_the_tags_itself() -> None:
    tiny = tiny_tokenizer()
    written = "<think> a = 1 + 1.</think> \\boxed{2}"
    ids = [*encode(tiny, written), tiny.eos_token_id]
    text = "<think>\na = 1 + 1.\n</think>\n\n\\boxed{2}"
    tokens, covered = TeacherVocabulary(tiny).align(ids, [-1.0] * len(ids), text)
    assert "".join(text[i] for i in np.flatnonzero(covered)) == "a = 1 + 1.\\boxed{2}"
    # Not the two tags, the space behind each, and the end of text.
    assert len(tokens.logprobs) == len(ids) - 5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["a", " b", "\n", "é", "🧮", "é", "3.14", "\u3000", "<", "think", "x² "]), min_size=1),
    st.lists(st.sampled_from(["Yes", " 4", "\n", "→"]), min_size=1),
)
def test_whatever_the_text_tokens_cover_it(
    phi: Any, teacher: TeacherVocabulary, first: list[str], second: list[str]
) -> None:
    analysis, final = "".join(first), "".join(second)
    text = f"<think>\n{analysis.strip()}\n</think>\n\n{final.strip()}"
    ids = harmony(phi, analysis, final)
    tokens, covered = teacher.align(ids, [-1.0] * len(ids), text)
    assert "".join(text[i] for i in np.flatnonzero(covered)) == analysis.strip() + final.strip()
    reached = np.zeros(len(text), bool)
    for start, end in zip(tokens.starts, tokens.ends, strict=True):
        assert start <= end and (text[start:end].strip() == "" or not text[start].isspace())
        reached[start:end] = True
    assert all(reached[i] or text[i].isspace() for i in np.flatnonzero(covered))
