"""What a stage hands on: averages of its weights, exact, also after a stop; and when it ends before its last step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_toys import read_metrics, saved_weights, signal_at, tiny_qwen, tiny_sambay, toy_recipe, toy_rows, train_toy

from sft.models.average import rounded_once
from sft.models.save import save_model
from sft.recipe.data_checks import recipe_problems
from sft.recipe.outcome_keys import scheduled
from sft.train.checkpoints import MARKER
from sft.train.interrupt import Interrupted
from sft.utils.errors import UsageError, UserError
from sft.utils.files import read_json
from sft.utils.hashes import folder_hashes

STEPS = {"max_steps": 8, "save_steps": 2, "save_total_limit": 3, "lr_scheduler_type": "constant", "adam_epsilon": 1e-4}
EMA = {"decay": 0.8, "start": 2}
Weights = dict[str, torch.Tensor]


def train(root: Path, keys: dict[str, Any] | None = None, **stage: Any) -> tuple[dict[str, Any], Weights]:
    """A stage's manifest and what it handed on."""
    manifest, paths = train_toy(root, {**STEPS, **(keys or {})}, model=tiny_qwen(), stage=stage)
    return manifest, saved_weights(paths.final_dir("one"))


def checkpoints(root: Path, *steps: int) -> list[Weights]:
    folders = [root / f"stages/one/checkpoint-{step}" for step in steps]
    return [saved_only(folder) for folder in folders]


def saved_only(folder: Path) -> Weights:
    """A checkpoint's trained weights, without the average beside them."""
    return load_file(folder / "model.safetensors")


def steps_kept(root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (root / "stages/one").glob("checkpoint-*"))


def mean(parts: list[Weights]) -> Weights:
    return {name: (sum(part[name].double() for part in parts) / len(parts)).float() for name in parts[0]}


def equal(found: Weights, wanted: Weights) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def every_step(tmp_path_factory: pytest.TempPathFactory) -> list[Weights]:
    """The weights at the start and after each step, of the training that all tests here repeat."""
    root = tmp_path_factory.mktemp("every_step")
    train(root, {"save_steps": 1, "save_total_limit": None})
    start = {name: tensor for name, tensor in tiny_qwen().state_dict().items() if name != "lm_head.weight"}
    return [start, *checkpoints(root, *range(1, 9))]


def test_the_last_checkpoints(tmp_path: Path, every_step: list[Weights]) -> None:
    manifest, found = train(tmp_path, average={"last": 3})
    assert equal(found, mean([every_step[step] for step in (4, 6, 8)]))
    assert [(one["name"], one["weight"]) for one in manifest["average"]] == [
        (f"checkpoint-{step}", pytest.approx(1 / 3)) for step in (4, 6, 8)
    ]
    folder = tmp_path / "stages/one/checkpoint-4"
    assert manifest["average"][0]["files"] == folder_hashes(folder, ("model.safetensors",))


def test_checkpoints_by_name_are_kept_until_they_are_averaged(tmp_path: Path, every_step: list[Weights]) -> None:
    keys = {"save_total_limit": 2}
    _, found = train(tmp_path, keys, average={"checkpoints": [2, "checkpoint-6"]})
    assert equal(found, mean([every_step[2], every_step[6]]))
    assert steps_kept(tmp_path) == [2, 6, 8], "the newest is what a resume needs"


def test_with_the_start(tmp_path: Path, every_step: list[Weights]) -> None:
    """WiSE-FT, also where no checkpoint is saved; the start's copy is gone afterwards."""
    manifest, found = train(tmp_path, {"save_strategy": "no"}, average={"with": "start", "weight": 0.7})
    start, end = every_step[0], every_step[8]
    assert equal(found, {n: (0.7 * end[n].double() + (1 - 0.7) * start[n].double()).float() for n in end})
    assert [(one["name"], one["weight"]) for one in manifest["average"]] == [
        ("trained", 0.7), ("start", pytest.approx(0.3))
    ]  # fmt: skip
    assert not (tmp_path / "stages/one/start").exists()


def averaged_by_hand(every_step: list[Weights]) -> Weights:
    held = {name: tensor.clone() for name, tensor in every_step[2].items()}
    for weights in every_step[3:]:
        for name, tensor in held.items():
            tensor.lerp_(weights[name], 1 - 0.8)
    return held


