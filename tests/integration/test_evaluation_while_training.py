"""Suites that are answered while a stage trains: no trace in what is trained, and the numbers of `sft eval`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from run_toys import small_recipe
from train_toys import read_metrics

from sft import generate
from sft.recipe import Recipe, RunPaths
from sft.report.collect import collect
from sft.report.figures import draw_all
from sft.run.chain import run, train
from sft.run.evaluation import evaluate_points
from sft.run.outlook import outlook
from sft.train.interrupt import Interrupted

KEYS = {"max_steps": 4, "save_steps": 2}
TIMES = ("seconds", "tokens_per_second", "data_wait", "memory_gib")


def recipe(root: Path, name: str, keys: dict[str, Any] | None = None, every: Any = None, **stage: Any) -> Recipe:
    """A run of one stage with a suite of sampled answers; `every`: how it is evaluated while it trains."""
    made = small_recipe(root, stages=({**KEYS, **(keys or {})},), first=stage).model_dump()
    made["output_dir"] = str(root / name)
    (one,) = made["stages"]
    (suite,) = one["evaluate"]["suites"]
    suite.update(temperature=1.0, samples_per_problem=2, batch_size=4)
    one["evaluate"] |= {"every": every, "before_first_stage": False}
    return Recipe.model_validate(made)


def lines(root: Path, name: str) -> list[dict[str, Any]]:
    """The log, but for the time that things take."""
    found = read_metrics(root / name / "stages/a/metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def losses(root: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in lines(root, name) if "loss" in line]


def asked(root: Path, name: str) -> list[int]:
    """The steps after which suites were answered."""
    return [line["step"] for line in lines(root, name) if "eval_sums/pass_at_1" in line]


def weights(root: Path, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / name / "stages/a/final").glob("*.safetensors")}


def answers(root: Path, name: str, where: str) -> bytes:
    return (root / name / where / "sums/samples.jsonl").read_bytes()


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each call of the engine began with."""
    calls: list[int] = []
    original = generate.generate_batch

    def counted(model: Any, tokenizer: Any, prompts: Any, **more: Any) -> Any:
        calls.append(len(prompts))
        return original(model, tokenizer, prompts, **more)

    monkeypatch.setattr(generate, "generate_batch", counted)
    return calls


@pytest.mark.parametrize(
    "keys",
    [
        {"bf16": False},
        {"bf16": True, "packing": True},
        {"bf16": True, "gradient_checkpointing": True, "neftune_noise_alpha": 5.0},
        {"use_peft": True, "lora_r": 2, "lora_dropout": 0.5},
    ],
    ids=["float32", "bfloat16", "checkpointing and noise", "adapters with dropout"],
)
def test_nothing_of_the_training_changes_and_the_answers_are_the_models(
    tmp_path: Path, keys: dict[str, Any], generated: list[int]
) -> None:
    """Those of the last step are taken over by the evaluation after the stage."""
    # A window that an evaluation falls into; steps that change answers.
    keys = {**keys, "logging_steps": 3, "learning_rate": 0.02}
    run(recipe(tmp_path, "off", keys))
    generated.clear()
    result = run(recipe(tmp_path, "on", keys, every="2 steps"))
    assert losses(tmp_path, "on") == losses(tmp_path, "off") and len(losses(tmp_path, "on")) == 1
    assert weights(tmp_path, "on") == weights(tmp_path, "off") != {}
    assert asked(tmp_path, "on") == [2, 4] and len(generated) == 2
    live = answers(tmp_path, "on", "stages/a/evaluations/step-4")
    assert len({json.loads(line)["completion"] for line in live.splitlines()}) > 3
    assert answers(tmp_path, "off", "eval/a") == live == answers(tmp_path, "on", "eval/a")
    assert answers(tmp_path, "on", "stages/a/evaluations/step-2") != live
    assert result["evaluations"]["a"]["sums"]["point"] == "a"
    told = [line for line in lines(tmp_path, "on") if "eval_sums/pass_at_1" in line][-1]
    after = result["evaluations"]["a"]["sums"]
    assert told["eval_sums/tokens"] == after["tokens"]["all"]["mean"] and told["eval_sums/cut_off"] == after["cut_off"]


def test_a_killed_run_looks_up_what_it_has_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generated: list[int]
) -> None:
    """Killed in its fourth step, it goes on from the second, and comes by the third again."""
    from sft.train.trainer import SambayTrainer

    run(recipe(tmp_path, "straight", every={"steps": 1}))
    again = recipe(tmp_path, "killed", every={"steps": 1})
    generated.clear()
    original = SambayTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise SystemExit
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SambayTrainer, "training_step", killed)
        with pytest.raises(SystemExit):
            run(again)
    assert len(generated) == 3 and asked(tmp_path, "killed") == [1, 2, 3]
    run(again)
    assert len(generated) == 4
    assert lines(tmp_path, "killed") == lines(tmp_path, "straight")
    assert weights(tmp_path, "killed") == weights(tmp_path, "straight")


def signal_in(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """A signal comes when the engine has given its first answer of its call with this number."""
    calls, original = [0], generate.generate_batch

    def signalled(model: Any, tokenizer: Any, prompts: Any, *, on_done: Any, **more: Any) -> Any:
        calls[0] += 1

        def done(index: int, generation: Any) -> None:
            on_done(index, generation)
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGTERM)

        return original(model, tokenizer, prompts, on_done=done, **more)

    monkeypatch.setattr(generate, "generate_batch", signalled)


