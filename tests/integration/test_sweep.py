"""`sft sweep`: what points share is made once, each is the run that it would be alone, and it goes on after an end."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_toys import small_recipe
from train_toys import read_metrics, saved_weights

import sft.run.chain as chain
from sft.cli.main import main
from sft.recipe import RunPaths, load_recipe, resolved_yaml
from sft.run.sharing import LEFT, copy_folder
from sft.train.callbacks import StopOnSignal
from sft.utils.errors import UserError
from sft.utils.files import sha256_file

SWEPT = ("--stages.b.train.learning_rate", "1e-3,2e-3", "--stages.b.train.seed", "1,2")
NAMES = [f"learning_rate={rate},seed={seed}" for rate in ("0.001", "0.002") for seed in (1, 2)]
Sweep = Callable[..., int]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two stages with what it stands on."""
    root = tmp_path_factory.mktemp("sweep")
    (root / "r.yaml").write_text(resolved_yaml(small_recipe(root)))
    return root


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were trained, in order: `point: stage`."""
    found: list[str] = []
    original = chain.train_stage

    def train_stage(recipe: Any, stage: Any, **options: Any) -> Any:
        found.append(f"{Path(recipe.output_dir).name}: {stage.name}")
        return original(recipe, stage, **options)

    monkeypatch.setattr(chain, "train_stage", train_stage)
    return found


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The points that were answered, in order."""
    import sft.evaluate.runner as runner

    found: list[str] = []
    original = runner.evaluate

    def evaluate(*given: Any, **options: Any) -> Any:
        found.append(options["point"])
        return original(*given, **options)

    monkeypatch.setattr(runner, "evaluate", evaluate)
    return found


@pytest.fixture
def sweep(start: Path, tmp_path: Path) -> Sweep:
    """The command in a folder of its own; returns its status."""

    def run(*words: str) -> int:
        return main(["sweep", str(start / "r.yaml"), "--output_dir", str(tmp_path / "out"), *words])

    return run


def test_a_grid(
    sweep: Sweep, start: Path, tmp_path: Path, trained: list[str], evaluated: list[str], capsys: Any
) -> None:
    """What is swept is trained at each point, the rest once; a second call does nothing; each point is a plain run."""
    out = tmp_path / "out"
    assert sweep(*SWEPT) == 0
    assert trained == [f"{NAMES[0]}: a", *(f"{name}: b" for name in NAMES)]
    assert evaluated == ["start", "a", "b", "b", "b", "b"]
    told = capsys.readouterr()
    assert "mean of 2" in told.out and "Best by sums:pass@1: learning_rate 0.001 " in told.out
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted([*NAMES, "prepared"])
    inodes = {(out / name / "stages/a/final/model.safetensors").stat().st_ino for name in NAMES}
    assert len(inodes) == 1, "the weights lie on the disk once"
    trained.clear()
    evaluated.clear()
    before = {path: sha256_file(path) for path in out.glob("*/stages/*/final/*.safetensors")}
    assert sweep(*SWEPT, "--json") == 0
    assert trained == evaluated == []
    assert before == {path: sha256_file(path) for path in before}
    result = json.loads(capsys.readouterr().out)
    assert [point["name"] for point in result["points"]] == NAMES
    assert json.loads((out / "sweep.json").read_text()) == result
    best = load_recipe(out / "best.yaml")
    assert best.output_dir == str(out / NAMES[0]) and best.stages[1].train.learning_rate == 1e-3
    assert all(manifest.is_file() for manifest in map(RunPaths(best).stage_manifest, "ab"))
    assert "<svg" in (out / "sweep.html").read_text()
    words = ["--output_dir", str(tmp_path / "plain"), "--stages.b.train.learning_rate", "2e-3"]
    plain = RunPaths(load_recipe(start / "r.yaml", [*words, "--stages.b.train.seed", "2"]))
    chain.run(plain.recipe)
    for stage in "ab":
        weights = saved_weights(plain.final_dir(stage))
        other = saved_weights(out / NAMES[3] / "stages" / stage / "final")
        assert all((weights[name] == other[name]).all() for name in weights) and weights.keys() == other.keys()


