"""Two ranks on DDP and ZeRO-1/2/3 train what one process trains, on the engine asked for, stage after stage."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SUPPORT, Ended, run_alone, run_ranks
from train_toys import read_metrics, saved_weights

ENGINES = ("none", "zero1", "zero2", "zero3")
ADAPTERS = "chain-zero3+zero2.lora-fp32"
MUON = "chain-none.muon+none.muon-fp32"
GROUPS = "chain-none.groups+none.groups-fp32"
GROUPED = "chain-zero2.groups+zero3.groups-fp32"
BEST = tuple(f"best-{engine}-bf16" for engine in ("none", "zero3", "zero2.lora"))
RESUMED = tuple(f"resumed-{engine}-bf16" for engine in ("none", "zero2", "zero3"))
STILL = tuple(f"still-{engine}-bf16" for engine in ENGINES)
SAME = tuple(f"chain-{engine}+{engine}-{precision}" for precision in ("fp32", "bf16") for engine in ENGINES)
EVERY_DAY = ("chain-none+none-fp32", "chain-zero3+zero3-fp32", "chain-zero2+none-fp32", ADAPTERS, MUON, GROUPED)
EVERY_DAY += ("chain-zero2+zero2-bf16", "resumed-zero2-bf16", "still-zero3-bf16", "best-zero3-bf16")
EVERY_DAY += ("chain-zero3.checkpointing+zero3.lora-bf16", "launched-zero3-bf16", "unlike-zero2-bf16")
OTHERS = tuple(name for name in (*SAME, *BEST, *RESUMED, *STILL) if name not in EVERY_DAY)
TOLERANCE = {"fp32": 5e-6, "bf16": 3e-4}
CLASSES = {"none": "DistributedDataParallel"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The same chains in one process, without an engine."""
    names = f"chain-none+none-fp32,chain-none+none-bf16,chain-none+none.lora-fp32,{MUON},{GROUPS}"
    end = run_alone([str(SUPPORT / "engine_cases.py"), str(folder), names], limit=400)
    assert end.code == 0, end.stderr[-3000:]
    return folder / "1"


@pytest.fixture(scope="module")
def two(folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What a case says, rank by rank; it runs with others of its precision, when the first one is asked for."""

    @functools.cache
    def ran(precision: str, every_day: bool) -> tuple[list[Ended], list[dict[str, Any]]]:
        names = [name for name in (EVERY_DAY if every_day else OTHERS) if name.endswith(precision)]
        ends = run_ranks("engine_cases.py", str(folder), ",".join(names), limit=840)
        return ends, [json.loads((folder / f"2-{rank}.json").read_text()) for rank in (0, 1)]

    def results(name: str) -> list[dict[str, Any]]:
        # Run once, whatever came of it: in a folder where a part has been done, all ends otherwise.
        ends, found = ran(name.rpartition("-")[2], name in EVERY_DAY)
        assert [end.code for end in ends] == [0, 0], "\n".join(end.stderr[-3000:] for end in ends)
        return [result[name] for result in found]

    return results


def marked(*names: str) -> list[Any]:
    """Those of every day, and the others, which are for `make test-slow`."""
    return [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in names]


CHAINS = [name for name in (*EVERY_DAY, *OTHERS) if name.startswith("chain-")]


def asked(name: str) -> list[tuple[str, str]]:
    """The engine and the precision that each stage of a chain asks for."""
    _, words, precision = name.split("-")
    return [(word.split(".")[0], precision) for word in words.split("+")]


@pytest.mark.parametrize("name", marked(*CHAINS))
def test_every_stage_runs_on_the_engine_that_it_asks_for(two, name):
    """Asked of the engine itself, and of the manifest."""
    for result in two(name):
        for (engine, precision), seen, manifest in zip(asked(name), result["seen"], result["manifests"], strict=True):
            stage = None if engine == "none" else int(engine[-1])
            assert (seen["engine"], seen["zero_stage"]) == (CLASSES.get(engine, "DeepSpeedEngine"), stage)
            assert seen["ranks"] == 2 and seen["partitioned"] == (stage == 3)
            assert seen["weights"] == ["torch.float32"]
            assert seen["activations"] == ("torch.bfloat16" if precision == "bf16" else "torch.float32")
            recorded = {"engine": seen["engine"], "zero_stage": stage, "world_size": 2, "steps": 3}
            assert manifest == recorded | {"precision": "bfloat16" if precision == "bf16" else "float32"}


@pytest.mark.parametrize("name", marked(*CHAINS))
def test_nothing_of_an_engine_is_left(two, name):
    for result in two(name):
        assert result["environment"] == [] and result["left"] == []
        assert result["evaluations"] == ["s0", "s1"]


@pytest.mark.parametrize("name", marked(*SAME))
def test_two_ranks_train_what_one_process_trains(alone, two, folder, name):
    """And they train: what a stage changes is a hundred times what it may be off."""
    two(name)
    precision = name.rpartition("-")[2]
    reference = alone / f"chain-none+none-{precision}/stages"
    before = None
    for stage in ("s0", "s1"):
        # 5 held-out rows, one at a time: two processes don't get as many.
        lines = [held_out_lines(root / stage) for root in (reference, folder / "2" / name / "stages")]
        assert [line["step"] for line in lines[0]] == [0, 2, 3]
        for one, other in zip(*lines, strict=True):
            assert one["eval_supervised_tokens"] == other["eval_supervised_tokens"]
            assert other["eval_loss"] == pytest.approx(one["eval_loss"], rel=2e-3 if precision == "bf16" else 1e-5)
        expected = saved_weights(reference / stage / "final")
        weights = saved_weights(folder / "2" / name / "stages" / stage / "final")
        assert weights.keys() == expected.keys() and "lm_head.weight" not in weights
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        for key, weight in expected.items():
            torch.testing.assert_close(weights[key], weight, rtol=0, atol=TOLERANCE[precision])
        if before is not None:
            moved = max((weights[key] - before[key]).abs().max().item() for key in weights)
            assert moved > 100 * TOLERANCE["fp32"] and moved > 5 * TOLERANCE[precision]
        before = weights


def held_out_lines(stage: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(stage / "metrics.jsonl") if "eval_loss" in line]


@pytest.mark.parametrize("name", marked(*(name for name in CHAINS if ".lora" not in name)))
def test_what_is_exported_is_what_was_trained(two, folder, name):
    two(name)
    exported = saved_weights(folder / "2" / name / "export")
    weights = saved_weights(folder / "2" / name / "stages/s1/final")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[key], weights[key]) for key in weights)


def test_adapters_after_zero3_are_those_of_one_process(alone, two, folder):
    expected = saved_weights(alone / "chain-none+none.lora-fp32/stages/s1/final")
    two(ADAPTERS)
    weights = saved_weights(folder / "2" / ADAPTERS / "stages/s1/final")
    assert weights.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=TOLERANCE["fp32"])


def test_muon_on_two_ranks_is_muon_on_one(alone, two, folder):
    """But for what bfloat16's Newton-Schulz steps make of gradients that are summed in another order."""
    two(MUON)
    s0, s1 = (saved_weights(alone / MUON / "stages" / stage / "final") for stage in ("s0", "s1"))
    weights = saved_weights(folder / "2" / MUON / "stages/s1/final")
    off = sum((weights[key] - s1[key]).square().sum().item() for key in s1)
    moved = sum((s1[key] - s0[key]).square().sum().item() for key in s1)
    assert 0 < off < 0.1**2 * moved


@pytest.mark.parametrize("stage", ["s0", "s1"])
def test_groups_have_their_own_rates_on_every_engine(alone, two, folder, stage):
    two(GROUPED)
    roots = (alone / GROUPS, folder / "2" / GROUPED, alone / "chain-none+none-fp32")
    expected, weights, plain = (saved_weights(root / "stages" / stage / "final") for root in roots)
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=4 * TOLERANCE["fp32"])
    assert max((expected[key] - plain[key]).abs().max().item() for key in expected) > 100 * TOLERANCE["fp32"]


