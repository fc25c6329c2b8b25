"""What type answers are given in: as the recipe, the exported weights, the run's first answers and the machine say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_toys import SHAPE, small_recipe, write_problems, write_start

from sft import generate
from sft.cli.answering import _load_stage
from sft.recipe import Recipe, RunPaths
from sft.recipe.suites import load_suites
from sft.run.chain import run
from sft.run.evaluation import evaluate_alone, evaluate_other, evaluate_points
from sft.run.named import load_named
from sft.train.answering import answering_precision
from sft.utils import processor
from sft.utils.errors import UserError
from sft.utils.files import read_sealed

HARDWARE, NONE = "avx512f avx512_bf16", "avx512f"
LORA = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.5, "lora_alpha": 64}


@pytest.fixture
def processor_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the processor have these flags, and nothing hide them."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    return lambda flags: monkeypatch.setattr(processor, "_flags", lambda: frozenset(flags.split()))


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The type of the model of each call of the engine."""
    calls: list[torch.dtype] = []
    original = generate.generate_batch

    def counted(model: Any, *args: Any, **more: Any) -> Any:
        calls.append(model.dtype)
        return original(model, *args, **more)

    monkeypatch.setattr(generate, "generate_batch", counted)
    return calls


def recipe(
    root: Path,
    *stages: dict[str, Any],
    bf16: bool | None = None,
    dtype: str = "bfloat16",
    scratch: bool = False,
) -> Recipe:
    """A run whose stages are evaluated after each second step, too."""
    base = {"max_steps": 2, "save_steps": 1, "bf16": False}
    made = small_recipe(root, stages=tuple({**base, **stage} for stage in stages)).model_dump()
    made["model"]["dtype"] = dtype
    if scratch:
        made["model"] |= {"model_name_or_path": None, "config": SHAPE, "tokenizer": "tiny"}
    for stage in made["stages"]:
        (suite,) = stage["evaluate"]["suites"]
        suite.update(temperature=1.0, samples_per_problem=2, max_new_tokens=12)
        stage["evaluate"] |= {"every": {"steps": 2}, "bf16": bf16}
    made["stages"][0]["keep_best"] = "sums"
    return Recipe.model_validate(made)


def types(root: Path) -> dict[str, str]:
    """What the metrics that are in a run say that it answered in, by place."""
    found = (root / "run").rglob("metrics.json")
    return {str(path.relative_to(root / "run")): json.loads(path.read_text())["dtype"] for path in found}


def answers(root: Path, where: str) -> bytes:
    return (root / "run" / where / "sums/samples.jsonl").read_bytes()


DORA = {**LORA, "use_dora": True, "lora_target_modules": ["fc1", "out_proj"]}


