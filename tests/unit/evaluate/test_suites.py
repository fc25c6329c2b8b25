"""Named suites: the published prompts and protocol, choices in a stated order, and limits that count the prompt."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sft.answers.choices import options_in
from sft.evaluate.suites import Problem, load_problems, render_prompt, thinking_state
from sft.recipe.packaged import list_suites
from sft.recipe.schema import EvaluateSection, SuiteSection, Templates
from sft.recipe.suites import Chosen, load_suites
from sft.utils.errors import UsageError, UserError

NAMES = ["aime24", "aime25", "gpqa_diamond", "gsm8k", "math500", "tiny"]
BOXED = r"Please reason step by step, and put your final answer within \boxed{}. "
LETTER = r"Please reason step by step, and put your final choice of one letter from A/B/C/D within \boxed{}. "
PUBLISHED = {
    "math500": (8, BOXED, "HuggingFaceH4/MATH-500", "solution"),
    "aime24": (64, BOXED, "HuggingFaceH4/aime_2024", "answer"),
    "aime25": (64, BOXED, "yentinglin/aime_2025", "answer"),
    "gpqa_diamond": (8, LETTER, "Idavidrein/gpqa", "Correct Answer"),
}


def suite_of(name: str, *overrides: str) -> SuiteSection:
    return load_suites([name], overrides).suites[0]


def test_the_packaged_suites_load() -> None:
    assert [suite.name for suite in list_suites()] == NAMES
    assert [suite.name for suite in load_suites(NAMES).suites] == NAMES


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_protocol(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, instruction, data, gold = PUBLISHED[name]
    suite = suite_of(name)
    assert (suite.temperature, suite.top_p, suite.max_length, suite.max_new_tokens) == (0.6, 0.95, 32768, 32768)
    assert (suite.samples_per_problem, suite.source.path) == (samples, data)
    assert suite.columns is not None and suite.columns["answer"] == gold
    # No system prompt, whatever the stage was trained with.
    monkeypatch.setattr("sft.evaluate.suites.prompt_text", lambda _, messages, where: messages)
    asked: Any = render_prompt(None, Problem("1", "Why?", "1", None, None), suite, Templates(system_prompt="Be brief."))
    assert asked == [{"role": "user", "content": f"{instruction}Why?"}]


QUESTION = {
    "Question": "Which one?\n",
    "Correct Answer": " the right one\nA: not this alone\n",
    "Incorrect Answer 1": "first",
    "Incorrect Answer 2": "a vitamin A. It is wrong",
    "Incorrect Answer 3": "third",
    "High-level domain": "Biology",
    "Record ID": "rec1",
}


def questions(path: Path, count: int = 1, **changes: Any) -> list[str]:
    """Write rows as GPQA has them; overrides that read them."""
    rows = [{**QUESTION, "Question": f"Which one of {n}?\n", "Record ID": f"rec{n}", **changes} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--suites.gpqa_diamond.source.path", str(path)]


def test_choices_stand_below_the_problem_and_the_gold_answer_is_a_letter(tmp_path: Path) -> None:
    overrides = questions(tmp_path / "gpqa.jsonl", 200)
    problems = load_problems(suite_of("gpqa_diamond", *overrides))
    assert [problem.id for problem in problems[:2]] == ["rec0", "rec1"] and problems[0].group == "Biology"
    for number, problem in enumerate(problems):
        head, _, listed = problem.text.partition("\n\n")
        assert head == f"Which one of {number}?"
        choices = problem.choices()
        assert listed == "\n".join(f"{letter}) {choice}" for letter, choice in choices.items())
        assert list(choices) == list("ABCD") and choices[problem.gold] == "the right one\nA: not this alone"
        wrong = [choice for letter, choice in choices.items() if letter != problem.gold]
        assert wrong == ["first", "a vitamin A. It is wrong", "third"]
    # Chance of a count this far from 50: below one in 10^5.
    counts = Counter(problem.gold for problem in problems)
    assert set(counts) == set("ABCD") and all(25 <= count <= 77 for count in counts.values())
    # An option that looks like a list of them doesn't mislead the judge.
    assert problems[0].choices() != options_in(problems[0].text)


def test_where_the_right_choice_stands_follows_from_seed_and_problem(tmp_path: Path) -> None:
    overrides = questions(tmp_path / "gpqa.jsonl", 40)
    whole = [problem.gold for problem in load_problems(suite_of("gpqa_diamond", *overrides))]
    again = load_problems(suite_of("gpqa_diamond", *overrides, "--suites.gpqa_diamond.max_problems", "7"))
    assert [problem.gold for problem in again] == whole[:7]
    other = load_problems(suite_of("gpqa_diamond", *overrides, "--suites.gpqa_diamond.choices.seed", "1"))
    assert [problem.gold for problem in other] != whole
    # The rule that the documentation states.
    import hashlib

    digest = hashlib.sha256(b"0:Which one of 0?\n").digest()
    assert whole[0] == "ABCD"[int.from_bytes(digest[:8], "big") % 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Incorrect Answer 2": None}, r"column 'Incorrect Answer 2' \(choices.wrong\) is empty"),
        ({"Incorrect Answer 2": "  "}, r"column 'Incorrect Answer 2' \(choices.wrong\) is empty"),
        ({"Incorrect Answer 2": ["x"]}, r"column 'Incorrect Answer 2' \(choices.wrong\) is empty or no text"),
    ],
)
def test_choices_that_cannot_be_used_are_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    overrides = questions(tmp_path / "gpqa.jsonl", 1, **changes)
    with pytest.raises(UserError, match=message):
        load_problems(suite_of("gpqa_diamond", *overrides))


def test_columns_of_choices_that_are_not_there_are_told(tmp_path: Path) -> None:
    overrides = questions(tmp_path / "gpqa.jsonl")
    wrong = ["--suites.gpqa_diamond.choices.wrong", "[Incorrect Answer 9]"]
    with pytest.raises(UserError, match=r"no column 'Incorrect Answer 9' \(for choices.wrong\)"):
        load_problems(suite_of("gpqa_diamond", *overrides, *wrong))


def test_the_sets_that_are_here_load_whole(shared_dir: Path) -> None:
    data = shared_dir / "data"
    math = load_problems(suite_of("math500", "--suites.math500.source.path", str(data / "math500")))
    assert len(math) == 500 and math[0].gold == r"\left( 3, \frac{\pi}{2} \right)" and math[0].group == "Precalculus"
    gsm8k = load_problems(suite_of("gsm8k", "--suites.gsm8k.source.path", str(data / "gsm8k")))
    assert len(gsm8k) == 1319 and gsm8k[0].gold == "18"


def test_a_commands_choice_narrows_and_adds() -> None:
    own = SuiteSection.model_validate({"name": "own", "source": {"path": "a.jsonl"}, "max_problems": 4})
    section = EvaluateSection(suites=[own])
    assert Chosen().of(section) == section and not Chosen()
    cut = Chosen(limit=9, samples=3)
    assert [(s.max_problems, s.samples_per_problem) for s in cut.of(section).suites] == [(4, 3)]
    assert cut.label == "-limit-9-samples-3" and Chosen(("own",)).label == ""
    chosen = Chosen(("tiny", "own"), limit=2).of(section)
    assert [(suite.name, suite.max_problems) for suite in chosen.suites] == [("tiny", 2), ("own", 2)]
    with pytest.raises(UsageError, match=r"--suite own: another suite is called own"):
        Chosen(("own", "own")).of(section)


@pytest.mark.parametrize(
    ("prompt", "completion", "state"),
    [
        ("2+2?", "4", "none"),
        ("2+2?", "<think>so</think>4", "closed"),
        ("2+2?", "<think>so", "open"),
        ("2+2?<think>\n", "so", "open"),
        ("2+2?<think>\n", "so</think>4", "closed"),
        ("2+2?<think>\n\n</think>\n\n", "4", "none"),
        ("2+2?", "so</think>4", "closed"),
    ],
)
def test_thinking_is_closed_open_or_none(prompt: str, completion: str, state: str) -> None:
    assert thinking_state(prompt, completion) == state