@pytest.mark.parametrize("name", marked(*RESUMED))
def test_a_killed_stage_goes_on_to_the_same_bits(two, folder, name):
    """Killed in its third step, and killed between its last step and the hand-over."""
    engine = name.split("-")[1]
    for result in two(name):
        assert [end.split(":")[0] for end in result["ends"]] == ["Killed", "Killed"]
        assert (result["steps"], result["engine"]) == (3, CLASSES.get(engine, "DeepSpeedEngine"))
    straight = f"chain-{engine}+{engine}-bf16"
    two(straight)
    straight = saved_weights(folder / f"2/{straight}/stages/s0/final")
    resumed = saved_weights(folder / "2" / name / "stages/s0/final")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.parametrize("name", marked(*BEST))
def test_the_best_checkpoint_is_found_by_all_ranks(two, name):
    """Each answers with a whole model of its own, whatever the engine has made of the one that was trained."""
    results = two(name)
    assert results[0]["best"] == results[1]["best"] and results[0]["parents"] == 1
    assert sorted(results[0]["best"]["scores"]) == ["checkpoint-2", "checkpoint-3"]
    assert all(result["asked"] > 0 for result in results)


@pytest.mark.parametrize("name", marked(*STILL))
def test_without_a_learning_rate_no_bit_changes(two, folder, name):
    """Under bf16: A_log, D, the lambdas and norms, and all the rest, are never rounded."""
    assert [result["steps"] for result in two(name)] == [1, 1]
    weights, start = saved_weights(folder / "2" / name / "stages/s0/final"), start_weights(folder)
    assert weights.keys() == start.keys()
    assert any("A_log" in key for key in weights) and any("lambda" in key for key in weights)
    assert [key for key in start if not torch.equal(weights[key], start[key])] == []


def start_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that every case begins with."""
    from engine_cases import recipe_of

    from sft.recipe.paths import RunPaths
    from sft.train.handover import load_stage_model

    model, _ = load_stage_model(RunPaths(recipe_of(folder / "start", {}, suites=[])))
    return {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}


def test_the_launcher_s_engine_counts_where_the_recipe_names_none(two):
    """Its gradient accumulation and its `zero3_save_16bit_model: false` don't: others have the say in those."""
    for result in two("launched-zero3-bf16"):
        assert (result["zero_stage"], result["precision"], result["kept"]) == (3, "bfloat16", True)
        (seen,) = result["seen"]
        assert (seen["engine"], seen["weights"], seen["activations"]) == (
            "DeepSpeedEngine",
            ["torch.float32"],
            "torch.bfloat16",
        )


def test_ranks_that_would_train_different_things_are_stopped(two):
    for result in two("unlike-zero2-bf16"):
        assert result["end"].startswith(
            "UserError: Rank 1 would train something else than rank 0: from that to this, precision was"
        )
