"""Ranks that share rows train what one process trains; in float64 a row in shares is the whole row."""

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

TOLERANCE, FLOAT64 = 1e-5, 1e-10
GROUPS = ("2", "4")
STRAIGHT, KILLED = "2.none.documents.few", "2.none.documents.few.killed"
FOUR = (STRAIGHT, KILLED, "2.zero2.lora.checkpointing.few", "4.none.two.few")
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
    def run(ranks: int, names: tuple[str, ...], limit: float = 400, more: tuple[str, ...] = ()) -> dict[str, Any]:
        ends = run_ranks("sequence_cases.py", str(folder), ",".join(names), *more, ranks=ranks, limit=limit)
        assert [end.code for end in ends] == [0] * ranks, "\n".join(end.stderr[-3000:] for end in ends)
        found: dict[str, Any] = json.loads((folder / f"{ranks}-0.json").read_text())
        return found

    return run


@pytest.fixture(scope="module")
def four(said: Callable[..., dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """What the four ranks say of their stages, run together with the shares."""
    return lambda: said(4, FOUR, 800, ("shares",))


@pytest.fixture(scope="module")
def found(folder: Path, four: Callable[[], dict[str, Any]]) -> Callable[[str, str], list[Any]]:
    """What each of the four ranks says of a kind of shares, done by groups of 2 or by all 4."""

    def of(size: str, kind: str) -> list[Any]:
        four()
        return [json.loads((folder / f"shares-{rank}.json").read_text())[size][kind] for rank in range(4)]

    return of


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


@pytest.mark.parametrize("name", FOUR)
def test_ranks_that_share_rows_train_what_one_process_trains(folder, said, four, name):
    """Packed rows, accumulation, tokens without a label, held-out rows; LoRA, checkpointing, a restart among them."""
    plain = said(1, tuple(sorted({alone(name) for name in FOUR})))
    check(folder, 4, name, four()[name], plain[alone(name)])


def test_a_killed_stage_goes_on_to_the_same_bits(folder, four):
    """From the checkpoint of its second step: the same rows in the same shares."""
    four()
    straight, resumed = (saved_weights(folder / f"4-{name}/stages/one/final") for name in (STRAIGHT, KILLED))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize(("kind", "count"), [("layouts", 50), ("checkpointing", 4), ("adapters", 8)])
def test_shares_give_the_loss_and_gradients_of_the_whole_row(found, size, kind, count):
    """Cuts inside documents and at their edges, documents of one token, empty shares, rows shorter than the ranks are
    many, a window of 16, tokens before a document's first target left out, weights."""
    said = found(size, kind)
    # Two pairs share 25 layouts.
    assert len(said[0]) == (13 if size == "2" and kind == "layouts" else count)
    assert max(max(case) for rank in said for case in rank) < FLOAT64


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("what", ["conv_state", "scan_state", "keys_before"])
def test_a_share_that_starts_from_nothing_is_told_by_them(found, size, what):
    loss, gradient = found(size, "naive")[0][what]
    assert loss > 1e-4 and gradient > 1e-2


@pytest.mark.parametrize("size", GROUPS)
def test_what_mamba_layers_and_windows_fetch_does_not_grow_with_the_row(found, size):
    """The keys of the one full layer do; the last rank fetches those of all before it."""
    short, long = found(size, "moved")[-1]
    assert {name: long[name] for name in ("conv", "scan", "window")} == {
        name: short[name] for name in ("conv", "scan", "window")
    }
    ranks, inner, states, layers = int(size), 64, 8, 3
    assert short["scan"] == 8 * layers * (ranks - 1) * inner * (states + 1)
    assert short["conv"] == 8 * layers * 3 * inner
    assert short["window"] == 8 * 2 * (16 - 1) * 2 * 16  # two layers, keys and values of 16 numbers
    assert long["keys"] == 2 * short["keys"] == 2 * 8 * 2 * 16 * 120 * (ranks - 1) // ranks


@pytest.mark.parametrize("size", GROUPS)
def test_the_probe_at_a_stage_s_start_tells_a_share_that_starts_from_nothing(found, size):
    """Every rank says the same; what is sound passes, with checkpointing and an adapter's dropout too."""
    for said in found(size, "probe"):
        assert said.pop("null") == "passed"
        assert len(said) == 3
        for text in said.values():
            assert "can't train on rows that several processes share, because a share's gradients aren't the" in text


@pytest.mark.slow
@pytest.mark.parametrize("ranks", LONG)
def test_thirty_steps_on_every_engine(folder, said, ranks):
    plain = said(1, ("1.none", "1.none.lora"), 900)
    found = said(ranks, LONG[ranks], 1800)
    for name in LONG[ranks]:
        check(folder, ranks, name, found[name], plain[alone(name)])
