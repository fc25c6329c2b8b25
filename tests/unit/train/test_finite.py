"""A run whose numbers aren't finite stops, saves nothing that looks good, and says what is good."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from train_toys import read_metrics, saved_weights, tiny_qwen, tiny_sambay, train_toy

from sft.train.checkpoints import MARKER, read_marker, write_marker
from sft.train.finite import StepNumbers, weights_fault
from sft.train.trainer import SambayTrainer, _made_up_labels
from sft.utils.errors import UserError

HUGE = {"adam": {"learning_rate": 1e38}, "sgd": {"learning_rate": 1e30, "optim": "sgd", "max_grad_norm": 0.0}}


def checkpoints(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob(f"stages/one/*/{MARKER}"))


@pytest.mark.parametrize("saving", ["steps", "no"])
@pytest.mark.parametrize("huge", HUGE)
def test_one_step_at_a_huge_rate_is_not_done(tmp_path, huge, saving):
    """Nothing is logged after the step that breaks the weights: they are looked at when saved and handed on."""
    told = r"24 of 24 trainable tensors are not finite.*: training diverged\. No checkpoint .* --restart one"
    with pytest.raises(UserError, match=told):
        train_toy(tmp_path, {"max_steps": 1, "save_strategy": saving, **HUGE[huge]})
    assert not (tmp_path / "stages/one/final").exists() and not (tmp_path / "stages/one/manifest.json").exists()
    assert checkpoints(tmp_path) == []


def test_adapters_are_looked_at_too(tmp_path):
    with pytest.raises(UserError, match=r"76 of 76 trainable tensors are not finite"):
        train_toy(tmp_path, {"max_steps": 1, "use_peft": True, "learning_rate": 1e38}, model=tiny_sambay(seed=2))


def test_logging_now_and_then_hides_no_step(tmp_path):
    """The first bad step is told, and the checkpoint from before it is there, whole and finite."""
    train = {"max_steps": 20, "logging_steps": 20, "save_steps": 1, "warmup_steps": 9, **HUGE["adam"], "guard": None}
    with pytest.raises(UserError, match=r"training diverged\. The newest checkpoint .* is .*/checkpoint-\d+\.") as told:
        train_toy(tmp_path, train)
    good = Path(re.search(r"is (\S+/checkpoint-\d+)\.", str(told.value))[1])
    assert read_marker(good) is not None and checkpoints(tmp_path)[-1] == good.name
    assert all(tensor.isfinite().all() for tensor in saved_weights(good).values())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_one_bad_loss_in_a_long_window_is_enough(tmp_path, monkeypatch, number):
    original = SambayTrainer.training_step

    def training_step(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return torch.full_like(loss, number) if self.state.global_step == 2 else loss

    monkeypatch.setattr(SambayTrainer, "training_step", training_step)
    with pytest.raises(UserError, match=r"The loss is not a finite number at step 3: .*/checkpoint-2\."):
        train_toy(tmp_path, {"max_steps": 8, "logging_steps": 8, "save_steps": 2, "guard": None})
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def test_weights_that_give_no_finite_loss_are_no_checkpoint(tmp_path, monkeypatch):
    original = SambayTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss if torch.is_grad_enabled() else loss * float("nan")

    monkeypatch.setattr(SambayTrainer, "compute_loss", compute_loss)
    with pytest.raises(UserError, match="The weights after step 2 give no finite loss: training diverged"):
        train_toy(tmp_path, {"max_steps": 4, "save_steps": 2})
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize(("step", "good"), [(4, r"is .*/checkpoint-2\."), (2, "No checkpoint was saved before it")])
def test_a_checkpoint_that_is_not_finite_is_not_continued(tmp_path, step, good):
    """However it came to be: its files are as its marker says. At the last step only the hand-over is left to do."""
    train = {"max_steps": 4, "save_steps": 2, "keep_optimizer": True}
    train_toy(tmp_path, train)
    (tmp_path / "stages/one/manifest.json").unlink()
    if step == 2:
        shutil.rmtree(tmp_path / "stages/one/checkpoint-4")
    folder = tmp_path / f"stages/one/checkpoint-{step}"
    marker = read_marker(folder)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kept = {name: marker[name] for name in ("identity", "counters", "ran_on")}
    write_marker(folder, step=step, **kept)
    with pytest.raises(UserError, match=rf"1 of 24 trainable tensors are not finite.*{good}"):
        train_toy(tmp_path, train)
    assert not (tmp_path / "stages/one/manifest.json").exists()


def test_steps_are_noted_without_waiting_for_the_device():
    """Under fake tensors, reading a value raises."""
    numbers = StepNumbers()
    with FakeTensorMode():
        numbers.note(1, torch.zeros(()), torch.ones(()))
        numbers.note(2, torch.zeros(()), 1.0)
        batch = {"input_ids": torch.ones(1, 9, dtype=torch.long), "labels": torch.ones(1, 9, dtype=torch.long)}
        _made_up_labels({**batch, "cu_seq_lens_q": torch.zeros(4, dtype=torch.int32)})
        _made_up_labels({**batch, "attention_mask": torch.ones(1, 9, dtype=torch.long)})


@pytest.mark.parametrize(
    ("loss", "norm", "told"),
    [
        (1.0, 1.0, ""),
        (float("nan"), 1.0, "The loss is not a finite number at step 2"),
        (1.0, float("inf"), "The gradient norm is not a finite number at step 2"),
        (1.0, torch.tensor(float("nan")), "The gradient norm is not a finite number at step 2"),
        (1.0, -1.0, "The gradient norm is not a finite number at step 2"),
    ],
)
def test_the_first_bad_step_is_kept(loss, norm, told):
    numbers = StepNumbers()
    for step, (one, other) in enumerate([(1.0, 1.0), (loss, norm), (1.0, 1.0), (float("nan"), 1.0)][:3], start=1):
        numbers.note(step, torch.tensor(one), other)
    assert numbers.fault() == told


def test_the_optimizers_state_is_looked_at():
    model = tiny_qwen()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert weights_fault(model, optimizer) == "" == weights_fault(model, None)
    weight = model.model.layers[0].mlp.up_proj.weight
    optimizer.state[weight]["exp_avg_sq"][0, 0] = float("inf")
    assert weights_fault(model, optimizer) == "1 tensors of the optimizer are not finite"
    weight.data[0, 0] = 1e30
    assert weights_fault(model, optimizer).startswith("1 of 24 trainable tensors are not finite, or too large")
    weight.requires_grad_(False)
    assert weights_fault(model, None) == ""


def test_a_good_run_is_left_alone(tmp_path):
    """The look at the weights changes nothing: with dropout, a run that saves at each step is one that never does."""
    runs = []
    for saving in ({"save_steps": 1}, {"save_strategy": "no"}):
        train = {"max_steps": 4, "use_peft": True, "lora_dropout": 0.3, **saving}
        _, layout = train_toy(tmp_path / saving.get("save_strategy", "steps"), train, model=tiny_qwen())
        runs.append(
            (saved_weights(layout.final_dir("one")), [line["loss"] for line in read_metrics(layout.metrics("one"))])
        )
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0])
