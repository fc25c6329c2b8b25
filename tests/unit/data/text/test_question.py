"""What is asked, without what is said around it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from planted_edits import OTHER_WRAPPERS, WRAPPERS

from sft.data.text.normalize import tokens
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
    }


@pytest.mark.parametrize("wrapper", [*WRAPPERS, *OTHER_WRAPPERS])
def test_what_is_asked_is_found_in_any_prompt(wrapper: str, shared_dir: Path) -> None:
    texts = real_problems(shared_dir)
    short = sorted(texts, key=len)[:60]
    for text in [*texts[::160], *short, "What is $2+2$?", "Compute 12 * 7"]:
        assert tokens(core(wrapper.format(text))) == tokens(core(text))
        assert tokens(core(wrapper.format(text.upper()))) == tokens(core(text.upper()))


@pytest.mark.parametrize(
    "text",
    [
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
    [" ", "\n", "]", '."', "$a ", "step by step. ", "Answer: ", "\\boxed{", "<|", ", and put ", "Please ", ". "],
)
def test_no_text_takes_long(piece: str) -> None:
    began = time.process_time()
    core((piece * 60_000)[:60_000])
    assert time.process_time() - began < 1  # a tenth of it; quadratic work takes many seconds