def test_a_signal_ends_an_evaluation_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything saved; the same command answers what is left, and goes on."""
    run(recipe(tmp_path, "straight", every={"steps": 3}))
    again = recipe(tmp_path, "stopped", every={"steps": 3})
    with monkeypatch.context() as patch:
        signal_in(patch, 1)
        with pytest.raises(Interrupted, match="Stopped at step 3 of 4 of stage a, everything saved"):
            run(again)
    assert asked(tmp_path, "stopped") == []
    assert not (tmp_path / "stopped/stages/a/evaluations/step-3/sums/metrics.json").exists()
    run(again)
    logs = [
        sorted(json.dumps(line, sort_keys=True) for line in lines(tmp_path, name)) for name in ("straight", "stopped")
    ]
    assert logs[0] == logs[1]
    assert weights(tmp_path, "stopped") == weights(tmp_path, "straight")
    where = "stages/a/evaluations/step-3"
    assert sorted(answers(tmp_path, "stopped", where).splitlines()) == sorted(
        answers(tmp_path, "straight", where).splitlines()
    )


STOP = {"stop_when": {"metric": "sums", "patience": 2}}


def test_a_stage_ends_when_a_suite_gets_no_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights never do. Stopped in the evaluation that ends it, then killed in its hand-over, it ends there."""
    keys = {"max_steps": 40, "save_steps": 20}
    manifest = train(recipe(tmp_path, "straight", keys, every="2 steps", **STOP))["stages"]["a"]
    assert manifest["stopped"] == {"step": 6, "metric": "sums", "best": 0.0, "best_step": 2}
    assert manifest["steps"] == 6 and asked(tmp_path, "straight") == [2, 4, 6]
    again = recipe(tmp_path, "again", keys, every="2 steps", **STOP)
    with monkeypatch.context() as patch:
        signal_in(patch, 3)
        with pytest.raises(Interrupted, match="Stopped at step 6 of 40"):
            train(again)
    with monkeypatch.context() as patch:
        patch.setattr("sft.train.job.save_final", None)
        with pytest.raises(TypeError):
            train(again)
    other = train(again)["stages"]["a"]
    assert other["stopped"] == manifest["stopped"] and other["steps"] == 6
    assert weights(tmp_path, "again") == weights(tmp_path, "straight")


def test_one_that_gets_better_late_ends_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.evaluate import runner

    reached = iter([0.25, 0.5, 0.5, 0.25, 0.75, 0.25, 0.5, 1.0])

    def evaluate(model: Any, *args: Any, **more: Any) -> Any:
        return {"sums": {"pass_at_1": next(reached), "tokens": {"all": {"mean": 1.0}}, "cut_off": 0.0}}

    monkeypatch.setattr(runner, "evaluate", evaluate)
    keys = {"max_steps": 40, "save_strategy": "no"}
    manifest = train(recipe(tmp_path, "run", keys, every="1 step", **STOP))["stages"]["a"]
    assert manifest["stopped"] == {"step": 4, "metric": "sums", "best": 0.5, "best_step": 2}


def test_the_best_checkpoint_is_known_by_what_it_has_answered(tmp_path: Path, generated: list[int]) -> None:
    """But not by a few of the problems."""
    keys = {"save_steps": 1, "save_total_limit": 3}
    train(recipe(tmp_path, "whole", keys, every="1 step", keep_best="sums"))
    assert generated == [4, 4, 4, 4]
    compared = tmp_path / "whole/stages/a/compared/checkpoint-3/sums/metrics.json"
    assert json.loads(compared.read_text())["point"] == "checkpoint-3"
    generated.clear()
    few = {"steps": 1, "max_problems": 1}
    manifest = train(recipe(tmp_path, "few", keys, every=few, keep_best="sums"))["stages"]["a"]
    assert generated == [2] * 4 + [4] * 3 and sorted(manifest["best"]["scores"]) == [
        f"checkpoint-{n}" for n in (2, 3, 4)
    ]


def test_every_so_many_tokens(tmp_path: Path) -> None:
    """At the first step that reaches each multiple; a run that goes on from a checkpoint, too."""
    keys = {"max_steps": 6, "save_steps": 3}
    train(recipe(tmp_path, "off", keys))
    seen = [line["tokens"] for line in losses(tmp_path, "off")]
    tokens = seen[1] // 2 + 40
    expected = [n + 1 for n, now in enumerate(seen) if now // tokens > (seen[n - 1] if n else 0) // tokens]
    train(recipe(tmp_path, "on", keys, every=f"{tokens} tokens"))
    assert asked(tmp_path, "on") == expected and 1 < len(expected) < 6
    assert losses(tmp_path, "on") == losses(tmp_path, "off")


def test_what_is_told(tmp_path: Path) -> None:
    every = {"steps": 2, "max_problems": 2}
    made = recipe(tmp_path, "run", every=every, stop_when={"metric": "sums", "patience": 3})
    told = list(outlook(made))
    assert "   suites while it trains: sums, after each 2 steps, the first 2 problems of each" in told
    assert "   ends once sums has got no better for 3 evaluations" in told
    run(made)
    assert "while_training" in draw_all(collect(made, RunPaths(made)))
    assert list((tmp_path / "run/stages/a/tensorboard").glob("events*"))


def test_eval_says_the_same_later(tmp_path: Path) -> None:
    """On a run whose evaluation after the stage is gone, and by another command: nothing is taken over twice."""
    made = recipe(tmp_path, "run", every="4 steps")
    run(made)
    live = answers(tmp_path, "run", "stages/a/evaluations/step-4")
    (tmp_path / "run/stages/a/evaluations/step-4/sums/metrics.json").unlink()
    for path in [*(tmp_path / "run/eval/a/sums").glob("*"), tmp_path / "run/eval/a/manifest.json"]:
        path.unlink()
    found = evaluate_points(RunPaths(made), stage="a")["a"]["sums"]
    assert answers(tmp_path, "run", "eval/a") == live and found["resumed_samples"] == 0