def test_the_moving_average(tmp_path: Path, every_step: list[Weights]) -> None:
    manifest, found = train(tmp_path, {"ema": EMA})
    assert equal(found, averaged_by_hand(every_step))
    assert equal(checkpoints(tmp_path, 8)[0], every_step[8]), "training goes on from its own weights"
    (parent,) = manifest["average"]
    assert parent["name"] == "ema" and list(parent["files"]) == ["ema.safetensors"]


def test_the_moving_average_from_the_start_and_with_the_start(tmp_path: Path, every_step: list[Weights]) -> None:
    average = {"ema": True, "with": "start", "weight": 0.5}
    _, found = train(tmp_path, {"ema": {"decay": 0.5}, "save_strategy": "no"}, average=average)
    held = {name: tensor.clone() for name, tensor in every_step[0].items()}
    for weights in every_step[1:]:
        for name, tensor in held.items():
            tensor.lerp_(weights[name], 0.5)
    assert equal(found, {n: (0.5 * held[n].double() + 0.5 * every_step[0][n].double()).float() for n in held})


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "with the start"])
def test_weights_in_bfloat16_are_handed_on_so_and_rounded_once(tmp_path: Path, mixed: bool) -> None:
    """Each in the type that it is trained in, from the float32 average of the checkpoint; an export holds the same."""
    from sft.train.handover import load_final

    keys = {**STEPS, "weights_dtype": "bfloat16", "learning_rate": 1e-3, "ema": EMA}
    stage = {"average": {"ema": True, "with": "start", "weight": 0.7}} if mixed else None
    _, paths = train_toy(tmp_path, keys, model=tiny_qwen(), stage=stage)
    (trained,), found = checkpoints(tmp_path, 8), saved_weights(paths.final_dir("one"))
    held, start = load_file(tmp_path / "stages/one/checkpoint-8/ema.safetensors"), tiny_qwen().state_dict()
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32, torch.bfloat16}
    wanted = {}
    for name, tensor in trained.items():
        exact = held[name].double()
        if mixed:
            exact = 0.7 * exact + (1 - 0.7) * start[name].to(tensor.dtype).double()
        wanted[name] = rounded_once(exact, tensor.dtype)
    assert equal(found, wanted) and all(found[name].dtype == tensor.dtype for name, tensor in trained.items())
    assert read_json(paths.final_dir("one") / "config.json")["dtype"] == "bfloat16"
    model, _ = load_final(paths, paths.final_dir("one"), dtype="float32")
    save_model(tmp_path / "export", model, dtype="bfloat16")
    exported = saved_weights(tmp_path / "export")
    assert equal(exported, {name: tensor.bfloat16() for name, tensor in found.items()})


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize(
    ("keys", "stage"),
    [({"ema": EMA}, {}), ({}, {"average": {"last": 3}}), ({"save_strategy": "epoch"}, {"average": {"last": 2}})],
    ids=["ema", "last", "epochs"],
)
def test_stopped_and_resumed_is_straight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], stage: dict[str, Any], stop: int
) -> None:
    """A checkpoint that a signal had saved is none of the average's, and pushes none out that is."""
    _, straight = train(tmp_path / "straight", keys, **stage)
    with monkeypatch.context() as patch:
        signal_at(patch, stop)
        with pytest.raises(Interrupted):
            train(tmp_path / "resumed", keys, **stage)
    _, resumed = train(tmp_path / "resumed", keys, **stage)
    assert equal(resumed, straight)


GROUPS = [{"match": r"layers\.0\.", "learning_rate": 0.0}, {"match": "norm", "learning_rate": 0.05}]


@pytest.mark.parametrize(
    "keys",
    [{"optim": "muon", "adamw_learning_rate": 3e-3}, {"param_groups": GROUPS}, {"bf16": True}],
    ids=["muon", "groups", "bf16"],
)
def test_whatever_takes_the_steps_and_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    """Averages are of the float32 weights that are trained, and exact after a stop."""
    keys = {**keys, "save_steps": 1, "save_total_limit": None}
    _, straight = train(tmp_path / "ema", {**keys, "ema": EMA})
    every_step = checkpoints(tmp_path / "ema", *range(1, 9))
    assert equal(straight, averaged_by_hand([{}, *every_step]))
    assert {tensor.dtype for tensor in every_step[-1].values()} == {torch.float32}
    with monkeypatch.context() as patch:
        signal_at(patch, 5)
        with pytest.raises(Interrupted):
            train(tmp_path / "resumed", {**keys, "ema": EMA})
    assert equal(train(tmp_path / "resumed", {**keys, "ema": EMA})[1], straight)
    _, last = train(tmp_path / "last", keys, average={"last": 3})
    assert equal(last, mean(every_step[5:]))


