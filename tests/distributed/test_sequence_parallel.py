"""Ranks that share rows train what one process trains, on every engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from train_toys import read_metrics, saved_weights

TOLERANCE = 1e-5
KILLED = "2.none.documents.few.killed"
TWO = ("2.none.documents.few", KILLED)
FOUR = ("2.zero2.lora.checkpointing.few", "4.none.two.few")
LONG = {
    2: ("2.none", "2.none.lora", "2.zero2", "2.zero3"),
    4: ("4.none", "4.none.lora", *(f"2.zero{stage}" for stage in (1, 2, 3)), "2.zero2.lora", "2.none.checkpointing"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sequence")


@pytest.fixture(scope="module")
def said(folder: Path) -> Callable[..., dict[str, Any]]:
    """What each case of some says, run together on as many ranks."""

    @functools.cache
    def run(ranks: int, names: tuple[str, ...], limit: float = 400) -> dict[str, Any]:
        ends = run_ranks("sequence_cases.py", str(folder), ",".join(names), ranks=ranks, limit=limit)
        assert [end.code for end in ends] == [0] * ranks, "\n".join(end.stderr[-3000:] for end in ends)
        found: dict[str, Any] = json.loads((folder / f"{ranks}-0.json").read_text())
        return found

    return run


def alone(name: str) -> str:
    """The same stage on one process without an engine."""
    _, _, *options = name.split(".")
    return ".".join(["1", "none", *(option for option in options if option not in ("checkpointing", "two", "killed"))])


def check(folder: Path, ranks: int, name: str, found: dict[str, Any], plain: dict[str, Any]) -> None:
    size, engine, *_ = name.split(".")
    stage = int(engine[-1]) if engine != "none" else None
    expected = "DistributedDataParallel" if stage is None else "DeepSpeedEngine"
    assert (found["engine"], found["zero_stage"]) == (expected, stage)
    assert (found["world_size"], found["sequence_parallel_size"]) == (ranks, int(size))
    assert found["collator"] == "ShareCollator"
    for key in ("tokens", "supervised_tokens"):
        assert found["counters"][key] == plain["counters"][key]
    one, several = (folder / f"{n}-{which}/stages/one" for n, which in ((1, alone(name)), (ranks, name)))
    lines = [read_metrics(path / "metrics.jsonl") for path in (one, several)]
    for key in ("loss", "eval_loss", "grad_norm", "mean_token_accuracy", "entropy"):
        values = [[line[key] for line in of if key in line] for of in lines]
        assert values[0] and values[1] == pytest.approx(values[0], rel=TOLERANCE, abs=2e-6), key
    weights = saved_weights(several / "final")
    for key, weight in saved_weights(one / "final").items():
        off, largest = (weights[key] - weight).norm().item(), weight.norm().item()
        assert off <= TOLERANCE * max(largest, 1e-2), key


@pytest.mark.parametrize(("ranks", "names"), [(2, TWO), (4, FOUR)])
def test_ranks_that_share_rows_train_what_one_process_trains(folder, said, ranks, names):
    """Packed rows, accumulation, tokens without a label, held-out rows; LoRA and checkpointing among them."""
    plain = said(1, tuple(sorted({alone(name) for name in (*TWO, *FOUR)})))
    found = said(ranks, names)
    for name in names:
        check(folder, ranks, name, found[name], plain[alone(name)])


def test_a_killed_stage_goes_on_to_the_same_bits(folder, said):
    """From the checkpoint of its second step: the same rows in the same shares."""
    said(2, TWO)
    straight, resumed = (saved_weights(folder / f"2-{name}/stages/one/final") for name in TWO)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", LONG)
def test_thirty_steps_on_every_engine(folder, said, ranks):
    plain = said(1, ("1.none", "1.none.lora"), 900)
    found = said(ranks, LONG[ranks], 1800)
    for name in LONG[ranks]:
        check(folder, ranks, name, found[name], plain[alone(name)])
