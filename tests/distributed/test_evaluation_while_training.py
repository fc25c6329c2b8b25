"""Two ranks answer suites while they train, on DDP and ZeRO: nothing of the training changes, and the answers are those
that the model in its folder gives to one process."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from live_worker import STEPS, recipe, write_llama
from ranks import run_ranks
from train_toys import read_metrics

from sft.recipe import RunPaths
from sft.run.evaluation import evaluate_points

QUICK, LONG = ("none-bf16", "zero3.lora-fp32", "zero3.llama-fp32"), ("zero2-bf16", "zero3-bf16")
CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in LONG)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case; those that are run together are run when the first is asked for."""

    @functools.cache
    def ran(cases: tuple[str, ...]) -> Path:
        root = tmp_path_factory.mktemp("live")
        write_llama(root)
        ends = run_ranks("live_worker.py", str(root), ",".join(cases), limit=400)
        assert [end.code for end in ends] == [0, 0], "\n".join(end.stderr[-3000:] for end in ends)
        return root

    return lambda case: ran(QUICK if case in QUICK else LONG) / case


def lines(root: Path, name: str) -> list[tuple[float, ...]]:
    """What training says in a run, but for the time that it takes."""
    kept = ("step", "loss", "grad_norm", "eval_loss", "tokens", "mean_token_accuracy", "entropy")
    found = read_metrics(root / name / "stages/s0/metrics.jsonl")
    return [tuple(line.get(key) for key in kept) for line in found if "loss" in line or "eval_loss" in line]


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_the_training_changes(folder: Callable[[str], Path], case: str) -> None:
    root = folder(case)
    assert lines(root, "on") == lines(root, "off")
    assert len(lines(root, "on")) > STEPS
    final = [
        {path.name: path.read_bytes() for path in (root / name / "stages/s0/final").glob("*.safetensors")}
        for name in ("on", "off")
    ]
    assert final[0] and final[0] == final[1]


@pytest.mark.parametrize("case", CASES)
def test_the_answers_are_those_of_the_model_in_its_folder(
    folder: Callable[[str], Path], case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two processes after training, and of one that loads it; those at the last step aren't given again."""
    root = folder(case)
    live = (root / f"on/stages/s0/evaluations/step-{STEPS}/words/samples.jsonl").read_bytes()
    assert live.count(b"\n") == 6 and len({json.loads(line)["completion"] for line in live.splitlines()}) > 3
    assert (root / "off/eval/s0/words/samples.jsonl").read_bytes() == live
    assert (root / "on/eval/s0/words/samples.jsonl").read_bytes() == live
    after = json.loads((root / "result.json").read_text())["s0"]["words"]
    last = read_metrics(root / "on/stages/s0/metrics.jsonl")
    (told,) = (line for line in last if line["step"] == STEPS and "eval_words/pass_at_1" in line)
    assert (told["eval_words/pass_at_1"], told["eval_words/cut_off"]) == (after["pass_at_1"], after["cut_off"])
    assert after["point"] == "s0" and after["resumed_samples"] == 0

    alone = RunPaths(recipe(root / "off", case))
    for path in (root / "off/eval/s0/words").glob("*"):
        path.unlink()
    (root / "off/eval/s0/manifest.json").unlink()
    evaluate_points(alone, stage="s0")
    assert (root / "off/eval/s0/words/samples.jsonl").read_bytes() == live


def test_a_signal_to_one_process_ends_the_evaluation_of_all(folder: Callable[[str], Path]) -> None:
    """It is saved and begun again; what was answered by then is kept."""
    root = folder(QUICK[0])
    for rank in (0, 1):
        told = (root / f"stopped-{rank}.txt").read_text()
        assert told.startswith(f"Stopped at step 2 of {STEPS} of stage s0, everything saved."), told
    assert lines(root, "stopped") == lines(root, "off")
    for step in (2, STEPS):
        where = f"stages/s0/evaluations/step-{step}/words/samples.jsonl"
        assert (root / "stopped" / where).read_bytes() == (root / "on" / where).read_bytes()