def test_killed_while_averaging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half made is left, and the same call makes it."""
    _, straight = train(tmp_path / "straight", average={"last": 2, "with": "start", "weight": 0.5})

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sft.models.average.write_safetensors", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", average={"last": 2, "with": "start", "weight": 0.5})
    assert not (tmp_path / "killed/stages/one/final").exists()
    monkeypatch.setattr("sft.train.trainer.SambayTrainer.training_step", killed)
    manifest, found = train(tmp_path / "killed", average={"last": 2, "with": "start", "weight": 0.5})
    assert equal(found, straight) and manifest["steps"] == 8


def test_another_average_needs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_step: Any) -> None:
    train(tmp_path, average={"last": 3})
    monkeypatch.setattr("sft.train.trainer.SambayTrainer.training_step", None)
    assert equal(train(tmp_path, average={"last": 2})[1], mean([every_step[6], every_step[8]]))
    assert equal(train(tmp_path)[1], every_step[8])


def test_a_checkpoint_that_is_gone_or_of_another_training_is_not_averaged(tmp_path: Path) -> None:
    _, before = train(tmp_path, average={"last": 3})
    folder = tmp_path / "stages/one/checkpoint-4"
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint-4 is damaged \(model\.safetensors\)"):
        train(tmp_path, average={"checkpoints": [4, 8]})
    (folder / MARKER).unlink()
    with pytest.raises(UserError, match="checkpoint-4, which stage one hands on a part of, isn't there"):
        train(tmp_path, average={"checkpoints": [4, 8]})
    assert (tmp_path / "stages/one/manifest.json").exists() and equal(
        saved_weights(tmp_path / "stages/one/final"), before
    )


def test_a_sambay(tmp_path: Path) -> None:
    keys = {"packing": True, "max_steps": 3, "save_steps": 1}
    _, paths = train_toy(tmp_path, {**STEPS, **keys}, model=tiny_sambay(), stage={"average": {"last": 2}})
    assert equal(saved_weights(paths.final_dir("one")), mean(checkpoints(tmp_path, 2, 3)))


# ---- an end before the last step ----

KNOWN = {"max_steps": 200, "logging_steps": 3, "learning_rate": 2e-2, "save_steps": 50}


@pytest.fixture(scope="module")
def rows() -> Any:
    return toy_rows(8, packed=False, held_out=3)


def test_a_stage_ends_once_its_rows_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    """At the first line that says so; stopped and resumed, and killed before the hand-over, at the very same one."""
    stop = {"stop_when": {"token_accuracy": 0.9}}
    manifest, paths = train_toy(tmp_path / "straight", KNOWN, prepared=rows, stage=stop)
    lines = [line for line in read_metrics(paths.metrics("one")) if "loss" in line]
    reached = [line["mean_token_accuracy"] for line in lines]
    assert max(reached[:-1]) < 0.9 <= reached[-1]
    end = {"step": lines[-1]["step"], "mean_token_accuracy": reached[-1]}
    assert manifest["stopped"] == end and manifest["steps"] == end["step"] < 200
    held = [line["step"] for line in read_metrics(paths.metrics("one")) if "eval_loss" in line]
    assert held == [0, end["step"]], "held-out rows are looked at where it ends"
    wanted = saved_weights(paths.final_dir("one"))

    with monkeypatch.context() as patch:
        signal_at(patch, end["step"] - 2)  # in the middle of a window
        with pytest.raises(Interrupted):
            train_toy(tmp_path / "resumed", KNOWN, prepared=rows, stage=stop)
    with monkeypatch.context() as patch:
        patch.setattr("sft.train.job.save_final", None)
        with pytest.raises(TypeError):
            train_toy(tmp_path / "resumed", KNOWN, prepared=rows, stage=stop)
    again, paths = train_toy(tmp_path / "resumed", KNOWN, prepared=rows, stage=stop)
    assert again["stopped"] == end and equal(saved_weights(paths.final_dir("one")), wanted)


def test_one_that_never_gets_there_ends_at_its_last_step(tmp_path: Path, rows: Any) -> None:
    keys = {**KNOWN, "max_steps": 6}
    manifest, _ = train_toy(tmp_path, keys, prepared=rows, stage={"stop_when": {"token_accuracy": 1.0}})
    assert manifest["steps"] == 6 and manifest["stopped"] is None


def test_a_model_that_does_not_tell_its_accuracy_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Any
) -> None:
    monkeypatch.setattr("sft.train.probe.chunk_own_loss", lambda *_: False)
    with pytest.raises(UserError, match=r"stages\[one\]\.stop_when: this model's own loss doesn't tell"):
        train_toy(tmp_path, KNOWN, prepared=rows, stage={"stop_when": {"token_accuracy": 0.9}})


# ---- what is refused ----

SUITES = {"suites": [{"name": "math", "source": {"path": "math.jsonl"}}]}
BEST = {"keep_best": "math", "evaluate": SUITES}
KNOWS = {"stop_when": {"token_accuracy": 0.9}}


def every(steps: int) -> dict[str, Any]:
    """A stage that a suite may end, asked after each so many steps."""
    return {"evaluate": {**SUITES, "every": {"steps": steps}}, "stop_when": {"metric": "math", "patience": 1}}


def told(root: Path, keys: dict[str, Any], **stage: Any) -> list[str]:
    recipe = toy_recipe(root, {"max_steps": 8, "save_steps": 2, **keys}, stage=stage)
    return [f"{'.'.join(map(str, found.loc[2:]))}: {found.message}" for found in recipe_problems(recipe)]


@pytest.mark.parametrize(
    ("keys", "stage", "line"),
    [
        ({}, {"average": {"last": 3}}, "average.last: needs 3 checkpoints, and save_total_limit keeps 2: raise it"),
        ({"save_strategy": "no"}, {"average": {"last": 2}}, "average.last: needs checkpoints, and save_strategy is"),
        ({"save_steps": 8}, {"average": {"last": 2}}, "average.last: needs 2 checkpoints, and 1 are saved"),
        ({}, {"average": {"checkpoints": [3]}}, "average.checkpoints.0: no checkpoint is saved at step 3"),
        ({}, {"average": {"checkpoints": [10]}}, "average.checkpoints.0: no checkpoint is saved at step 10"),
        ({}, {"average": {"checkpoints": ["best"]}}, "average.checkpoints.0: is a step, or checkpoint-STEP"),
        ({}, {"average": {"checkpoints": [2, "checkpoint-2"]}}, "average.checkpoints: names one checkpoint twice"),
        ({}, {"average": {"last": 2, "checkpoints": [2]}}, "average.checkpoints: can't stand beside last"),
        ({}, {"average": {}}, "average: needs one of last, checkpoints, ema and `with: start`"),
        ({}, {"average": {"with": "start"}}, "average.with: goes with weight"),
        ({}, {"average": {"last": 2, "weight": 0.5}}, "average.weight: goes with `with: start`"),
        ({}, {"average": {"ema": True}}, "average.ema: needs `train.ema`"),
        ({"use_peft": True}, {"average": {"last": 2}}, "average: can't be of adapters: an average of their A"),
        ({"use_peft": True, "ema": EMA}, {}, "train.ema: can't be of adapters"),
        ({"ema": EMA}, {"average": {"last": 2}}, "train.ema: has no effect where `average` says what is handed on"),
        ({"ema": {"decay": 0.9, "start": 1.5}}, {}, "train.ema.start: is a whole number of steps"),
        (
            {"ema": {"decay": 0.9, "start": 9}},
            {},
            "train.ema.start: is where the average begins, and the stage ends at",
        ),
        (
            {},
            {"average": {"checkpoints": [2]}, "stop_when": {"token_accuracy": 0.9}},
            "average.checkpoints: can't stand beside stop_when",
        ),
        ({}, {"keep_best": "math"}, "keep_best: names no suite of this stage: it has none"),
        ({"save_total_limit": 1}, BEST, "keep_best: has one checkpoint to choose from, which is what save_total_limit"),
        ({"save_steps": 100}, BEST, "keep_best: has one checkpoint to choose from, that of step 8: save more often"),
        (
            {},
            every(8),
            "stop_when.metric: goes by answers after each 8 steps, and the stage has 8: lower evaluate.every",
        ),
        ({"logging_steps": 10}, KNOWS, "stop_when.token_accuracy: goes by lines of the log, and none comes before the"),
        ({"logging_steps": 0.99}, KNOWS, "stop_when.token_accuracy: goes by lines of the log, and none comes before"),
    ],
)
def test_what_can_not_be_is_told_before_anything_starts(
    tmp_path: Path, keys: dict[str, Any], stage: dict[str, Any], line: str
) -> None:
    assert [found for found in told(tmp_path, keys, **stage) if found.startswith(line)]


def test_an_average_that_never_began_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage that ends early hands on what it has, and says so."""
    keys = {"ema": {"decay": 0.9, "start": 6}, "logging_steps": 1}
    manifest, found = train(tmp_path, keys, stop_when={"token_accuracy": 1e-6})
    assert manifest["average"] is None and manifest["stopped"]["step"] < 6
    assert "before its average began (at step 6): hands on its last weights" in capsys.readouterr().err
    (last,) = checkpoints(tmp_path, manifest["steps"])
    assert equal(found, last)


