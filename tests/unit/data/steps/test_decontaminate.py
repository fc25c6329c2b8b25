"""The step `decontaminate`."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cpu_limit import at_most
from planted_edits import QUOTED, changed, layout
from pydantic import ValidationError
from step_toys import context, entry, record, run_rows

from sft.data.read.outcomes import Dropped, Kept
from sft.data.steps import step_class
from sft.data.steps.decontaminate.benchmark_index import fewest_edits
from sft.data.text.normalize import tokens, words
from sft.utils.errors import UserError


def problems(path: Path, column: str) -> list[str]:
    return [json.loads(line)[column] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def math500(shared_dir: Path) -> dict[str, str]:
    return {"name": "math500", "path": str(shared_dir / "data/math500/test.jsonl")}


def dropped_ids(rows: list[Any], place: Path, **settings: Any) -> dict[str, Dropped]:
    outcomes = run_rows("decontaminate", rows, context(place), **settings)
    assert len(outcomes) == len(rows)
    return {outcome.record.id: outcome for outcome in outcomes if isinstance(outcome, Dropped)}


@pytest.fixture(scope="module")
def gsm8k(shared_dir: Path) -> dict[str, str]:
    return {"name": "gsm8k", "path": str(shared_dir / "data/gsm8k/test.jsonl")}


def found_of_each_edit(texts: list[str], benchmark: dict[str, str], place: Path) -> Counter[tuple[str, bool]]:
    """Of each edit of the benchmark's texts: how many (are found, are not)."""
    rows = [
        record(change, None, id=f"{number} {edit}")
        for number, text in enumerate(texts)
        for edit, change in changed(text, QUOTED, "quoted")
    ]
    random.Random(0).shuffle(rows)
    dropped = dropped_ids(rows, place, against=[benchmark])
    for name, outcome in dropped.items():
        facts = outcome.record.facts["decontaminate"]
        assert outcome.reason == "contaminated"
        assert outcome.detail.startswith(f"{benchmark['name']}:{facts['row']}: similarity ")
        assert name.split()[1] in {edit.__name__ for edit in QUOTED}
    return Counter((row.id.split()[1], row.id in dropped) for row in rows)


def check_found(found: Counter[tuple[str, bool]]) -> None:
    for edit in QUOTED:
        right, missed = found[edit.__name__, True], found[edit.__name__, False]
        assert right >= 0.97 * (right + missed), (edit.__name__, right, missed)
    right = sum(count for (_, is_found), count in found.items() if is_found)
    assert right >= 0.995 * sum(found.values()), found


def test_benchmark_problems_are_found_however_they_are_changed(
    tmp_path: Path, shared_dir: Path, gsm8k: dict[str, str], math500: dict[str, str]
) -> None:
    math = problems(shared_dir / "data/math500/test.jsonl", "problem")
    school = problems(shared_dir / "data/gsm8k/test.jsonl", "question")
    short = [text for text in math if len(words(text)) < 8]
    assert len(short) > 10
    found = found_of_each_edit(math[::4] + short, math500, tmp_path)
    check_found(found + found_of_each_edit(school[::12], gsm8k, tmp_path))


@pytest.mark.slow
def test_benchmark_problems_are_found_at_full_size(
    tmp_path: Path, shared_dir: Path, gsm8k: dict[str, str], math500: dict[str, str]
) -> None:
    found = found_of_each_edit(problems(shared_dir / "data/math500/test.jsonl", "problem"), math500, tmp_path)
    found += found_of_each_edit(problems(shared_dir / "data/gsm8k/test.jsonl", "question"), gsm8k, tmp_path)
    for edit in QUOTED:
        print(f"{edit.__name__:24} {found[edit.__name__, True]:6} missed {found[edit.__name__, False]:4}")
    check_found(found)


