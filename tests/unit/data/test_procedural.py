"""Generated problems: right, disjoint, varied and reproducible; and the tokenizer that goes with them."""

from __future__ import annotations

import re
import time
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.procedural import MAX_STEPS, generate_rows
from sft.data.procedural.numbers import worked
from sft.data.template import PUBLISHED_TEMPLATE
from sft.data.tiny_tokenizer import CHAT_TOKENS, THINK_TOKENS, build_tokenizer
from sft.errors import UserError
from sft.recipe.schema import GenerateSource

FAMILIES = ("arithmetic", "equations", "words")


def rows_of(**keys) -> list[dict]:
    return list(generate_rows(GenerateSource(**keys)))


def boxed(row: dict) -> str:
    return re.fullmatch(r"<think>\n.*\n</think>\n\\boxed\{(\d+)\}", row["completion"], re.S).group(1)


def value_of(expression: str, known: dict[str, Fraction]) -> Fraction:
    """Evaluate a chain of `+ - * /` over numbers and labels, with Python's precedence and exact fractions."""
    exact = re.sub(r"\b(\d+)\b", r"F(\1)", expression)
    return eval(exact, {"F": Fraction, **known})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [(3, 3), (4, 4), (3, 12), (MAX_STEPS, MAX_STEPS)])
