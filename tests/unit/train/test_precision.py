"""What a stage computes in: the recipe's word, the launcher's, what the run began with, the machine's, in turn."""

from __future__ import annotations

import signal

import pytest
import torch
from train_toys import saved_weights, signal_at, tiny_sambay, toy_recipe, toy_rows, train_toy

from sft.recipe.paths import RunPaths
from sft.recipe.train_keys import TrainSection
from sft.train.interrupt import Interrupted
from sft.train.precision import expected_precision, precision_of
from sft.utils import processor
from sft.utils.files import write_sealed

UNITS = {"amx_bf16 avx512_bf16 avx512f": "AMX", "avx512_bf16 avx512f": "AVX512-BF16", "avx512f avx2": None, "": None}
TRAIN = {"packing": True, "max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 2}


@pytest.fixture
def processor_with(monkeypatch: pytest.MonkeyPatch):
    """Let the processor have these flags, and nothing hide them."""

    def have(flags: str) -> None:
        monkeypatch.setattr(processor, "_flags", lambda: frozenset(flags.split()))
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    return have


@pytest.mark.parametrize("flags", UNITS)
def test_the_processor_decides_where_nobody_else_does(processor_with, flags):
    processor_with(flags)
    found = expected_precision(TrainSection(use_cpu=True))
    assert found.bf16 is (UNITS[flags] is not None)
    assert (UNITS[flags] or "no instructions") in str(found)


@pytest.mark.parametrize(
    "limit, unit", [("AVX512_CORE", None), ("avx2", None), ("AVX512_CORE_BF16", "AVX512-BF16"), ("ALL", "AMX")]
)
def test_what_onednn_is_kept_from_is_not_counted_on(processor_with, monkeypatch, limit, unit):
    processor_with("amx_bf16 avx512_bf16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert processor.bf16_unit() == unit


def test_flags_are_read_from_what_the_system_says(tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nflags\t\t: fpu avx512_bf16 amx_bf16\nprocessor : 1\nflags : fpu\n")
    monkeypatch.setattr(processor, "_CPUINFO", path)
    assert processor._flags.__wrapped__() >= {"avx512_bf16", "amx_bf16"}
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "none")
    assert processor._flags.__wrapped__() == frozenset()


def test_the_recipe_s_word_wins_over_the_launcher_s_and_that_over_the_machine_s(processor_with, monkeypatch):
    processor_with("avx2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert expected_precision(TrainSection(use_cpu=True)).bf16
    assert expected_precision(TrainSection(use_cpu=True, bf16=False)) == (False, "")
    processor_with("amx_bf16")
    assert expected_precision(TrainSection(use_cpu=True, bf16=False)) == (False, "")


@pytest.mark.parametrize("began, goes_on", [("amx_bf16", "avx2"), ("avx2", "amx_bf16")])
def test_a_resumed_stage_keeps_what_it_began_with_on_another_machine(
    tmp_path, monkeypatch, capfd, processor_with, began, goes_on
):
    processor_with(began)
    rows = toy_rows(8, packed=True)
    straight, paths = train_toy(tmp_path / "straight", TRAIN, model=tiny_sambay(), prepared=rows)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_at(patch, 5, signal.SIGINT)
        train_toy(tmp_path / "resumed", TRAIN, model=tiny_sambay(), prepared=rows)
    processor_with(goes_on)
    resumed, after = train_toy(tmp_path / "resumed", TRAIN, model=tiny_sambay(), prepared=rows)
    assert resumed["precision"] == straight["precision"] == ("bfloat16" if began == "amx_bf16" else "float32")
    assert resumed["train"]["bf16"] is (began == "amx_bf16")
    assert f"one: computes in {resumed['precision']}, as this run began" in capfd.readouterr().err
    one, two = saved_weights(paths.final_dir("one")), saved_weights(after.final_dir("one"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(weight.dtype == torch.float32 for weight in one.values())


@pytest.mark.parametrize("first, kept", [(None, True), (True, False)])
def test_a_later_stage_keeps_what_the_run_began_with_by_itself(tmp_path, processor_with, first, kept):
    processor_with("avx2")
    recipe = toy_recipe(tmp_path, {"bf16": first}, {}, {})
    paths = RunPaths(recipe)
    done = {"recipe": recipe.stages[0].model_dump(), "precision": "bfloat16"}
    write_sealed(paths.stage_manifest("one"), done)
    for stage in recipe.stages[1:]:
        assert precision_of(stage, paths).bf16 is kept


def test_a_stage_that_starts_again_may_change(tmp_path, processor_with):
    processor_with("amx_bf16")
    made, paths = train_toy(tmp_path, TRAIN, model=tiny_sambay(), prepared=toy_rows(8, packed=True))
    stage = paths.recipe.stages[0]
    processor_with("avx2")
    assert made["precision"] == "bfloat16" and precision_of(stage, paths).bf16
    assert not precision_of(stage, paths, resume=False).bf16