def test_a_failed_point_is_told_and_the_others_go_on(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    original = chain.train_stage
    broken = {NAMES[0], NAMES[2]}

    def train_stage(recipe: Any, stage: Any, **options: Any) -> Any:
        name = Path(recipe.output_dir).name
        if stage.name == "b" and name in broken:
            raise UserError("training diverged.") if name == NAMES[0] else ValueError("a library's\nwords")
        return original(recipe, stage, **options)

    monkeypatch.setattr(chain, "train_stage", train_stage)
    assert sweep(*SWEPT) == 1
    told = capsys.readouterr()
    assert f"sft: {NAMES[0]}: training diverged.\n" in told.err and "Traceback" not in told.err
    assert f"sft: {NAMES[2]}: ValueError: a library's (run again with --debug" in told.err
    assert told.out.count("failed") == 2 and "none is the best" in told.out
    assert not (tmp_path / "out/best.yaml").exists()
    assert "training diverged." in (tmp_path / "out/sweep.html").read_text()
    broken.clear()
    assert sweep(*SWEPT) == 0 and (tmp_path / "out/best.yaml").exists()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_the_same_command_goes_on(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str], signum: int, status: int
) -> None:
    """In the second step of the second point's stage: with everything saved, and no step is taken twice."""
    original = StopOnSignal.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **given: Any) -> Any:
        if state.global_step == 2 and NAMES[1] in args.output_dir:
            os.kill(os.getpid(), signum)
        return original(self, args, state, control, **given)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", on_step_end)
        assert sweep(*SWEPT) == status
    assert trained == [f"{NAMES[0]}: a", f"{NAMES[0]}: b", f"{NAMES[1]}: b"]
    assert not (tmp_path / "out/sweep.json").exists()
    trained.clear()
    assert sweep(*SWEPT) == 0
    assert trained == [f"{name}: b" for name in NAMES[1:]]
    lines = read_metrics(tmp_path / "out" / NAMES[1] / "stages/b/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_a_damaged_stage_is_not_shared(sweep: Sweep, tmp_path: Path, trained: list[str], capsys: Any) -> None:
    assert sweep("--stages.b.train.max_steps", "1,2") == 0
    final = tmp_path / "out/max_steps=1/stages/a/final"
    content = bytearray((final / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (final / "model.safetensors").unlink()  # a link of its own: the other point keeps what it has
    (final / "model.safetensors").write_bytes(content)
    shutil.rmtree(tmp_path / "out/max_steps=2")
    trained.clear()
    assert sweep("--stages.b.train.max_steps", "2,1") == 1
    told = capsys.readouterr().err
    assert f"a: {final} is no longer what was trained there, so it isn't taken over" in told
    assert "max_steps=1: " in told and "is not what stage a made" in told
    assert trained == ["max_steps=2: a", "max_steps=2: b"]


def test_adapters_and_their_merged_base_are_shared(tmp_path: Path, trained: list[str]) -> None:
    lora = {"use_peft": True, "lora_dropout": 0.0}
    recipe = small_recipe(tmp_path, stages=({**lora, "lora_r": 2}, {**lora, "lora_r": 4}, {}))
    (tmp_path / "r.yaml").write_text(resolved_yaml(recipe))
    words = ["sweep", str(tmp_path / "r.yaml"), "--stages.c.train.max_steps", "1,2", "--metric", "sums"]
    assert main(words) == 0
    assert trained == ["max_steps=1: a", "max_steps=1: b", "max_steps=1: c", "max_steps=2: c"]
    assert (tmp_path / "run/max_steps=2/stages/b/base/config.json").is_file()
    paths = RunPaths(load_recipe(tmp_path / "run/max_steps=2/resolved.yaml"))
    shutil.rmtree(tmp_path / "run/max_steps=1")
    assert chain.run(paths.recipe)["stages"].keys() == {"a", "b", "c"}, "it stands on its own"


def test_a_rehearsal_tells_the_grid_and_writes_nothing(sweep: Sweep, tmp_path: Path, capsys: Any) -> None:
    assert sweep(*SWEPT, "--dry_run") == 0
    assert not (tmp_path / "out").exists()
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"small: 4 points of 2 stages in {tmp_path}/out, compared by sums:pass@1"
    assert told[1] == f"1. {NAMES[0]}: a to do, b to do" and told[4] == f"4. {NAMES[3]}: a as in 1, b to do"
    assert told[5].endswith("5 of 8 trainings are different ones")


REFUSED = [
    (("--seed", "1"), "nothing is swept: "),
    (("--stages.b.train.learning_rat", "1,2"), "--stages.b.train.learning_rat: unknown key, did you mean"),
    ((*SWEPT, "--metric", "sum"), "--metric sum:pass@1: the last stage, b, has no suite sum, did you mean sums?"),
    ((*SWEPT, "--metrik", "sums"), "--metrik: unknown key"),
    (("--stages.b.train.optim", "sgd,adamw_8bit"), "--stages.b.train.optim: adamw_8bit is bitsandbytes', whose"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), REFUSED)
def test_a_mistake_is_told_before_anything_runs(
    sweep: Sweep, tmp_path: Path, capsys: Any, words: tuple[str, ...], sentence: str
) -> None:
    assert sweep(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sft: {sentence}"), line
    assert not (tmp_path / "out").exists()


def test_a_launcher_is_refused(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sft.run.sweep.world_size", lambda: 2)
    assert sweep(*SWEPT) == 2
    assert "a sweep starts the processes of its points itself, and 2 were started" in capsys.readouterr().err


def test_a_copy_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as links where the file system has them; without what only the run itself needs."""
    source, target = tmp_path / "from", tmp_path / "to"
    for name in ("final/model.safetensors", "final/.cache", "checkpoint-3/model.safetensors", "manifest.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)

    def stopped(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.copy2", stopped)
        copy_folder(source, target, left=LEFT)
    assert list(tmp_path.iterdir()) == [source]
    for links in (True, False):
        if not links:
            monkeypatch.setattr("os.link", lambda *given: (_ for _ in ()).throw(OSError("no links")))
        copy_folder(source, target, left=LEFT)
        found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        assert found == {"final/model.safetensors", "manifest.json"}
        model = target / "final/model.safetensors"
        assert model.read_text() == "final/model.safetensors"
        assert (model.stat().st_ino == (source / "final/model.safetensors").stat().st_ino) == links
        assert (target / "manifest.json").stat().st_ino != (source / "manifest.json").stat().st_ino
