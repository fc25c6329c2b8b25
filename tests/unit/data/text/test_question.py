"""What is asked, without what is said around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cpu_limit import at_most
from planted_edits import OTHER_WRAPPERS, WRAPPERS

from sft.data.text.normalize import tokens, words
from sft.data.text.question import core


def real_problems(shared_dir: Path) -> list[str]:
    files = {"gsm8k/train": "question", "gsm8k/test": "question", "math500/test": "problem"}
    return [
        json.loads(line)[column]
        for name, column in files.items()
        for line in (shared_dir / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_of_real_problems_only_instructions_go(shared_dir: Path) -> None:
    texts = real_problems(shared_dir)
    gone = {text[len(core(text)) :].strip() for text in texts if core(text) != text.strip()}
    assert all(text.strip().startswith(core(text)) for text in texts)  # nothing is cut from a beginning
    assert gone == {  # read by a person
        "Express your answer as a common fraction.",
        "(Express your answer as a fraction.)",
        "Enter your answer as a single value.",
        "(Do not use a calculator!)",
        "Express the result as a decimal.",
    }


@pytest.mark.parametrize("wrapper", [*WRAPPERS, *OTHER_WRAPPERS])
def test_what_is_asked_is_found_in_any_prompt(wrapper: str, shared_dir: Path) -> None:
    texts = real_problems(shared_dir)
    short = sorted(texts, key=len)[:60]
    for text in [*texts[::160], *short, "What is $2+2$?", "Compute 12 * 7"]:
        assert tokens(core(wrapper.format(text))) == tokens(core(text))
        assert tokens(core(wrapper.format(text.upper()))) == tokens(core(text.upper()))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", " Answer in JSON."),
        ("", '\nReturn a JSON object with the keys "reasoning" and "answer".'),
        ("", " Keep your answer under 100 words."),
        ("", " Reason through this one line at a time and finish with the result in bold."),
        ("", "\n\nProvide your final answer inside double square brackets, e.g. [[42]]."),
        ("", " [2 marks]"),
        ("", "\nDifficulty: easy\n/no_think"),
        ("Read the problem carefully and find the answer. ", ""),
        ("You are a helpful and harmless assistant. You should think step-by-step.\n", ""),
        ("You are an experienced tutor for primary school pupils. You never give wrong answers.\n", ""),
        ("You are given a grade school math question. Work it out and report the number.\n", ""),
        ("Act as a math teacher and solve the problem below. ", ""),
        ("Q7: ", ""),
        ("AIME 1985 Problem 5.\n", ""),
        ("[Math]\n", ""),
        ("12. ", ""),
        ('<div class="problem">\n<p>', "</p>\n</div>"),
        ("**Problem.** ", ""),
        ('{"question": "', '"}'),
        ("Q: Tom had 3 cars and got 2. How many?\nA: 3 + 2 = 5. The answer is 5.\n\nQ: ", "\nA:"),
        ("Problem:\nAdd 2 and 3.\nSolution:\n5\n\nProblem:\n", "\nSolution:"),
    ],
)
def test_instructions_in_other_words_labels_tags_and_examples_go(before: str, after: str) -> None:
    for text in ("Ann sold 12 of her 20 pies. How many pies has she left?", "Compute $\\sqrt{16} + 5$ in base 7."):
        assert words(core(before + text + after)) == words(text)


@pytest.mark.parametrize(
    "text",
    [
        "Emma carefully answered each question. Each of 5 answers was right. What is her score?",
        "A mathematician is working on two projects. He has 8 hours for both. How long is each?",
        "Solve: $x^2 = 4$.",
        "Simplify the following expression to a simplified fraction: $6/4$",
        "Tom has 12 pens. Calculate how many questions he answers with 3 pens each.",
        "Think of a number. Double it and add 6. What is the result if the number is 4?",
        "Solve $x + 2 = 5$.",
        "Solve for $t$: $3t = 9$. Express your answer in terms of $t$.",
        "A train needs 3 hours. Give your answer in minutes.",
        "Divide 7 by 3. Round your answer to the nearest tenth.",
        "Let $x^2 = 4$. Find the number of solutions.",
        "Tom answered 12 of 20 questions. How many questions did he not answer?",
        "There are 5 steps. What is the last step?",
        "A problem has 3 parts. How many problems have 12 parts?",
        "What is the answer?",
        "Please explain your answer.",
        "",
        "...",
        "Write 77 in base 5. Write your answer in base 5.",
        "Natalia sold 48 clips in April.\nShe sold half as many in May.\nHow many in all?",
    ],
)
def test_no_part_of_a_problem_goes(text: str) -> None:
    assert core(text) == text


@pytest.mark.parametrize(
    "piece",
    [
        " ",
        "\n",
        "]",
        '."',
        "$a ",
        "step by step. ",
        "Answer: ",
        "\\boxed{",
        "<|",
        ", and put ",
        "Please ",
        ". ",
        "Q: a\nA: b\n",
        '<a b="',
        "a\n",
    ],
)
def test_no_text_takes_long(piece: str) -> None:
    with at_most(cpu_seconds=10):  # a hundredth of it
        core((piece * 60_000)[:60_000])
