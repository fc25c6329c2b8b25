"""Generated problems: right, disjoint, varied and reproducible; and the tokenizer that goes with them."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.read.generated import MAX_STEPS, generate_rows
from sft.data.read.generated.chains import MOST_ROUNDS_OF_LONGEST, MOST_SHORT_STEPS
from sft.recipe.schema import GenerateSource
from sft.tokenizers.templates import PUBLISHED_TEMPLATE
from sft.tokenizers.tiny import CHAT_TOKENS, PATTERN, THINK_TOKENS, build_tokenizer, words
from sft.utils.errors import UserError

FAMILIES = ("arithmetic", "equations", "words")
LONG = (98, 128)
SIGNS = {sign: sign for sign in "+-*/"}
SIGNS |= dict.fromkeys(("buys", "finds", "earns", "board"), "+")
SIGNS |= dict.fromkeys(("sells", "loses", "spends", "leave"), "-")
SIGNS |= {"multiplies": "*", "divides": "/"}


def rows_of(**keys) -> list[dict]:
    return list(generate_rows(GenerateSource(**keys)))


def boxed(row: dict) -> str:
    return re.fullmatch(r"<think>\n.*\n</think>\n\\boxed\{(\d+)\}", row["completion"], re.S).group(1)


def reasoning(row: dict) -> list[str]:
    return row["completion"].split("<think>\n")[1].split("\n</think>")[0].split("\n")


def calculations(row: dict) -> list[str]:
    """What each line of reasoning claims, as equations between numbers: value, move and result."""
    claims = []
    for line in reasoning(row):
        line = re.sub(r" \[\d+\]", "", line).replace(" last ", " ")
        chain = re.fullmatch(r"(\d+) \(\d+\) (\D+?)(\d+) = (\d+)", line)
        equation = re.fullmatch(r"(\d+) \(\d+\) ([a-m]) ([-+*/]) (\d) = [a-m] so \2 = (\d+)", line)
        assert chain or equation, line
        if chain:
            claims.append(f"{chain[1]} {SIGNS[chain[2].split(' ')[0]]} {chain[3]} = {chain[4]}")
        else:
            claims.append(f"{equation[5]} {equation[3]} {equation[4]} = {equation[1]}")
    return claims


def value_of(expression: str, known: dict[str, Fraction]) -> Fraction:
    """Evaluate a chain of `+ - * /` over numbers and unknowns, with Python's precedence and exact fractions."""
    exact = re.sub(r"\b(\d+)\b", r"F(\1)", expression)
    return eval(exact, {"F": Fraction, **known})


def root_of(equation: str, unknown: str, known: dict[str, Fraction]) -> Fraction:
    """What the unknown of a linear equation is, from two points of left - right."""
    left, right = equation.split(" = ")
    at_0, at_1 = (
        value_of(left, {**known, unknown: Fraction(x)}) - value_of(right, {**known, unknown: Fraction(x)})
        for x in (0, 1)
    )
    return -at_0 / (at_1 - at_0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [(3, 3), (4, 4), (3, 8), LONG, (MAX_STEPS, MAX_STEPS)])
def test_rows_have_what_was_asked_for(family: str, steps: tuple[int, int]) -> None:
    rows = rows_of(family=family, rows=20, min_steps=steps[0], max_steps=steps[1])
    assert len(rows) == 20 == len({row["id"] for row in rows}) == len({row["completion"] for row in rows})
    for row in rows:
        assert set(row) == {"id", "prompt", "completion", "answer", "family", "steps"}
        assert row["family"] == family and steps[0] <= row["steps"] <= steps[1]
        assert boxed(row) == row["answer"]
        assert len(calculations(row)) == row["steps"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [(3, 8), LONG])
