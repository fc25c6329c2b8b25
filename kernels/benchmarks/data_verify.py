"""The step `verify` in two processes beside a plain loop of math-verify in one: rows a second on the same solutions.

python kernels/benchmarks/data_verify.py [--data FOLDER] [--workers 2] [--repeats 3]

FOLDER holds gsm8k/rollouts.jsonl and math500/test.jsonl. `all`: the labelled rollouts and the MATH-500 solutions, each
against its own gold answer. `math`: solutions against the answers of other problems, only those that the step itself
hands to math-verify; there, two processes can't do more than two. Starting (imports) is not counted on either side.
Runs alternate; figures are medians. Fails where `all` is less than 1.8 times the loop.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from sft.answers.choices import options_in
from sft.answers.extract import gold_answer
from sft.answers.judge import Judge
from sft.data.read.record import Record
from sft.data.steps.context import Context, Templates
from sft.data.steps.verify import Verify
from sft.recipe.steps.verify import VerifyStep

AIM, BATCH = 1.8, 256
WARM_UP = ("The answer is $\\frac{\\sqrt{8}}{2}$.", "\\sqrt{2}")
# (problem, solution, gold answer, whether it is labelled right; None without a label)
Case = tuple[str, str, str, bool | None]


def labelled(folder: Path) -> list[Case]:
    """The four models' rollouts with their labels, and the MATH-500 solutions, which are right."""
    cases: list[Case] = []
    for row in _read(folder / "gsm8k" / "rollouts.jsonl"):
        rollouts = [value for value in row.values() if isinstance(value, dict)]
        cases += [(row["question"], r["solution"], gold_answer(row["ground_truth"]), r["is_correct"]) for r in rollouts]
    return cases + [
        (row["problem"], row["solution"], row["answer"], True) for row in _read(folder / "math500" / "test.jsonl")
    ]


def only_math(folder: Path) -> list[Case]:
    """MATH-500 solutions against other problems' answers, where nothing but math-verify can tell."""
    rows = _read(folder / "math500" / "test.jsonl")
    # Answers to one problem follow each other, as in data with rollouts.
    pairs = [(row, rows[other]) for n, row in enumerate(rows) for other in range(n + 1, min(n + 6, len(rows)))]
    cases: list[Case] = []
    with Judge() as judge:
        for a, b in pairs:
            verdict = judge.judge(b["solution"], a["answer"], options=options_in(a["problem"]))
            if verdict.reason == "math-verify":
                cases.append((a["problem"], b["solution"], a["answer"], None))
    return cases


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def with_loop(cases: list[Case]) -> tuple[float, list[bool]]:
    """(seconds, right or not) of math-verify in a fresh process: its parser is faster on what it has seen before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(plain_loop, (cases,))


def plain_loop(cases: list[Case]) -> tuple[float, list[bool]]:
    """(seconds, right or not) of math-verify as its documentation shows it."""
    from math_verify import parse, verify

    verify(parse(f"${WARM_UP[1]}$"), parse(WARM_UP[0]))
    started = time.perf_counter()
    found = [bool(verify(parse(f"${gold}$"), parse(text))) for _, text, gold, _ in cases]
    return time.perf_counter() - started, found


def with_step(cases: list[Case], workers: int) -> tuple[float, list[bool]]:
    """(seconds of the slowest, right or not) of `workers` processes with a step each, as the engine has them."""
    # In one piece each, like shards.
    bounds = [len(cases) * number // workers for number in range(workers + 1)]
    parts = [cases[start:end] for start, end in pairwise(bounds)]
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager:
        together = manager.Barrier(workers)
        with spawn.Pool(workers) as pool:
            results = pool.starmap(_work, [(part, together) for part in parts], chunksize=1)
    return max(seconds for seconds, _ in results), [right for _, part in results for right in part]


def _work(cases: list[Case], together: Any) -> tuple[float, list[bool]]:
    config = VerifyStep(keep=["right", "wrong", "undecided"])
    with tempfile.TemporaryDirectory() as folder:
        step = Verify(config, Context("", Templates(), 0, Path(folder), Path(folder)))
        list(step([_record(("", *WARM_UP, None))]))
        records = [_record(case) for case in cases]
        together.wait(600)
        started = time.perf_counter()
        outcomes = [
            outcome for start in range(0, len(records), BATCH) for outcome in step(records[start : start + BATCH])
        ]
        seconds = time.perf_counter() - started
        step.close()
    return seconds, [outcome.record.facts["verify"]["verdict"] == "right" for outcome in outcomes]


def _record(case: Case) -> Record:
    problem, text, gold, _ = case
    messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": text}]
    return Record(id="", source="", place="", problem=problem, messages=messages, answer=gold)


def agreement(cases: list[Case], found: list[bool]) -> str:
    """Share of the labelled cases where the verdict is the label."""
    pairs = [(label, mine) for (*_, label), mine in zip(cases, found, strict=True) if label is not None]
    return f"{sum(label == mine for label, mine in pairs) / len(pairs):.2%} of labels" if pairs else "no labels"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("SAMBAY_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    options.add_argument("--data", type=Path, default=shared / "data", help="default: ../shared/data of the checkout")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--repeats", type=int, default=3)
    chosen = options.parse_args()
    if not (chosen.data / "gsm8k" / "rollouts.jsonl").is_file():
        sys.exit(f"{chosen.data}: there is no gsm8k/rollouts.jsonl; name the folder with --data")
    ratios = {}
    for name, cases in (("all", labelled(chosen.data)), ("math", only_math(chosen.data))):
        runs = [(with_loop(cases), with_step(cases, chosen.workers)) for _ in range(chosen.repeats)]
        loop, step = (statistics.median(run[side][0] for run in runs) for side in (0, 1))
        ratios[name] = loop / step
        (_, theirs), (_, ours) = runs[-1]
        print(f"{name}: {len(cases)} rows; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print(f"  math-verify, 1 process   {len(cases) / loop:9.0f} rows/s   {agreement(cases, theirs)}")
        print(f"  verify, {chosen.workers} processes      {len(cases) / step:9.0f} rows/s   {agreement(cases, ours)}")
        print(f"  ratio {ratios[name]:.2f}")
    return 0 if ratios["all"] >= AIM else 1


if __name__ == "__main__":
    sys.exit(main())