def test_of_what_is_quoted_the_right_problem_is_named(
    tmp_path: Path, shared_dir: Path, math500: dict[str, str]
) -> None:
    texts = problems(shared_dir / "data/math500/test.jsonl", "problem")
    ids = problems(shared_dir / "data/math500/test.jsonl", "unique_id")
    rows = [record(layout(text, random.Random(n)), None, id=str(n)) for n, text in enumerate(texts)]
    dropped = dropped_ids(rows, tmp_path, against=[math500])
    named = [dropped[str(n)].record.facts["decontaminate"]["row"] == name for n, name in enumerate(ids)]
    assert sum(named) >= 0.99 * len(ids)  # a few of the 500 are nearly the same


def test_of_clean_gsm8k_train_nothing_is_a_problem_of_math500(
    tmp_path: Path, shared_dir: Path, math500: dict[str, str]
) -> None:
    clean = problems(shared_dir / "data/gsm8k/train.jsonl", "question")
    rows = [record(text, None, id=str(number)) for number, text in enumerate(clean)]
    assert not dropped_ids(rows, tmp_path, against=[math500])


@pytest.mark.parametrize("text", ["{gsm8k}", "of the ", "a ", "x = 1 + ", "{one} "])
def test_the_work_grows_with_the_length_of_the_prompt(
    tmp_path: Path, shared_dir: Path, gsm8k: dict[str, str], math500: dict[str, str], text: str
) -> None:
    """Of 23,000 words: prose of the same kind as the benchmark's, hostile repetitions, a benchmark's problem itself."""
    other = " ".join(problems(shared_dir / "data/gsm8k/train.jsonl", "question")[:500])
    one = problems(shared_dir / "data/gsm8k/test.jsonl", "question")[0]
    piece = text.format(gsm8k=other, one=one)
    repeated = " ".join((piece * (23_000 // len(piece.split()) + 1)).split()[:23_000])
    step = step_class("decontaminate")(entry("decontaminate", against=[gsm8k, math500]).config, context(tmp_path))
    row = record(repeated, None, id="long")
    with at_most(cpu_seconds=10):  # a sixtieth of it; when every problem is tried on all of it, many times more
        list(step([row]))  # type: ignore[operator]


def test_of_clean_gsm8k_train_only_near_copies_of_the_test_problems_go(
    tmp_path: Path, shared_dir: Path, gsm8k: dict[str, str]
) -> None:
    clean = problems(shared_dir / "data/gsm8k/train.jsonl", "question")
    rows = [record(text, None, id=str(number)) for number, text in enumerate(clean)]
    dropped = dropped_ids(rows, tmp_path, against=[gsm8k])
    assert 0 < len(dropped) < 0.001 * len(clean)
    # Read by a person: all are test problems with other numbers and names. One of them:
    stamps = [outcome for outcome in dropped.values() if "Bella bought stamps" in (outcome.record.problem or "")]
    assert [outcome.record.facts["decontaminate"]["row"] for outcome in stamps] == ["test.jsonl:633"]
    assert "Max bought stamps" in stamps[0].detail


@pytest.mark.parametrize("prefix", ["", "Solve step by step and put the answer in a box. Be careful with units! "])
def test_a_problem_within_a_longer_prompt_is_found_though_a_name_differs(tmp_path: Path, prefix: str) -> None:
    benchmark = write(tmp_path, ["Max bought 16 stamps at the post office and lost 3 of them. How many has he left?"])
    copy = prefix + "Ann bought 16 stamps at the post office and lost 3 of them. How many has he left? Think first."
    assert dropped_ids([record(copy, None, id="copy")], tmp_path, against=[benchmark])


def test_half_a_problem_is_found_and_less_is_not(tmp_path: Path) -> None:
    problem = (
        "A farmer sold 16 brown hens on Monday and then he bought 9 white geese for his pond. How many birds were it?"
    )
    benchmark = write(tmp_path, [problem, "Find the least prime above one hundred that divides it."])
    parts = {
        "half": "A farmer sold 16 brown hens on Monday and then he bought. Tell me who he is.",
        "other half": "Well, 9 white geese for his pond. How many birds were it? Do we know?",
        "of a short one": "Find the least prime above one hundred",
        "less": "A farmer sold 16 brown hens. Tell me who he is and where he lives.",
        "words": "Of the farmer it was said that he bought hens and sold geese for his pond on Monday and then",
    }
    rows = [record(text, None, id=name) for name, text in parts.items()]
    assert set(dropped_ids(rows, tmp_path, against=[benchmark])) == {"half", "other half", "of a short one"}


def test_problems_of_a_few_words_are_found_in_a_prompt_and_with_another_number(tmp_path: Path) -> None:
    benchmark = write(tmp_path, [r"Compute $\tan 60^\circ$.", "What is the sum of the digits of 2024?"])
    texts = [
        "Solve the following math problem. Compute $\\tan 60^\\circ$. Put your final answer within \\boxed{}.",
        "Question: Compute $\\tan 45^\\circ$.\nAnswer:",
        "You are a helpful assistant. What is the sum of the digits of 2025? Let's think step by step.",
    ]
    rows = [record(text, None, id=str(number)) for number, text in enumerate(texts)]
    rows += [record(text, None, id="other") for text in ("Expand $(x + 242)^2$.", "What is the sum of the primes?")]
    assert set(dropped_ids(rows, tmp_path, against=[benchmark])) == {"0", "1", "2"}


def test_problems_of_a_few_words_match_whole_problems_only(tmp_path: Path) -> None:
    benchmark = write(tmp_path, [r"Compute $\sin 60^\circ$ exactly."])
    rows = [
        record("COMPUTE sin(60°), exactly", None, id="same"),
        record("compute \\(\\sin 45^{\\circ}\\) exactly", None, id="other number"),
        record(
            "First compute sin 60° exactly, then find the area of the triangle with sides 3 and 5.", None, id="part"
        ),
        record("Name the capital of France.", None, id="other"),
    ]
    assert set(dropped_ids(rows, tmp_path, against=[benchmark])) == {"same", "other number"}


def test_a_problem_quoted_in_a_trace_is_found_with_also_text(tmp_path: Path) -> None:
    quoted = "A plane travels 1200 miles in 3 hours. How many more hours would it take to travel 2000 miles?"
    benchmark = write(tmp_path, [quoted])
    rows = [record("Give an example of a rate problem.", f"<think>hm</think> Here is one: {quoted} Done.", id="a")]
    assert not dropped_ids(rows, tmp_path, against=[benchmark])
    assert set(dropped_ids(rows, tmp_path, against=[benchmark], also_text=True)) == {"a"}


def test_rows_without_a_problem_are_compared_by_their_text(tmp_path: Path) -> None:
    benchmark = write(tmp_path, ["How many stamps has Max after he lost 3 of his 16 stamps?"])
    row = record("Go on.", "How many stamps has Max after he lost 3 of his 16 stamps? Let me see.", id="a")
    row.problem = None
    assert set(dropped_ids([row], tmp_path, against=[benchmark])) == {"a"}


def write(folder: Path, texts: list[str], column: str = "problem") -> dict[str, str]:
    path = folder / "benchmark.jsonl"
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return {"name": "bench", "path": str(path)}


def test_the_identity_is_that_of_the_benchmarks_content(tmp_path: Path) -> None:
    settings = {"against": [write(tmp_path, ["What is one and one?"])]}
    step = step_class("decontaminate")
    before = step.identity(entry("decontaminate", **settings).config)
    write(tmp_path, ["What is one and two?"])
    assert json.dumps(before) != json.dumps(step.identity(entry("decontaminate", **settings).config))


@pytest.mark.parametrize(
    ("lines", "column", "says"),
    [
        ('{"task": "2+2?"}\n', None, "none of the columns problem, question"),
        ('{"problem": "2+2?"}\n', "question", "no column 'question'; it has problem"),
        ('{"problem": "2+2?"}\n{"problem": null}\n', None, r"benchmark.jsonl:2: 'problem' holds no problem"),
        ('{"problem": "2+2?"}\n{"prob\n', None, r"benchmark.jsonl:2 can't be read"),
        ("", None, "has no rows"),
    ],
)
def test_a_benchmark_that_cant_be_read_whole_is_one_clear_sentence(
    tmp_path: Path, lines: str, column: str | None, says: str
) -> None:
    (tmp_path / "benchmark.jsonl").write_text(lines, encoding="utf-8")
    benchmark = {"name": "bench", "path": str(tmp_path / "benchmark.jsonl"), "column": column}
    with pytest.raises(UserError, match=says) as error:
        step_class("decontaminate").identity(entry("decontaminate", against=[benchmark]).config)
    assert "\n" not in str(error.value) and "bench" in str(error.value)


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="two benchmarks are called 'b'"):
        entry("decontaminate", against=[{"name": "b", "path": "x"}, {"name": "b", "path": "y"}])
    with pytest.raises(ValidationError, match="against"):
        entry("decontaminate", against=[])


def test_kept_rows_are_as_they_were(tmp_path: Path) -> None:
    benchmark = write(tmp_path, ["How many stamps has Max after he lost 3 of his 16 stamps?"])
    (outcome,) = run_rows("decontaminate", [record(id="a")], context(tmp_path), against=[benchmark])
    assert isinstance(outcome, Kept) and outcome.record == record(id="a")


@pytest.mark.parametrize(
    "text", ["[asy]" * 20_000, "1." + "01" * 20_000 + "0", r"\frac{1}{" * 3000, "(" * 50_000, "1," * 20_000]
)
def test_no_text_takes_long_to_normalize(text: str) -> None:
    with at_most(cpu_seconds=10):
        words(text), tokens(text)


def edits_by_definition(pattern: str, text: str, passage: bool) -> int:
    row = list(range(len(pattern) + 1))
    best = row[-1]
    for column, sign in enumerate(text, start=1):
        new = [0 if passage else column]
        for place, wanted in enumerate(pattern, start=1):
            new.append(min(new[-1] + 1, row[place] + 1, row[place - 1] + (sign != wanted)))
        row = new
        best = min(best, row[-1])
    return best if passage else row[-1]


def test_fewest_edits_are_those_of_the_edit_matrix() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        pattern = "".join(rng.choices("abc", k=rng.randint(1, 9)))
        text = "".join(rng.choices("abcd", k=rng.randint(0, 14)))
        for passage in (False, True):
            assert fewest_edits(pattern, text, passage=passage) == edits_by_definition(pattern, text, passage)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"compute $\dfrac{1}{2}+\left(x\right)$", r"Compute \(\frac12 + x\)!"),
        ("1,000 apples cost $5.00", r"1{,}000 apples cost \$5"),
        (r"$1,\!000$", "1000"),
        ("Janet’s ducks don’t — ever", "janet's ducks don't - ever"),
        ("f'(x)", r"f^{\prime}(x)"),
        ("10² + x²", "$10^{2}+x^2$"),
        (r"5\text{ cm}", r"5 \mathrm{cm}"),
        (r"\sin{60^\circ}", "sin(60°)"),
        (r"$\dfrac{\sqrt{3}}2$", r"\frac{\sqrt 3}{2}"),
        (r"$0 \le x < 2\pi$", "0 ≤ x < 2π"),
        ("ﬁve 5\u200b0 ＡＢ", "5 50 ab"),
        (r"\(.5\)", "0.50"),
    ],
)
def test_two_ways_to_write_the_same_have_the_same_words(one: str, other: str) -> None:
    assert words(one) == words(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a+b", "a-b"),
        (r"a \times b", r"a \cdot b"),
        ("x < 3", "x <= 3"),
        ("(a+b)c", "a+bc"),
        ("3 and 5", "3.5"),
        ("-3", "3"),
        ("x^{2y}", "x^2y"),
        ("3.05", "3.5"),
    ],
)
def test_different_formulas_have_different_tokens(one: str, other: str) -> None:
    assert tokens(one) != tokens(other)