def test_rows_have_what_was_asked_for(family: str, steps: tuple[int, int]) -> None:
    rows = rows_of(family=family, rows=20, min_steps=steps[0], max_steps=steps[1])
    assert len(rows) == 20 == len({row["id"] for row in rows}) == len({row["prompt"] for row in rows})
    for row in rows:
        assert set(row) == {"id", "prompt", "completion", "answer", "family", "steps"}
        assert row["family"] == family and steps[0] <= row["steps"] <= steps[1]
        assert boxed(row) == row["answer"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_line_of_reasoning_is_true(family: str) -> None:
    """An evaluator that knows nothing of the generator finds every `=` of every line to hold."""
    for row in rows_of(family=family, rows=100, max_steps=20):
        lines = row["completion"].split("<think>\n")[1].split("\n</think>")[0].split("\n")
        found = {
            match[1]: Fraction(match[2])
            for line in lines
            if (match := re.fullmatch(r"([A-T]\d) = (?:.* = )?(\d+)", line))
        }
        for line in lines:
            assert len({value_of(side, found) for side in line.split(" = ")}) == 1, line
        asked = re.search(r"([A-T]\d)[.?]$", row["prompt"])[1]
        assert found[asked] == int(row["answer"])


@pytest.mark.parametrize("family", ["arithmetic", "equations"])
def test_the_answer_follows_from_the_prompt(family: str) -> None:
    for row in rows_of(family=family, rows=100, max_steps=15):
        known: dict[str, Fraction] = {}
        for line in row["prompt"].split("\n")[:-1]:
            left, right = line.split(" = ")
            label = (set(re.findall(r"[A-T]\d", line)) - set(known)).pop()
            # Two points of left - right, which is linear in the unknown, give its root.
            at_0, at_1 = (
                value_of(left, {**known, label: Fraction(x)}) - value_of(right, {**known, label: Fraction(x)})
                for x in (0, 1)
            )
            known[label] = -at_0 / (at_1 - at_0)
        assert list(known.values())[-1] == int(row["answer"])


def test_stories_tell_the_chain_that_is_calculated() -> None:
    signs = {"more": "+", "get on": "+", "buys": "+", "gets": "+", "earns": "+", "wins": "+", "board": "+"}
    signs |= {"fewer": "-", "get off": "-", "leave": "-", "sells": "-", "loses": "-", "spends": "-", "pays": "-"}
    signs |= {"times": "*", "1/": "/"}
    for row in rows_of(family="words", rows=200, max_steps=8):
        sentences = re.split(r"(?<=[.?]) ", row["prompt"])[1:-1]
        value = int(re.search(r"\b\d+\b", sentences[0])[0])
        for sentence in sentences[1:]:
            found = [sign for phrase, sign in signs.items() if phrase in re.sub("now|many more", "", sentence)]
            assert len(set(found)) == 1, sentence
            operand = re.search(r"1/(\d)|\b(\d+)\b", sentence)
            value = value_of(f"{value} {found[0]} {operand[1] or operand[2]}", {})
        assert value == int(row["answer"])


@given(st.integers(1, 99), st.sampled_from("+-"), st.integers(1, 99))
def test_worked_sums_hold(left: int, operator: str, right: int) -> None:
    sides = worked(left, operator, right).split(" = ")
    assert sides[0] == f"{left} {operator} {right}"
    assert len({value_of(side, {}) for side in sides}) == 1


def test_train_and_test_share_no_calculation() -> None:
    """The same calculation never stands on both sides, whatever its names or wording; nor is a problem given twice."""

    def calculations(split: str, family: str, seed: int) -> list[str]:
        rows = rows_of(family=family, rows=1500, max_steps=4, split=split, seed=seed)
        return [re.sub(r"[A-T]\d", "", row["completion"]) for row in rows]

    for family in FAMILIES:
        train, test = (calculations(split, family, seed) for split, seed in (("train", 1), ("test", 2)))
        assert not set(train) & set(test)
        assert len(set(train)) > 1480
    assert not set(calculations("train", "arithmetic", 3)) & set(calculations("test", "words", 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_can_be_guessed(family: str) -> None:
    answers = Counter(row["answer"] for row in rows_of(family=family, rows=4000, max_steps=12))
    assert max(answers.values()) < 0.05 * 4000
    assert len(answers) > (40 if family == "equations" else 90)


def test_the_same_source_gives_the_same_rows_and_another_seed_others() -> None:
    assert rows_of(rows=30, seed=5) == rows_of(rows=30, seed=5)
    assert rows_of(rows=10, seed=5) == rows_of(rows=30, seed=5)[:10]
    assert not {row["prompt"] for row in rows_of(rows=30, seed=5)} & {row["prompt"] for row in rows_of(rows=30, seed=6)}


def test_generation_is_quick() -> None:
    start = time.process_time()
    rows_of(rows=5000)
    assert time.process_time() - start < 1.0


def test_too_many_steps_are_refused() -> None:
    with pytest.raises(UserError, match=f"at most {MAX_STEPS}"):
        rows_of(rows=1, max_steps=MAX_STEPS + 1)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@settings(max_examples=100)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) for i in ids)


@pytest.mark.parametrize("max_steps", [6, MAX_STEPS])
def test_problems_need_no_bytes(tokenizer, max_steps: int) -> None:
    """Every piece of a problem is a token of its own: only digits, `/` and line ends are single characters."""
    for row in rows_of(rows=30, max_steps=max_steps, seed=9):
        text = f"{row['prompt']}\n{row['completion']}"
        tokens = [tokenizer.decode([i]) for i in tokenizer(text).input_ids]
        assert "".join(tokens) == text
        assert {token for token in tokens if len(token) == 1} <= set("0123456789/\n.?}") | {"a "}


def test_chat_tokens_are_special_and_think_tokens_are_kept(tokenizer) -> None:
    assert all(len(tokenizer(token).input_ids) == 1 for token in (*CHAT_TOKENS, *THINK_TOKENS))
    text = "<|user|>Find A1.<|end|><|assistant|><think>\n7</think>\n\\boxed{7}<|end|><|endoftext|>"
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert decoded == "Find A1.<think>\n7</think>\n\\boxed{7}"
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.chat_template == PUBLISHED_TEMPLATE


def test_the_tokenizer_survives_saving(tokenizer, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = rows_of(rows=1)[0]["completion"] + " unknown wörds"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.get_vocab() == tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert loaded.chat_template == tokenizer.chat_template and loaded.padding_side == "left"
