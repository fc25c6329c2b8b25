"""The step `dedup`."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cpu_limit import at_most
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted_edits import ANOTHER, SAME, WRAPPERS, Edit, changed
from pydantic import ValidationError
from step_toys import context, entry, record, run_table

from sft.data.read.outcomes import Dropped
from sft.data.read.record import Record
from sft.data.steps import step_class
from sft.data.steps.base import verdict_schema
from sft.data.steps.dedup import minhash
from sft.data.steps.dedup.same_problem import same_problem
from sft.data.text.normalize import as_spelled


def row(problem: str, name: str, source: str = "a", **fields: Any) -> Record:
    fields.setdefault("problem_id", name)
    return record(problem, fields.pop("completion", None), id=name, source=source, **fields)


def fates(rows: list[Record], place: Path, **settings: Any) -> tuple[set[str], dict[str, Dropped]]:
    kept, dropped = run_table("dedup", rows, context(place), **settings)
    assert len(kept) + len(dropped) == len(rows)
    assert pq.read_schema(place / "verdicts.parquet").equals(verdict_schema())
    return {item.id for item, _ in kept}, {item.record.id: item for item in dropped}


def lines(path: Path, column: str) -> list[str]:
    return [json.loads(line)[column] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def real(shared_dir: Path) -> list[str]:
    rng = random.Random(11)
    gsm8k = rng.sample(lines(shared_dir / "data/gsm8k/train.jsonl", "question"), 2000)
    math = [text for text in lines(shared_dir / "data/math500/test.jsonl", "problem") if "[asy]" not in text]
    return gsm8k + math


@pytest.fixture(scope="module")
def planted(real: list[str]) -> tuple[list[Record], Counter[str]]:
    """Real problems, of some a near-copy, of some another problem made from it; how many of each edit."""
    rows, made = [], Counter[str]()
    for number, text in enumerate(real):
        rows.append(row(text, f"{number}", "real"))
        edits, source = (SAME, "same") if number % 2 else (ANOTHER, "another")
        changes = changed(text, edits, "one")
        if changes:
            edit, change = changes[number // 2 % len(changes)]
            rows.append(row(change, f"{number} {edit}", source))
            made[source] += 1
    return rows, made


def test_planted_near_copies_are_found_and_problems_from_one_template_are_kept(
    tmp_path: Path, planted: tuple[list[Record], Counter[str]]
) -> None:
    rows, made = planted
    assert made["same"] > 1100 and made["another"] > 1000
    _, dropped = fates(rows, tmp_path, prefer=["real"])
    right = {
        name
        for name, item in dropped.items()
        if item.record.source == "same" and f" {name.split()[0]} (" in item.record.facts["dedup"]["kept"]
    }
    assert len(right) >= 0.98 * made["same"]
    # Real problems that are copies of each other are right too: there is at most a handful, read by a person.
    wrong = [name for name in dropped if name not in right]
    assert len(wrong) <= 0.002 * len(rows), wrong
    reasons = Counter(item.reason for item in dropped.values())
    assert set(reasons) <= {"duplicate", "near_duplicate"} and reasons["near_duplicate"] > 300


def found_of_each_edit(texts: list[str], edits: Sequence[Edit], place: Path) -> dict[str, tuple[int, int]]:
    """Of each edit: how many changed texts go as copies of what they were made from, of how many."""
    changes = [(number, *change) for number, text in enumerate(texts) for change in changed(text, edits, "all")]
    found = {}
    for edit in edits:
        rows = [row(text, f"{number}", "real") for number, text in enumerate(texts)]
        rows += [row(text, f"{number} x", "made") for number, name, text in changes if name == edit.__name__]
        _, dropped = fates(rows, place, prefer=["real"])
        right = [
            name for name, item in dropped.items() if f"real {name.split()[0]} (" in item.record.facts["dedup"]["kept"]
        ]
        found[edit.__name__] = (len(right), len(rows) - len(texts))
    return found


def check_found(same: dict[str, tuple[int, int]], another: dict[str, tuple[int, int]]) -> None:
    assert all(right >= 0.95 * made for right, made in same.values() if made > 20), same
    assert sum(right for right, _ in same.values()) >= 0.98 * sum(made for _, made in same.values()), same
    assert all(wrong <= 0.02 * made + 1 for wrong, made in another.values()), another
    assert sum(wrong for wrong, _ in another.values()) <= 0.003 * sum(made for _, made in another.values()), another


def test_each_way_to_write_the_same_is_found_and_no_way_to_ask_another(tmp_path: Path, real: list[str]) -> None:
    texts = real[:120] + real[-120:]
    check_found(found_of_each_edit(texts, SAME, tmp_path), found_of_each_edit(texts, ANOTHER, tmp_path))


@pytest.mark.slow
def test_each_way_to_write_the_same_is_found_at_full_size(tmp_path: Path, shared_dir: Path) -> None:
    texts = lines(shared_dir / "data/gsm8k/train.jsonl", "question")
    texts += lines(shared_dir / "data/gsm8k/test.jsonl", "question")
    texts += lines(shared_dir / "data/math500/test.jsonl", "problem")
    same, another = found_of_each_edit(texts, SAME, tmp_path), found_of_each_edit(texts, ANOTHER, tmp_path)
    for name, (found, made) in {**same, **another}.items():
        print(f"{name:24} {found:6} of {made:6}")
    check_found(same, another)


def test_with_any_difference_problems_from_one_template_go_too(
    tmp_path: Path, planted: tuple[list[Record], Counter[str]]
) -> None:
    rows, _ = planted
    _, dropped = fates(rows[:1000], tmp_path, prefer=["real"], differences="any")
    assert Counter(item.record.source for item in dropped.values())["another"] > 100


STORY = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many in all?"
)


def test_copies_by_writing_are_duplicates_across_sources_and_the_preferred_stays(tmp_path: Path) -> None:
    rows = [
        row(STORY, "plain", "a"),
        row(STORY.upper().replace(",", " "), "shouted", "b"),
        row(STORY.replace("friends", "pals"), "pals", "c"),
        row("What is 12 + 7?", "sum 7", "a"),
        row("What is 12 + 8?", "sum 8", "b"),
    ]
    kept, dropped = fates(rows, tmp_path, prefer=["b", "a"])
    assert kept == {"shouted", "sum 7", "sum 8"}
    assert {name: item.reason for name, item in dropped.items()} == {"plain": "duplicate", "pals": "near_duplicate"}
    assert dropped["plain"].detail == "copy of b shouted (toy.jsonl:shouted), similarity 1.00"
    assert dropped["pals"].record.facts["dedup"]["kept"] == "b shouted (toy.jsonl:shouted)"
    assert 0.65 <= dropped["pals"].record.facts["dedup"]["similarity"] < 1
    assert rows[1].facts["dedup"] == {"copies": 2} and "dedup" not in rows[3].facts


def test_exact_keeps_near_copies(tmp_path: Path) -> None:
    rows = [row(STORY, "1"), row(STORY.lower(), "2"), row(STORY.replace("friends", "pals"), "3")]
    _, dropped = fates(rows, tmp_path, method="exact")
    assert [item.reason for item in dropped.values()] == ["duplicate"] and "3" not in dropped


@pytest.mark.parametrize(("then", "kept"), [("longest", {"b0", "b1"}), ("shortest", {"a0", "a1"})])
def test_all_answers_of_a_problem_stay_or_go_together(tmp_path: Path, then: str, kept: set[str]) -> None:
    rows = [
        row(STORY, f"{name}{n}", problem_id=f"problem {name}", completion="so " * (length + n))
        for name, length in (("a", 5), ("b", 50))
        for n in range(2)
    ]
    assert fates(rows, tmp_path, then=then)[0] == kept


def test_by_text_each_row_stands_for_itself(tmp_path: Path, shared_dir: Path) -> None:
    rng = random.Random(0)
    solutions = lines(shared_dir / "data/math500/test.jsonl", "solution")
    long = [text for text in solutions if len(text.split()) > 120][:60]
    rows = [row("Solve.", f"{number}", problem_id="one", completion=text) for number, text in enumerate(long)]
    for number, text in enumerate(long):
        words = text.split(" ")
        words[rng.randrange(len(words))] = "indeed"
        rows.append(row("Solve.", f"{number} edited", "b", problem_id="one", completion=" ".join(words)))
    kept, dropped = fates(rows, tmp_path, by="text", threshold=0.8, prefer=["a"])
    assert kept == {str(number) for number in range(60)} and len(dropped) == 60
    # Other answers to the same problems are no near-copies.
    rollouts = [json.loads(line) for line in (shared_dir / "data/gsm8k/rollouts.jsonl").read_text().splitlines()]
    answers = {f"{n} {m}": item[m]["solution"] for n, item in enumerate(rollouts[:200]) for m in ("6b_verification",)}
    rows = [row(rollouts[int(name.split()[0])]["question"], name, completion=text) for name, text in answers.items()]
    assert not fates(rows, tmp_path / "rollouts", by="text", threshold=0.8)[1]


def test_nothing_is_dropped_for_a_text_that_is_dropped_itself(tmp_path: Path) -> None:
    """A chain: 2 is near 1, 3 is near 2 but not 1. Without 2, 3 stays."""
    stem = "alpha beta gamma delta epsilon zeta theta kappa lambda omega sigma river"
    chain = [f"{stem} stone cloud maple", f"{stem} ocean field tower"]
    chain.append(chain[1].replace("alpha beta", "piano violin"))
    shingles = [minhash.kept_shingles(minhash.shingles(minhash.characters(text), 5)) for text in chain]
    threshold = 0.6
    near = [minhash.jaccard(shingles[one], shingles[two]) >= threshold for one, two in ((0, 1), (1, 2), (0, 2))]
    assert near == [True, True, False]
    rows = [row(text, f"{number}", f"s{number}") for number, text in enumerate(chain)]
    kept, dropped = fates(rows, tmp_path, threshold=threshold, prefer=["s0", "s1", "s2"], differences="any")
    assert kept == {"0", "2"} and set(dropped) == {"1"}
    # What is exactly like a dropped near-copy goes with it, for the same reason.
    copy = row(chain[1].upper(), "copy", "s3")
    kept, dropped = fates([*rows, copy], tmp_path, threshold=threshold, prefer=["s0", "s1", "s2"], differences="any")
    assert kept == {"0", "2"} and dropped["copy"].reason == "near_duplicate"
    assert dropped["copy"].record.facts["dedup"]["kept"].startswith("s0 0 ")


def test_rows_without_a_problem_stay(tmp_path: Path) -> None:
    rows = [row("?", f"{number}") for number in range(2)] + [row("x", f"none {number}") for number in range(2)]
    for item in rows[2:]:
        item.problem = None
    assert not fates(rows, tmp_path)[1]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.randoms(use_true_random=False), shards=st.sampled_from([1, 3]))
def test_the_result_does_not_depend_on_order_or_shards(
    tmp_path: Path, planted: tuple[list[Record], Counter[str]], order: random.Random, shards: int
) -> None:
    rows = planted[0][:240] + [row(item.problem or "", item.id, "copy") for item in planted[0][:30]]

    def result(ordered: list[Record], shards: int) -> dict[tuple[str, str], tuple[str, str, str]]:
        for item in ordered:
            item.facts.clear()
        kept, dropped = run_table("dedup", ordered, context(tmp_path), shards=shards)
        fates = {(item.source, item.id): ("", "", json.dumps(item.facts)) for item, _ in kept}
        for item in dropped:
            key = (item.record.source, item.record.id)
            fates[key] = (item.reason, item.detail, json.dumps(item.record.facts))
        return fates

    shuffled = list(rows)
    order.shuffle(shuffled)
    expected = result(rows, 1)
    assert sum(bool(reason) for reason, _, _ in expected.values()) > 50
    assert result(shuffled, shards) == expected


@pytest.mark.parametrize("method", ["exact", "minhash"])
def test_no_rows_and_rows_without_words_are_no_trouble(tmp_path: Path, method: str) -> None:
    assert fates([], tmp_path, method=method) == (set(), {})
    rows = [row("", "empty"), row("...", "dots"), row(STORY, "story")]
    assert fates(rows, tmp_path, method=method, shards=5)[0] == {"empty", "dots", "story"}


def test_rows_without_a_problem_id_are_not_one_problem(tmp_path: Path) -> None:
    rows = [row(STORY, "1", problem_id=""), row(STORY, "2", problem_id=""), row("Who?", "3", problem_id="")]
    assert len(fates(rows, tmp_path)[1]) == 1


def test_verdicts_are_sorted_and_of_dropped_rows_and_those_they_stand_for(tmp_path: Path) -> None:
    rows = [row(STORY, f"{number}") for number in range(5)] + [row("Another question?", "x")]
    fates(rows, tmp_path)
    verdicts = pq.read_table(tmp_path / "verdicts.parquet").to_pylist()
    assert [verdict["row"] for verdict in verdicts] == [0, 1, 2, 3, 4]
    assert sorted(verdict["copies"] for verdict in verdicts) == [0, 0, 0, 0, 1]


CHILD = """
import resource, sys
from pathlib import Path
from sft.data.steps import sql
from sft.data.steps.dedup.decision import decide
sql.MEMORY_LIMIT = "200MB"
folder = Path(sys.argv[1])
(folder / "scratch").mkdir()
decide(sorted(folder.glob("sketch-*.parquet")), folder / "verdicts.parquet", folder / "scratch", 0.65)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def sketches(folder: Path, count: int) -> int:
    """Write sketches of `count` problems, of which a tenth are near-copies of others; returns how many those are."""
    folder.mkdir()
    step = step_class("dedup")(entry("dedup").config, context(folder))
    rng = np.random.default_rng(count)
    vocabulary = ["".join(rng.choice(list("bcdfglmnprst"), 6)) for _ in range(20_000)]
    copies = 0
    for start in range(0, count, 5000):
        batch: list[Record] = []
        for number in range(start, start + 5000):
            words = [vocabulary[place] for place in rng.integers(0, len(vocabulary), 40)]
            if number % 10 == 9:
                words = (batch[int(rng.integers(0, len(batch)))].problem or "").split()
                words[5] = "replaced"
                copies += 1
            batch.append(row(" ".join(words), str(number)))
        table = step.sketch(batch)  # type: ignore[attr-defined]
        numbers = pa.array(range(start, start + 5000), pa.int64())
        pq.write_table(table.add_column(0, "row", numbers), folder / f"sketch-{start:09}.parquet")
    return copies