@pytest.mark.parametrize(
    "began, stages, scratch",
    [(HARDWARE, (LORA, DORA), True), (NONE, ({}, LORA), True), (HARDWARE, ({}, {}), False)],
    ids=["adapters on random weights, bfloat16", "from scratch, float32", "a checkpoint, bfloat16"],
)
def test_a_run_answers_in_what_it_began_with(
    tmp_path: Path,
    began: str,
    stages: tuple[dict[str, Any], ...],
    scratch: bool,
    processor_with: Callable[[str], None],
    generated: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Killed before the first stage's end, it goes on on another machine; what answers while training answers after."""
    made = recipe(tmp_path, *stages, scratch=scratch)
    processor_with(began)
    with monkeypatch.context() as patch:
        patch.setattr("sft.train.job.save_final", None)
        with pytest.raises(TypeError):
            run(made)
    processor_with(NONE if began == HARDWARE else HARDWARE)
    run(made)
    dtype = "bfloat16" if began == HARDWARE else "float32"
    places = types(tmp_path)
    assert set(places.values()) == {dtype} and len(places) >= 6, places
    # The start, each step that was evaluated, of the two checkpoints that are compared the other one, which is the best
    # since none is better, and that one once it is handed on.
    assert generated == [getattr(torch, dtype)] * 5
    assert answers(tmp_path, "eval/a") == answers(tmp_path, "stages/a/compared/checkpoint-1")
    assert answers(tmp_path, "eval/b") == answers(tmp_path, "stages/b/evaluations/step-2")
    told = capfd.readouterr().err
    assert f"start: answers in {dtype}: this processor " in told and told.count("as this run's answers began") >= 3
    assert f"a, while it trains: answers in {dtype}, as this run's" in told
    before = answers(tmp_path, "eval/b")
    for path in (tmp_path / "run/eval/b").rglob("*.json*"):
        path.unlink()
    for path in (tmp_path / "run/stages/b/evaluations").rglob("metrics.json"):
        path.unlink()
    assert evaluate_points(RunPaths(made), stage="b")["b"]["sums"]["dtype"] == dtype
    assert answers(tmp_path, "eval/b") == before
    assert _load_stage(RunPaths(made), "b")[0].dtype == getattr(torch, dtype)
    record = read_sealed(RunPaths(made).manifest)
    assert record is not None and record["evaluations"]["a"]["sums"]["dtype"] == dtype


def test_float32_weights_answer_in_float32_and_a_word_is_a_word(
    tmp_path: Path, processor_with: Callable[[str], None]
) -> None:
    processor_with(HARDWARE)
    for dtype, bf16, expected in (
        ("float32", None, False),
        ("float32", True, True),
        ("bfloat16", False, False),
        ("bfloat16", None, True),
    ):
        made = recipe(tmp_path, {}, dtype=dtype, bf16=bf16)
        found = answering_precision(RunPaths(made), made.stages[0].evaluate)
        assert found.bf16 is expected and (not found.why) == (bf16 is not None)
    processor_with(NONE)
    assert not answering_precision(RunPaths(made), made.stages[0].evaluate).bf16


def test_another_word_is_another_evaluation(
    tmp_path: Path, processor_with: Callable[[str], None], generated: list[torch.dtype]
) -> None:
    """Of the same model; and it doesn't bind what nobody says."""
    processor_with(NONE)
    made = recipe(tmp_path, {}, bf16=True)
    made.stages[0].keep_best = None
    run(made)
    assert generated == [torch.bfloat16] * 2
    unsaid = made.model_copy(deep=True)
    unsaid.stages[0].evaluate.bf16 = None
    found = evaluate_points(RunPaths(unsaid))["a"]["sums"]
    assert found["dtype"] == "float32" and generated[2:] == [torch.float32]
    evaluate_points(RunPaths(unsaid))
    assert len(generated) == 3


def test_a_large_model_answers_as_it_is_stored(
    tmp_path: Path, processor_with: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.models.load import machine_dtype

    processor_with(NONE)
    monkeypatch.setattr("sft.models.load.CPU_FLOAT32", 1000)
    machine_dtype.cache_clear()
    made = recipe(tmp_path, {})
    found = answering_precision(RunPaths(made), made.stages[0].evaluate)
    machine_dtype.cache_clear()
    assert found.bf16 and "too much memory" in str(found)


# ---- models that are named ----


def stored_in(folder: Path, dtype: str) -> str:
    """A model's folder whose files hold this type."""
    from sft.models.load import load_checkpoint

    load_checkpoint(str(write_start(folder)), dtype=dtype).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "stored, flags, dtype",
    [
        ("bfloat16", HARDWARE, "bfloat16"),
        ("bfloat16", NONE, "float32"),
        ("float32", HARDWARE, "float32"),
    ],
)
def test_a_named_model_answers_as_its_files_say(
    tmp_path: Path, processor_with: Callable[[str], None], stored: str, flags: str, dtype: str
) -> None:
    from peft import LoraConfig, get_peft_model

    name = stored_in(tmp_path / "model", stored)
    processor_with(flags)
    model, tokenizer = load_named(name)
    held = {key: value.dtype for key, value in model.named_parameters()}
    assert model.dtype == getattr(torch, dtype)
    assert {held[key] for key in held if "A_log" in key or "lambda" in key} == {torch.float32}
    get_peft_model(model, LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    adapted, _ = load_named(str(tmp_path / "adapter"))
    found = dict(adapted.get_base_model().named_parameters())
    assert adapted.dtype == getattr(torch, dtype)
    assert all(found[key.replace("fc1.", "fc1.base_layer.")].dtype == kind for key, kind in held.items())
    assert {value.dtype for key, value in found.items() if "lora_" in key} == {torch.float32}


def test_what_a_run_handed_on_is_stored_as_the_run_says(tmp_path: Path, processor_with: Callable[[str], None]) -> None:
    made = recipe(tmp_path, {"max_steps": 1})
    made.stages[0].evaluate.suites, made.stages[0].keep_best, made.stages[0].evaluate.every = [], None, None
    processor_with(HARDWARE)
    run(made)
    assert load_named(str(RunPaths(made).stage_dir("a")))[0].dtype == torch.bfloat16


def test_answers_of_a_named_model_go_on_as_they_began(
    in_tmp: Path, processor_with: Callable[[str], None], generated: list[torch.dtype]
) -> None:
    name = stored_in(in_tmp / "model", "bfloat16")
    write_problems(in_tmp / "held.jsonl", 3, first=50)
    (in_tmp / "sums.yaml").write_text("source: {path: held.jsonl}\ncolumns: {problem: question}\nmax_new_tokens: 4\n")
    section, paths = load_suites(["sums.yaml"]), RunPaths(small_recipe(in_tmp))
    processor_with(HARDWARE)
    for _ in range(2):
        evaluate_alone(name, section, Path("out"))
        evaluate_alone(name, section)
        evaluate_other(paths, name, None)
        processor_with(NONE)
    assert generated == [torch.bfloat16] * 3
    said = section.model_copy(update={"bf16": False})
    with pytest.raises(UserError, match="out holds answers of this model in bfloat16: name another --output_dir"):
        evaluate_alone(name, said, Path("out"))
    (point,) = evaluate_alone(name, said)
    assert point.startswith("model-") and generated[3:] == [torch.float32]