def test_an_average_of_fewer_checkpoints_than_asked_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"logging_steps": 3, "save_total_limit": 4}
    manifest, _ = train(tmp_path, keys, average={"last": 4}, stop_when={"token_accuracy": 1e-6})
    assert [parent["name"] for parent in manifest["average"]] == ["checkpoint-2", "checkpoint-3"]
    assert "averages 2 checkpoints, of 4 asked: it ended at step 3" in capsys.readouterr().err


def test_a_checkpoint_that_wasn_t_saved_is_missed_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """save_steps may change while a stage is under way, but not past what is to be averaged."""
    keys, average = {"save_total_limit": 2}, {"last": 2}
    signal_at(monkeypatch, 6)
    with pytest.raises(Interrupted):
        train(tmp_path, keys, average=average)
    monkeypatch.undo()
    with pytest.raises(UserError, match="checkpoint-5, which stage one hands on a part of, isn't there"):
        train(tmp_path, {**keys, "save_steps": 5}, average=average)
    manifest, _ = train(tmp_path, keys, average=average)
    assert [parent["name"] for parent in manifest["average"]] == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize(
    ("keys", "stage"),
    [
        ({"save_steps": 7}, BEST),
        ({"save_steps": 100, "max_steps": -1}, BEST),
        ({}, every(7)),
        ({"max_steps": -1}, every(1000)),
        ({"logging_steps": 7}, KNOWS),
        ({"logging_steps": 10, "logging_first_step": True}, KNOWS),
    ],
)
def test_what_has_an_effect_or_may_have_one_is_not(tmp_path: Path, keys: dict[str, Any], stage: dict[str, Any]) -> None:
    assert told(tmp_path, keys, **stage) == []