@pytest.mark.slow
def test_memory_stays_flat_as_the_rows_grow(tmp_path: Path) -> None:
    peaks = {}
    for count in (5_000, 50_000):
        copies = sketches(tmp_path / str(count), count)
        command = [sys.executable, "-c", CHILD, str(tmp_path / str(count))]
        peaks[count] = float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
        reasons = pq.read_table(tmp_path / str(count) / "verdicts.parquet")["reason"].drop_null()
        # A few of the copies are copies of copies.
        assert 0.99 * copies <= len(reasons) <= copies
    # DuckDB uses its limit where it can; Python's part must not grow.
    assert peaks[50_000] < peaks[5_000] + 250, peaks


def test_a_crowd_from_one_template_costs_time_in_proportion(tmp_path: Path) -> None:
    """All in the same buckets, none alike: the pairs would be a million."""
    rng = random.Random(0)
    rows = [
        row(
            f"Tom bought {rng.randint(1, 10**6)} apples and {rng.randint(1, 10**6)} pears at the shop. How many?",
            f"{n}",
        )
        for n in range(1500)
    ]
    calls = 0
    original = minhash.jaccard

    def counted(*sets: Any) -> float:
        nonlocal calls
        calls += 1
        return min(original(*sets), 0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft.data.steps.dedup.decision.jaccard", counted)
        assert not fates(rows, tmp_path, differences="any")[1]
    assert 1000 < calls <= 64 * len(rows)


def test_bands_find_pairs_at_the_threshold_as_often_as_they_say() -> None:
    bands = minhash.bands_for(0.7)
    assert bands.probability(0.7) >= 0.99 and bands.count * bands.width <= minhash.PERMUTATIONS
    rng = np.random.default_rng(0)
    found = {0.7: 0, 0.3: 0}
    for similarity in found:
        for _ in range(300):
            shared = round(2 * 400 * similarity / (1 + similarity))
            pool = rng.integers(0, 2**63, 800 - shared, np.int64).astype(np.uint64)
            keys = minhash.band_keys([pool[:400], pool[400 - shared :]], bands, [0, 0])
            found[similarity] += bool((keys[0] == keys[1]).any())
            other_salt = minhash.band_keys([pool[:400], pool[:400]], bands, [0, 1])
            assert not (other_salt[0] == other_salt[1]).any()
    assert found[0.7] >= 0.97 * 300
    assert abs(found[0.3] / 300 - bands.probability(0.3)) < 0.06


@pytest.mark.parametrize(("size", "error"), [(300, 1e-9), (20_000, 0.05)])
def test_jaccard_is_exact_for_short_texts_and_near_for_long_ones(size: int, error: float) -> None:
    rng = np.random.default_rng(1)
    pool = np.unique(rng.integers(0, 2**64, 2 * size, np.uint64))
    rng.shuffle(pool)
    one, other = np.sort(pool[:size]), np.sort(pool[size // 4 : size // 4 + size])
    true = len(np.intersect1d(one, other)) / len(np.union1d(one, other))
    assert minhash.jaccard(minhash.kept_shingles(one), minhash.kept_shingles(other)) == pytest.approx(true, abs=error)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Tom has 5 apples and 3 pears.", "Tom has 5 aples and 3 pears.", True),
        ("Tom has 5 apples and 3 pears.", "Ann has five apples and 3 pears!", True),
        ("Tom has 5 apples and 3 pears.", "Tom has 3 apples and 5 pears.", False),
        ("Tom has 5 more apples.", "Tom has 5 mroe apples.", True),
        ("Tom has 5 more apples.", "Tom has 5 fewer apples.", False),
        ("Tom and Ann ate. How much did Tom eat?", "Tom and Ann ate. How much did Ann eat?", False),
        ("Tom gave Ann 5 pears.", "Ann gave Tom 5 pears.", False),
        ("How long in hours?", "How long in minutes?", False),
        ("He runs 3 hours, then 2 hours.", "He runs 3 hours, then 2 huors.", True),
        ("He runs three hours.", "He runs thre hours.", True),
        ("He runs twice a day.", "He runs two times a day.", True),
        ("He runs every day.", "He runs every other day.", False),
        ("It costs $5.", "It costs 5 dollars.", True),
        ("It costs $5.", "It costs 5 cents.", False),
        ("It costs $5.", "It costs £5.", False),
        ("It is 5% off.", "It is five percent off.", True),
        ("It doesn't fit 3 cars.", "It does not fit 3 cars.", True),
        ("It doesn't fit 3 cars.", "It does fit 3 cars.", False),
        ("Tom has 5. Ann has 3. How many?", "Ann has 3. Tom has 5. How many?", True),
        ("Tom has 5. Ann has 3. How many?", "Tom has 3. Ann has 5. How many?", False),
        ("How many more has he?", "How many has he altogether?", False),
        ("The largest of 3 numbers.", "The greatest of 3 numbers.", True),
        ("Tom ate 5 green apples.", "Tom ate 5 greenapples.", True),
        ("Tom ate 5 green apples.", "Tom ate 5 gre-\nen apples.", True),
        ("He has 5 remaining.", "He has 5 leftover.", True),
        ("How much did he spend of 5?", "How much did he save of 5?", False),
        ("The largest of 3 numbers.", "The smallest of 3 numbers.", False),
        (r"Solve $\sin x = 1$.", r"Solve $\cos x = 1$.", False),
        (r"Solve $x+1=2$.", r"Solve $y+1=2$.", False),
        (r"Find $a \le b$.", r"Find $a < b$.", False),
    ],
)
def test_same_problem(one: str, other: str, same: bool) -> None:
    ours, theirs = as_spelled(one), as_spelled(other)
    assert same_problem(ours, theirs) == same_problem(theirs, ours) == same


def test_the_work_of_a_comparison_grows_with_the_texts() -> None:
    rng = random.Random(40_000)
    one = [rng.choice(("the", f"word{rng.randrange(3000)}")) for _ in range(40_000)]
    other = [f"zz{word}" if place % 97 == 5 else word for place, word in enumerate(one)]
    with at_most(cpu_seconds=10):  # a hundredth of it; quadratic work takes half a minute
        assert same_problem(one, other)


def test_what_is_asked_is_compared_not_how(tmp_path: Path) -> None:
    rows = [row("What is 3 + 4?", "bare"), row("What is 3 + 5?", "another")]
    rows += [row(wrapper.format("What is 3 + 4?"), f"wrapped {n}", "b") for n, wrapper in enumerate(WRAPPERS)]
    kept, dropped = fates(rows, tmp_path, prefer=["a"])
    assert kept == {"bare", "another"}
    assert {item.reason for item in dropped.values()} == {"duplicate"}


def test_which_of_two_copies_carries_the_text_depends_on_content_alone(tmp_path: Path) -> None:
    """Two copies that differ in where their sentences end: the one or the other has the order that a third has."""
    story = ["Tom has 5 red apples in a box", "Ann has 3 green pears in a bag", "How many fruits are there"]
    copies = [". ".join(story) + "?", "; ".join(story) + "?", " ".join(story)]
    moved = ". ".join([story[1], story[0], story[2]]) + "?"
    results = set()
    for order in itertools.permutations(range(3)):
        rows = [row(copies[n], f"{n}", "a") for n in order] + [row(moved, "moved", "b")]
        for shards in (1, 4):
            kept, _ = fates(rows, tmp_path, shards=shards, prefer=["a"])
            results.add(tuple(sorted(kept)))
    assert len(results) == 1


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="write `then: longest` instead"):
        entry("dedup", prefer=["a", "longest"])
    with pytest.raises(ValidationError, match="names the source 'a' twice"):
        entry("dedup", prefer=["a", "a"])
    assert "minhash" in step_class("dedup").identity(entry("dedup").config)


def test_shingles_of_many_texts_are_those_of_each() -> None:
    texts = ["", "abc", "abcd", "abcde", "a" * 50, "", "the same words in a row, the same words in a row"]
    units = [minhash.characters(text) for text in texts]
    for size in (1, 3, 5, 60):
        together = minhash.shingles_of(units, size)
        for one, found in zip(units, together, strict=True):
            assert np.array_equal(found, minhash.shingles(one, size))
    assert minhash.shingles_of([], 5) == []