def test_every_line_of_reasoning_is_true(family: str, steps: tuple[int, int]) -> None:
    """An evaluator that knows nothing of the generator finds every claim to hold, each going on from the one before."""
    for row in rows_of(family=family, rows=60, min_steps=steps[0], max_steps=steps[1]):
        for claim in calculations(row):
            assert len({value_of(side, {}) for side in claim.split(" = ")}) == 1, claim
        lines = reasoning(row)
        assert all(after.split(" ")[0] == line.split(" = ")[-1] for line, after in pairwise(lines))
        assert lines[-1].split(" = ")[-1] == row["answer"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_quotes_its_line_of_the_question(family: str) -> None:
    for row in rows_of(family=family, rows=30, max_steps=8) + rows_of(
        family=family, rows=3, min_steps=LONG[0], max_steps=LONG[1]
    ):
        told = [line for line in row["prompt"].split("\n") if line.startswith(" (")]
        quoted = [line for line in reasoning(row) if " (" in line]
        assert len(quoted) % len(told) == 0
        assert all(told[i % len(told)] in line for i, line in enumerate(quoted))


def test_the_answer_of_arithmetic_follows_from_the_prompt() -> None:
    for row in rows_of(family="arithmetic", rows=100) + rows_of(
        family="arithmetic", rows=10, min_steps=LONG[0], max_steps=LONG[1]
    ):
        value = re.search(r"Start with (\d+)", row["prompt"])[1]
        rounds = re.search(r"\[(\d+)\] last", row["prompt"])
        for _ in range(int(rounds[1]) if rounds else 1):
            for move in re.findall(r"\(\d+\) (?:last )?([-+*/] \d+)", row["prompt"]):
                value = str(value_of(f"{value} {move}", {}))
        assert value == row["answer"]


def test_the_answer_of_equations_follows_from_the_prompt() -> None:
    for row in rows_of(family="equations", rows=100, max_steps=8):
        opening, *equations, question = row["prompt"].split("\n")
        known = {"a": Fraction(re.search(r"a = (\d+)", opening)[1])}
        for line in equations:
            equation = line.split(") ")[1].removeprefix("last ")
            unknown = (set(re.findall(r"[a-m]", equation)) - set(known)).pop()
            known[unknown] = root_of(equation, unknown, known)
        assert known[question[-2]] == int(row["answer"])
    for row in rows_of(family="equations", rows=10, min_steps=LONG[0], max_steps=LONG[1]):
        first = Fraction(re.search(r"a = (\d+)", row["prompt"])[1])
        for _ in range(int(re.search(r"\[(\d+)\] last", row["prompt"])[1])):
            known = {"a": first}
            for equation, unknown in re.findall(r"\(\d+\) (?:last )?(([a-m]) .* = [a-m])", row["prompt"]):
                known[unknown] = root_of(equation, unknown, known)
            first = known[unknown]
        assert first == int(row["answer"])


def test_stories_tell_the_chain_that_is_calculated() -> None:
    for row in rows_of(family="words", rows=200, max_steps=8):
        opening, *events, _ = row["prompt"].split("\n")
        value = Fraction(re.search(r"\d+", opening)[0])
        for event in events:
            verb, operand = re.fullmatch(r" \(\d+\) (?:last )?(\w+).* (\d+)", event).groups()
            value = value_of(f"v {SIGNS[verb]} {operand}", {"v": value})
        assert value == int(row["answer"])


@pytest.mark.parametrize("family", FAMILIES)
def test_long_traces_have_about_one_to_two_thousand_tokens(tokenizer, family: str) -> None:
    rows = rows_of(family=family, rows=60, min_steps=LONG[0], max_steps=LONG[1])
    lengths = [len(tokenizer(row["completion"]).input_ids) for row in rows]
    assert min(lengths) >= 900 and max(lengths) <= 2000
    assert max(len(tokenizer(row["prompt"]).input_ids) for row in rows) < 120


def test_train_and_test_share_no_calculation() -> None:
    """The same calculation never stands on both sides, whatever its names or wording; nor is a problem given twice."""

    def solutions(split: str, family: str, seed: int) -> list[str]:
        rows = rows_of(family=family, rows=1500, max_steps=4, split=split, seed=seed)
        return ["\n".join(calculations(row)) for row in rows]

    for family in FAMILIES:
        train, test = (solutions(split, family, seed) for split, seed in (("train", 1), ("test", 2)))
        assert not set(train) & set(test)
        assert len(set(train)) > 1480
    assert not set(solutions("train", "arithmetic", 3)) & set(solutions("test", "words", 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_can_be_guessed(family: str) -> None:
    answers = Counter(row["answer"] for row in rows_of(family=family, rows=4000, max_steps=8))
    assert max(answers.values()) < 0.05 * 4000
    assert len(answers) > 85


def test_the_same_source_gives_the_same_rows_and_another_seed_others() -> None:
    assert rows_of(rows=30, seed=5) == rows_of(rows=30, seed=5)
    assert rows_of(rows=10, seed=5) == rows_of(rows=30, seed=5)[:10]
    assert not {row["prompt"] for row in rows_of(rows=30, seed=5)} & {row["prompt"] for row in rows_of(rows=30, seed=6)}


def test_too_many_steps_are_refused() -> None:
    with pytest.raises(UserError, match=f"at most {MAX_STEPS}"):
        rows_of(rows=1, max_steps=MAX_STEPS + 1)


def test_scaling_is_the_chance_of_multiplying_and_dividing() -> None:
    def share(**keys) -> float:
        claims = [
            claim for row in rows_of(rows=500, max_steps=8, family="arithmetic", **keys) for claim in calculations(row)
        ]
        return sum(sign in claim for claim in claims for sign in "*/") / len(claims)

    assert share(scaling=0) == 0
    assert share() == share(scaling=0.32) < share(scaling=0.5) < share(scaling=0.9)
    with pytest.raises(UserError, match=r"scaling 0\.5 is for problems of at most 8 steps"):
        rows_of(rows=1, max_steps=9, scaling=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_are_counted_down_from_what_the_question_says(family: str) -> None:
    for row in rows_of(family=family, rows=10, min_steps=9, max_steps=MAX_STEPS):
        rounds = int(re.search(r"\[(\d+)\] last", row["prompt"])[1])
        marks = [(int(mark), int(step)) for mark, step in re.findall(r" \[(\d+)\] \((\d+)\)", row["completion"])]
        assert marks == [(left, 1) for left in range(rounds, 0, -1)]


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
    """Every piece of a problem is a token of its own, and the few that are single characters are meant to be."""
    for row in rows_of(rows=30, max_steps=max_steps, seed=9):
        text = f"{row['prompt']}\n{row['completion']}"
        tokens = [tokenizer.decode([i]) for i in tokenizer(text).input_ids]
        assert "".join(tokens) == text
        assert {token for token in tokens if len(token) == 1} <= set("0123456789abcdefghijklm\n.?}")


def test_the_words_are_the_pieces_of_generated_problems() -> None:
    """No piece is missing from the vocabulary, and none stands there that no problem has."""
    pieces = {f" [{turn}]" for turn in range(1, MOST_ROUNDS_OF_LONGEST + 1)}
    for rows, max_steps in ((3000, MOST_SHORT_STEPS), (30, MAX_STEPS)):
        for row in generate_rows(GenerateSource(rows=rows, max_steps=max_steps)):
            for text in re.split("|".join(map(re.escape, THINK_TOKENS)), f"{row['prompt']}\n{row['completion']}"):
                pieces.update(re.findall(PATTERN, text))
    assert words() == tuple(sorted(pieces))


def test_chat_tokens_are_special_and_think_tokens_are_kept(tokenizer) -> None:
    assert all(len(tokenizer(token).input_ids) == 1 for token in (*CHAT_TOKENS, *THINK_TOKENS))
    text = "<|user|>Find a.<|end|><|assistant|><think>\n7</think>\n\\boxed{7}<|end|><|endoftext|>"
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert decoded == "Find a.<think>\n7</think>\n\\boxed{7}"
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
