"""The step `select`: each limit by itself, all at once, and independence of order and shards."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from step_toys import context, entry, record, run_table

from sft.data.read.outcomes import Dropped
from sft.data.read.record import Record
from sft.data.steps.base import verdict_schema
from sft.utils.errors import UserError


def _row(number: int, tokens: int = 10, **fields: Any) -> Record:
    own = {"problem": f"What is {number}?", "problem_id": f"p{number}", "place": f"toy.jsonl:{number}"}
    return record(id=f"r{number}", tokens=tokens, **{**own, **fields})


def _names(kept: list[tuple[Record, int]]) -> set[str]:
    assert all(copies == 1 for _, copies in kept)
    return {row.id for row, _ in kept}


def _reasons(dropped: list[Dropped]) -> Counter[str]:
    return Counter(drop.reason for drop in dropped)


@pytest.mark.parametrize(
    ("prefer", "kept"),
    [
        (["shortest"], {"r0", "r1", "r10", "r11"}),
        (["longest"], {"r2", "r3", "r12", "r13"}),
        (["teacher"], {"r0", "r2", "r10", "r12"}),
        (["teacher_tokens", "longest"], {"r3", "r2", "r13", "r12"}),
    ],
)
def test_per_problem_takes_the_preferred_answers(tmp_path: Path, prefer: list[str], kept: set[str]) -> None:
    score = [{"teacher_share": share, "teacher_token_share": other} for share, other in ((0.9, 0), (0.1, 0), (0.5, 0))]
    facts = [{"score": score[0]}, {"score": score[1]}, {"score": score[2]}, {}]
    rows = [
        _row(10 * problem + number, tokens=100 + number, problem_id=f"p{problem}", facts=dict(facts[number]))
        for problem in range(2)
        for number in range(4)
    ]
    if prefer[0] == "teacher_tokens":
        rows[3].facts = rows[7].facts = {"score": {"teacher_share": 0, "teacher_token_share": 1}}
    result, dropped = run_table("select", rows, context(tmp_path), per_problem=2, prefer=prefer)
    assert _names(result) == kept
    assert _reasons(dropped) == {"over_per_problem": 4}
    assert {drop.detail for drop in dropped} == {
        f"number {n} of the 4 answers to its problem, of which 2 are taken" for n in (3, 4)
    }
    written = pq.read_table(tmp_path / "verdicts.parquet")
    assert (written.schema.names, written.schema.types) == (verdict_schema().names, verdict_schema().types)
    assert written["row"].to_pylist() == sorted(written["row"].to_pylist())


def test_the_seed_chooses_where_nothing_is_preferred(tmp_path: Path) -> None:
    def chosen(seed: int) -> set[str]:
        rows = [_row(n, problem_id=f"p{n // 4}") for n in range(400)]
        return _names(run_table("select", rows, context(tmp_path / str(seed), seed=seed), per_problem=1)[0])

    first, second = chosen(1), chosen(2)
    assert len(first) == 100 and first == chosen(1) and 5 < len(first & second) < 60


def test_problems_of_two_sources_and_rows_without_problem_are_apart(tmp_path: Path) -> None:
    rows = [
        _row(0, problem_id="p"),
        _row(1, problem_id="p", source="other"),
        _row(2, problem_id=""),
        _row(3, problem_id=""),
    ]
    assert len(run_table("select", rows, context(tmp_path), per_problem=1)[0]) == 4


def test_pass_rate_of_rollouts(tmp_path: Path) -> None:
    rates = [0.0, 0.25, 0.5, 1.0, None]
    rows = [_row(n, facts={"explode_rollouts": {"pass_rate": rate}}) for n, rate in enumerate(rates)]
    kept, dropped = run_table("select", rows, context(tmp_path), pass_rate={"min": 0.25, "max": 0.75})
    assert _names(kept) == {"r1", "r2"}
    assert {row.facts["select"]["pass_rate"] for row, _ in kept} == {0.25, 0.5}
    assert {drop.record.id: drop.reason for drop in dropped} == {
        "r0": "pass_rate",
        "r3": "pass_rate",
        "r4": "no_pass_rate",
    }
    assert dropped[1].detail == "1, not within 0.25 to 0.75"


def test_pass_rate_of_verdicts_is_counted_over_the_problems_rows(tmp_path: Path) -> None:
    verdicts = {"easy": "RRRR", "hard": "RWWW", "never": "WWWW", "unsure": "RW??", "blank": "??"}
    words = {"R": "right", "W": "wrong", "?": "undecided"}
    rows = [
        _row(100 * number + at, problem_id=name, facts={"verify": {"verdict": words[mark]}})
        for number, (name, marks) in enumerate(verdicts.items())
        for at, mark in enumerate(marks)
    ]
    settings_ = {"of": "verdicts", "min": 0.25, "max": 0.75}
    kept, dropped = run_table("select", rows, context(tmp_path), pass_rate=settings_)
    assert {(row.problem_id, row.facts["select"]["pass_rate"]) for row, _ in kept} == {("hard", 0.25), ("unsure", 0.5)}
    assert _reasons(dropped) == {"verdict": 3 + 4 + 3 + 2, "pass_rate": 4}
    both = {**settings_, "verdicts": ["right", "wrong"]}
    assert len(run_table("select", rows, context(tmp_path / "2"), pass_rate=both)[0]) == 4 + 2


def test_pass_rate_of_verdicts_needs_wrong_ones(tmp_path: Path) -> None:
    rows = [_row(0, facts={"verify": {"verdict": "right"}})]
    with pytest.raises(UserError, match="every pass rate would be 1; let verify keep both"):
        run_table("select", rows, context(tmp_path), pass_rate={"of": "verdicts"})


def test_pass_rate_of_a_column_may_be_missing(tmp_path: Path) -> None:
    values = ["0.5", 0.5, "n/a", None, 1, float("nan"), "0.96875"]
    rows = [_row(n, carried={"pass_rate_72b_tir": value}) for n, value in enumerate(values)]
    settings_ = {"of": "column", "column": "pass_rate_72b_tir", "max": 0.9}
    kept, dropped = run_table("select", rows, context(tmp_path), pass_rate=settings_)
    assert _names(kept) == {"r0", "r1"} and _reasons(dropped) == {"pass_rate": 2, "no_pass_rate": 3}
    kept, _ = run_table("select", rows, context(tmp_path / "2"), pass_rate={**settings_, "missing": "keep"})
    assert _names(kept) == {"r0", "r1", "r2", "r3", "r5"}


@pytest.mark.parametrize("value", ["often", 85, -0.1, True])
def test_a_pass_rate_is_a_share(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError, match=r"toy.jsonl:7: rate is .*a pass rate is a number from 0 to 1"):
        run_table(
            "select",
            [_row(7, carried={"rate": value})],
            context(tmp_path),
            pass_rate={"of": "column", "column": "rate"},
        )


def test_select_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row has a pass rate"):
        run_table("select", [_row(0)], context(tmp_path / "1"), pass_rate={})
    with pytest.raises(UserError, match="put the step `score` before it"):
        run_table("select", [_row(0)], context(tmp_path / "2"), per_problem=1, prefer=["teacher"])
    with pytest.raises(UserError, match="no row has the domain 'maths'; there are: math"):
        run_table("select", [_row(0, domain="math")], context(tmp_path / "3"), quotas={"rows": {"maths": 1}})
    with pytest.raises(UserError, match="no row of 11 tokens or more, so that its share"):
        run_table("select", [_row(0)], context(tmp_path / "4"), lengths={"edges": [10], "shares": [0.5, 0.5]})


def test_quotas_of_rows_and_tokens(tmp_path: Path) -> None:
    domains = ["math"] * 20 + ["code"] * 20 + ["science"] * 3 + [None] * 2
    rows = [_row(n, domain=domain, tokens=10) for n, domain in enumerate(domains)]
    quotas: dict[str, Any] = {"rows": {"math": 7}, "tokens": {"code": 55}}
    kept, dropped = run_table("select", rows, context(tmp_path), quotas=quotas)
    assert Counter(row.domain for row, _ in kept) == {"math": 7, "code": 5, "science": 3, None: 2}
    assert _reasons(dropped) == {"quota": 13 + 15}
    assert {drop.detail for drop in dropped} == {
        "math: 7 rows are taken",
        "code: 55 tokens; 5 tokens were left, and this row has 10",
    }
    kept, dropped = run_table("select", rows, context(tmp_path / "2"), quotas={**quotas, "others": "drop"})
    assert {row.domain for row, _ in kept} == {"math", "code"} and _reasons(dropped) == {"quota": 13 + 15 + 5}
    kept, _ = run_table("select", rows, context(tmp_path / "3"), quotas={"by": "source", "rows": {"toy": 4}})
    assert len(kept) == 4


def test_length_shares_are_met(tmp_path: Path) -> None:
    rows = [_row(n, tokens=tokens) for n, tokens in enumerate([5] * 100 + [50] * 30 + [500] * 6)]
    edges = {"edges": [5, 50], "shares": [50, 30, 20]}
    kept, dropped = run_table("select", rows, context(tmp_path), lengths=edges)
    assert Counter(row.tokens for row, _ in kept) == {5: 15, 50: 9, 500: 6}  # six long ones allow 30 in all
    assert "1 to 5 tokens: 15 rows are taken" in {drop.detail for drop in dropped}
    kept, dropped = run_table("select", rows, context(tmp_path / "2"), lengths=edges, rows=11)
    assert sum(Counter(row.tokens for row, _ in kept).values()) == 11
    assert Counter(row.tokens for row, _ in kept) == {5: 6, 50: 3, 500: 2}  # 5.5, 3.3 and 2.2
    kept, dropped = run_table("select", rows, context(tmp_path / "3"), lengths={**edges, "of": "tokens"}, tokens=1000)
    assert Counter(row.tokens for row, _ in kept) == {5: 100, 50: 6} and _reasons(dropped) == {"length_bucket": 30}


def test_rows_without_answers_count_as_rows_but_have_no_length(tmp_path: Path) -> None:
    rows = [_row(0), record(id="p", completion=None)]
    assert len(run_table("select", rows, context(tmp_path), rows=2)[0]) == 2
    _, dropped = run_table("select", rows, context(tmp_path / "2"), tokens=100)
    assert [(drop.record.id, drop.reason) for drop in dropped] == [("p", "no_conversation")]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=50), budget=st.integers(1, 6000))
def test_a_token_budget_is_missed_by_less_than_the_smallest_row_refused(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], budget: int
) -> None:
    rows = [_row(n, tokens=tokens) for n, tokens in enumerate(lengths)]
    kept, dropped = run_table("select", rows, context(tmp_path_factory.mktemp("a")), tokens=budget)
    total = sum(row.tokens or 0 for row, _ in kept)
    assert total <= budget
    if dropped:
        assert budget - total < min(drop.record.tokens or 0 for drop in dropped)
    assert _reasons(dropped) in ({}, {"over_tokens": len(dropped)})


TOPICS = {
    "triangle": "the area of a triangle with base and height angle side perpendicular geometry",
    "train": "a train leaves the station with speed miles per hour distance travel time journey",
    "prime": "find all prime numbers divisible modulo remainder integer divisor congruent",
    "dice": "probability that rolling two dice gives a sum random outcome expected coin",
}


def _topic_rows(sizes: dict[str, int]) -> list[Record]:
    rng = random.Random(3)
    rows = []
    for topic, size in sizes.items():
        for _ in range(size):
            words = [*rng.sample(TOPICS[topic].split(), 8), "what", "is", str(rng.random())]
            rows.append(_row(len(rows), domain=topic, problem=" ".join(words)))
    return rows


def test_diversity_takes_rare_kinds_of_problems(tmp_path: Path) -> None:
    sizes = {"triangle": 300, "train": 40, "prime": 40, "dice": 20}
    plain, _ = run_table("select", _topic_rows(sizes), context(tmp_path / "1"), rows=80)
    diverse, dropped = run_table(
        "select", _topic_rows(sizes), context(tmp_path / "2"), rows=80, diversity={"clusters": 8}
    )
    assert Counter(row.domain for row, _ in plain)["triangle"] > 50
    counts = Counter(row.domain for row, _ in diverse)
    assert sum(counts.values()) == 80 and min(counts.values()) >= 10, counts
    topics = defaultdict(set)
    for row, _ in diverse:
        topics[row.facts["select"]["cluster"]].add(row.domain)
    assert len(topics) == 8 and all(len(found) == 1 for found in topics.values())
    turns = Counter(row.facts["select"]["cluster"] for row, _ in diverse)
    assert max(turns.values()) - min(turns.values()) <= 1  # every cluster is large enough for its ten turns
    assert _reasons(dropped) == {"over_rows": 320}


EVERYTHING: dict[str, Any] = {
    "pass_rate": {"of": "column", "column": "rate", "min": 0.1, "missing": "keep"},
    "per_problem": 3,
    "prefer": ["teacher", "shortest"],
    "quotas": {"rows": {"math": 25}, "tokens": {"code": 1500}},
    "lengths": {"edges": [60], "shares": [0.6, 0.4], "of": "tokens"},
    "diversity": {"clusters": 3},
    "tokens": 2500,
}


def _mixed_rows(seed: int) -> list[Record]:
    rng = random.Random(seed)
    words = " ".join(TOPICS.values()).split()
    rows = []
    for number in range(rng.randrange(40, 120)):
        problem = rng.randrange(25)
        text = " ".join(random.Random(problem).sample(words, 9))
        facts = {"score": {"teacher_share": rng.randrange(4) / 4}} if rng.random() < 0.9 else {}
        carried = {"rate": rng.choice(["n/a", 0.05, 0.5, 1.0])}
        fields: dict[str, Any] = {"problem": text, "problem_id": f"p{problem}", "facts": facts, "carried": carried}
        rows.append(_row(number, rng.randrange(10, 120), domain=["math", "code", "other"][number % 3], **fields))
    return rows


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), shards=st.integers(1, 4))
def test_order_and_shards_change_nothing(tmp_path_factory: pytest.TempPathFactory, seed: int, shards: int) -> None:
    def run(rows: list[Record], shards: int) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
        place = context(tmp_path_factory.mktemp("run"), seed=7)
        kept, dropped = run_table("select", rows, place, shards=shards, **EVERYTHING)
        assert len(kept) + len(dropped) == len(rows)
        return (
            {row.id: row.facts["select"] for row, _ in kept},
            {drop.record.id: (drop.reason, drop.detail) for drop in dropped},
        )

    straight = run(_mixed_rows(seed), 1)
    shuffled = _mixed_rows(seed)
    random.Random(seed).shuffle(shuffled)
    assert run(shuffled, shards) == straight


def test_real_problems_fall_into_sensible_clusters(tmp_path: Path, shared_dir: Path) -> None:
    """Clusters by words know nothing of where a problem is from or its subject, and yet agree with them."""
    rows = []
    for name, column in (("gsm8k", "question"), ("math500", "problem")):
        with (shared_dir / "data" / name / "test.jsonl").open(encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, 500)):
                value = json.loads(line)
                rows.append(
                    _row(
                        len(rows),
                        problem=value[column],
                        domain=value.get("subject", name),
                        problem_id=f"{name}{number}",
                    )
                )
    kept, _ = run_table("select", rows, context(tmp_path), rows=1000, diversity={"clusters": 24})
    groups: dict[int, list[str]] = defaultdict(list)
    for row, _ in kept:
        groups[row.facts["select"]["cluster"]].append(row.domain or "")
    assert len(groups) == 24
    word_problems = [sum(domain == "gsm8k" for domain in group) for group in groups.values()]
    right_side = sum(
        max(count, len(group) - count) for count, group in zip(word_problems, groups.values(), strict=True)
    )
    assert right_side / 1000 > 0.8  # by chance: about 0.55

    pairs = [(a, b) for group in groups.values() for a, b in combinations([d for d in group if d != "gsm8k"], 2)]
    assert sum(a == b for a, b in pairs) / len(pairs) > 0.24  # by chance: 0.165


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from sft.data.steps.select.clusters import SAMPLE
from sft.data.steps import sql
from step_toys import context, entry, record
from sft.data.steps import step_class
from test_select import EVERYTHING

folder, rows = Path(sys.argv[1]), int(sys.argv[2])
sql.MEMORY_LIMIT = "100MB"
# Both sizes fill the sample that clusters are learned from.
settings = {**EVERYTHING, "tokens": 500 * rows, "quotas": {"rows": {"math": rows // 8}}, "diversity": {"clusters": 64}}
step = step_class("select")(entry("select", **settings).config, context(folder))
schema = step.sketch([]).schema
rng, files = np.random.default_rng(0), []
for start in range(0, rows, 5000):
    row = np.arange(start, start + 5000)
    problem = row % max(SAMPLE, rows // 4)
    words = [np.sort(np.random.default_rng(p).choice(4000, 40, replace=False)).astype(np.uint16) for p in problem]
    columns = {
        "source": ["toy"] * 5000, "problem": problem, "tie": row, "domain": [["math", "code"][p % 2] for p in problem],
        "tokens": rng.integers(20, 120, 5000), "draw": rng.random(5000), "pass_rate": rng.random(5000),
        "verdict": [None] * 5000, "teacher": rng.random(5000), "teacher_tokens": rng.random(5000),
        "problem_draw": problem / rows, "words": words,
    }
    table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    files.append(folder / f"sketch-{start}.parquet")
    pq.write_table(table.add_column(0, "row", pa.array(row)), files[-1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(folder / "scratch").mkdir()
step.decide(files, folder / "verdicts.parquet", folder / "scratch")
written = pq.read_table(folder / "verdicts.parquet")
assert written.num_rows == rows and (np.diff(written["row"].to_numpy()) == 1).all()
assert set(written["reason"].to_pylist()) >= {None, "pass_rate", "quota", "length_bucket"}
print(before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path, repo_root: Path) -> None:
    peaks = {}
    for rows in (20_000, 200_000):
        place = tmp_path / str(rows)
        path = os.pathsep.join(map(str, (repo_root, repo_root / "tests" / "support", Path(__file__).parent)))
        command = [sys.executable, "-c", MEMORY_SCRIPT, str(place), str(rows)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        peaks[rows] = int(done.stdout.split()[-1])
    # DuckDB may use 100 MB here; the other 180,000 rows would take some 300 MB as Python objects.
    assert peaks[200_000] - peaks[20_000] < 100, peaks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "limits nothing"),
        ({"pass_rate": {"of": "column"}}, "goes with"),
        ({"pass_rate": {"min": 0.5, "max": 0.1}}, "less than min"),
        ({"pass_rate": {}, "prefer": ["longest"]}, "nothing to choose"),
        ({"per_problem": 1, "prefer": ["random", "longest"]}, "`random` last"),
        ({"per_problem": 1, "diversity": {"clusters": 3}}, "nothing to choose"),
        ({"quotas": {}}, "names no domain"),
        ({"quotas": {"rows": {"math": -1}}}, "negative"),
        ({"lengths": {"edges": [5, 2], "shares": [1, 1, 1]}}, "ascending"),
        ({"lengths": {"edges": [5], "shares": [1]}}, "needs 2 numbers"),
        ({"lengths": {"edges": [5], "shares": [0, 0]}}, "not all 0"),
        ({"lengths": {"edges": [5], "shares": [1, 1]}, "tokens": 5}, "set `lengths.of: tokens`"),
    ],
)
def test_settings_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        entry("select", **arguments)


def test_the_column_with_the_pass_rate_is_carried() -> None:
    from sft.data.steps.select.step import Select

    config = entry("select", pass_rate={"of": "column", "column": "rate"}).config
    assert Select.carried(config) == {"rate"} and Select.carried(entry("select", rows=1).config) == set()