def test_zero3_keeps_no_moving_average(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"stages\[one\]\.train\.ema: can't be kept under ZeRO-3"):
        train_toy(tmp_path, {**STEPS, "ema": EMA, "deepspeed": "zero3"})


def test_checkpoints_that_are_never_saved_are_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the rows tell how many steps there are."""
    monkeypatch.setattr("sft.train.trainer.SambayTrainer.training_step", None)
    keys = {"num_train_epochs": 1, "save_strategy": "epoch", "max_steps": -1}
    with pytest.raises(UsageError, match=r"stages\[one\]\.average\.last: needs 2 checkpoints, and 1 are saved"):
        train(tmp_path, keys, average={"last": 2})
    with pytest.raises(
        UsageError, match=r"stages\[one\]\.keep_best: has one checkpoint to choose from, that of step 2"
    ):
        train(tmp_path, keys, **BEST)
    with pytest.raises(UsageError, match=r"stages\[one\]\.stop_when\.metric: goes by answers after each 2 steps, and "):
        train(tmp_path, keys, **every(2))


def test_the_steps_that_are_saved_are_those_that_are_scheduled(tmp_path: Path) -> None:
    for number, keys in enumerate(({"save_steps": 3}, {"save_steps": 0.3}, {"save_strategy": "epoch"})):
        keys = {"save_total_limit": None, "max_steps": 7, **keys}
        _, paths = train_toy(tmp_path / str(number), {**STEPS, **keys}, prepared=toy_rows(16, packed=False))
        stage = paths.recipe.stages[0]
        assert steps_kept(tmp_path / str(number)) == scheduled(stage, 7, 7, 2)
