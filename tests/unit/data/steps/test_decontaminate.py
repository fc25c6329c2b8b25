"""The step `decontaminate`."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from step_toys import context, entry, record, run_rows

from sft.data.read.outcomes import Dropped, Kept
from sft.data.steps import step_class
from sft.data.steps.decontaminate.benchmark_index import fewest_edits
from sft.data.text.normalize import tokens, words
from sft.utils.errors import UserError

LAYOUT = [
    (r"\\[dt]?frac", [r"\dfrac", r"\tfrac", r"\frac"]),
    (r"\(", ["(", r"\left(", r"\bigl("]),
    (r"\)", [")", r"\right)", r"\bigr)"]),
    (r"\\cdot(?![a-z])", ["·", r"\cdot "]),
    (r"\\leq?(?![a-z])", ["≤", r"\leq ", r"\le "]),
    (r"\\pi(?![a-z])", ["π", r"\pi "]),
    (r"\^\\circ", ["°", r"^{\circ}", r"^\circ "]),
    (r"(?<=\d),(?=\d{3}\b)", [",", "{,}", r",\!", ""]),
    (r"(?<=[a-z])'", ["'", "’"]),
    (r"\+", [" + ", "+", r"\,+\,"]),
    (r" ", [" ", "  ", "\n"]),
    (r"(?<=[a-z])[.,?](?=\s|$)", [".", "", "!", " ..."]),
    (r"\^2(?!\d)", ["²", "^{2}", "^2"]),
]


def relaid(text: str, rng: random.Random) -> str:
    """`text` as another data set would write it: spacing, case, punctuation, macros, dollars."""
    for pattern, forms in LAYOUT:
        text = re.sub(pattern, lambda _, forms=forms: rng.choice(forms), text)
    if rng.random() < 0.5 and "[asy]" not in text:
        text = re.sub(r"\$([^$]+)\$", r"\\(\1\\)", text)
    # Commands must stay as they are; anything else may be shouted.
    return re.sub(r"(\\[a-zA-Z]+)|([a-z]+)", lambda m: m[1] or m[2].upper(), text) if rng.random() < 0.5 else text


def one_changed(text: str, rng: random.Random) -> str | None:
    """`text` with one number or one name (all its places) changed, or None where it has neither."""
    numbers = [match.span() for match in re.finditer(r"(?<![\d.])\d+(?![\d.])", text)]
    names = sorted(set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", text)))
    if names and (not numbers or rng.random() < 0.4):
        return re.sub(rf"\b{rng.choice(names)}\b", "Zebulon", text)
    if not numbers:
        return None
    start, end = rng.choice(numbers)
    return f"{text[:start]}{int(text[start:end]) + rng.randint(1, 90)}{text[end:]}"


def problems(path: Path, column: str) -> list[str]:
    return [json.loads(line)[column] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def math500(shared_dir: Path) -> dict[str, str]:
    return {"name": "math500", "path": str(shared_dir / "data/math500/test.jsonl")}


def dropped_ids(rows: list[Any], place: Path, **settings: Any) -> dict[str, Dropped]:
    outcomes = run_rows("decontaminate", rows, context(place), **settings)
    assert len(outcomes) == len(rows)
    return {outcome.record.id: outcome for outcome in outcomes if isinstance(outcome, Dropped)}


@pytest.mark.parametrize(("change", "least"), [(relaid, 200), (one_changed, 190)])
def test_it_finds_math500_planted_in_gsm8k_train_and_nothing_else(
    tmp_path: Path, shared_dir: Path, math500: dict[str, str], change: Any, least: int
) -> None:
    rng = random.Random(f"{change.__name__}")
    benchmark = problems(shared_dir / "data/math500/test.jsonl", "problem")
    planted: dict[str, str] = {}
    for number in rng.sample(range(len(benchmark)), len(benchmark)):
        text = change(benchmark[number], rng)
        if text is not None and text != benchmark[number] and len(planted) < 200:
            planted[f"planted {number}"] = text
    clean = problems(shared_dir / "data/gsm8k/train.jsonl", "question")
    rows = [record(text, None, id=f"clean {number}") for number, text in enumerate(clean)]
    rows += [record(text, None, id=name) for name, text in planted.items()]
    rng.shuffle(rows)
    dropped = dropped_ids(rows, tmp_path, against=[math500])

    found = [name for name in dropped if name in planted]
    assert len(planted) == 200 and len(found) >= least
    assert len(dropped) - len(found) < 0.001 * len(clean)
    ids = [json.loads(line)["unique_id"] for line in Path(math500["path"]).read_text(encoding="utf-8").splitlines()]
    right = 0
    for name in found:
        outcome = dropped[name]
        facts = outcome.record.facts["decontaminate"]
        assert outcome.reason == "contaminated" and outcome.detail.startswith(f"math500:{facts['row']}: similarity ")
        right += facts["row"] == ids[int(name.split()[1])]
    # A changed number may make of one problem nearly another of the 500; of the 200 that is seldom so.
    assert right >= 0.98 * len(found)


def test_of_clean_gsm8k_train_only_near_copies_of_the_test_problems_go(tmp_path: Path, shared_dir: Path) -> None:
    clean = problems(shared_dir / "data/gsm8k/train.jsonl", "question")
    benchmark = {"name": "gsm8k", "path": str(shared_dir / "data/gsm8k/test.jsonl")}
    rows = [record(text, None, id=str(number)) for number, text in enumerate(clean)]
    began = time.process_time()
    dropped = dropped_ids(rows, tmp_path, against=[benchmark])
    assert len(rows) / (time.process_time() - began) > 2000  # a second of one core, the index included
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
    began = time.process_time()
    words(text), tokens(text)
    assert time.process_time() - began < 1  # a fiftieth of it; quadratic work takes many seconds


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
