"""Steps that would do harm are left out, whole: their rows are told, and all else is as if they had not been taken."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_toys import read_metrics, saved_weights, signal_at, tiny_qwen, tiny_sambay, toy_rows, train_toy

import sft.train.trainer as trainer_module
from sft.recipe.guard_keys import GuardSection
from sft.recipe.train_keys import TrainSection
from sft.train.alerts import read_alerts
from sft.train.guard import Guard, robust_score
from sft.train.interrupt import Interrupted
from sft.train.marking import Marking
from sft.train.trainer import SambayTrainer
from sft.utils.errors import UserError

SETTINGS = {"spike": 8.0, "window": 16, "max_skipped": 3, "rollbacks": 1}


def guard(tmp_path: Path, clip: float = 1.0, **settings: Any) -> Guard:
    return Guard(GuardSection(**{**SETTINGS, **settings}), tmp_path, clip=clip)


@pytest.mark.parametrize(
    ("loss", "norm", "why"),
    [
        (2.0, 3.0, ""),
        (math.nan, 3.0, "its loss is not a finite number"),
        (2.0, math.inf, "its gradient norm is not a finite number"),
        (2.0, -1.0, "its gradient norm is not a finite number"),
        (30.0, 3.0, "its loss, 30, spikes"),
        (2.0, 90.0, "its gradient norm, 90, spikes"),
        (0.1, 0.001, ""),
    ],
)
def test_what_is_judged_harmful(tmp_path, loss, norm, why):
    watching = guard(tmp_path)
    for step in range(8):
        assert not watching.judge(2.0 + 0.1 * (step % 3), 3.0 + 0.2 * (step % 4))
    assert watching.judge(loss, norm) is bool(why)
    assert watching.why.startswith(why) and bool(watching.why) is bool(why)


def test_nothing_spikes_that_is_not_clipped_or_before_there_is_a_window(tmp_path):
    few, clipped, off = guard(tmp_path), guard(tmp_path, clip=100.0), guard(tmp_path, spike=None)
    for step in range(8):
        assert not clipped.judge(2.0, 3.0) and not off.judge(2.0, 3.0)
        assert not few.judge(2.0, 3.0) if step < 7 else few.judge(2.0, 90.0) is False
    assert not clipped.judge(2.0, 90.0) and not off.judge(1e6, 1e6)


def test_the_score_is_the_textbook_s():
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(0.3, 0.8, 65))
    logs = np.log(values)
    middle = np.median(logs)
    expected = (np.log(50.0) - middle) / (1.4826 * np.median(np.abs(logs - middle)))
    assert robust_score(50.0, values.tolist(), 1e-8) == pytest.approx(expected, rel=1e-12)
    assert robust_score(50.0, [1.0] * 9, 1e-8) == pytest.approx(math.log(50.0) / 0.25)


def poisoned(monkeypatch: Any, word: int, factor: float) -> None:
    """Micro-batches that hold token `word` give a loss times `factor`; everything else is as ever."""
    original = SambayTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        return loss * factor if (inputs["input_ids"] == word).any() and torch.is_grad_enabled() else loss

    monkeypatch.setattr(SambayTrainer, "compute_loss", compute_loss)


def rows_with(prepared: Any, word: int, times: int) -> Any:
    """Rows of which `times` hold the word, in their first document, which is not supervised there."""
    ids = [list(row) for row in prepared.dataset["input_ids"]]
    for row in ids:
        row[:] = [3 if token == word else token for token in row]
    for row in ids[:times]:
        row[0] = word
    features = prepared.dataset.features
    prepared.dataset = prepared.dataset.remove_columns("input_ids").add_column("input_ids", ids).cast(features)
    return prepared


TRAIN = {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_train_epochs": 2}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon", "sgd", "adafactor"])
def test_a_step_that_is_left_out_changes_nothing(tmp_path, monkeypatch, optim):
    """Of 7 steps an epoch one holds the row; a training that steps over those by hand comes to the same bits."""
    train = {**TRAIN, "optim": optim, "weight_decay": 0.1, "lr_scheduler_type": "constant", "save_strategy": "no"}
    prepared = rows_with(toy_rows(14, packed=True), 77, 1)
    with monkeypatch.context() as patch:
        poisoned(patch, 77, float("nan"))
        manifest, paths = train_toy(tmp_path / "guarded", train, model=tiny_sambay(), prepared=prepared)
    lines = [json.loads(line) for line in (paths.stage_dir("one") / "skipped_rows.jsonl").read_text().splitlines()]
    left_out = [line["step"] for line in lines]
    assert len(left_out) == 2 and manifest["left_out"] == {"steps": left_out, "returns": []}
    assert all(0 in line["rows"] and len(line["rows"]) == 2 for line in lines)
    assert all("0-0" in line["documents"][line["rows"].index(0)] for line in lines)
    assert all(line["why"] == "its loss is not a finite number" for line in lines)
    alerts = read_alerts(paths.alerts)
    assert [(one["kind"], one["step"], one["stage"]) for one in alerts] == [("diverging", s, "one") for s in left_out]

    original = SambayTrainer._get_grad_norm

    def by_hand(self, model, grad_norm=None):
        norm = original(self, model, grad_norm)
        if self.state.global_step + 1 in left_out:
            self.optimizer.zero_grad()
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(SambayTrainer, "_get_grad_norm", by_hand)
        _, other = train_toy(tmp_path / "by hand", {**train, "guard": None}, model=tiny_sambay(), prepared=prepared)
    weights, expected = saved_weights(paths.final_dir("one")), saved_weights(other.final_dir("one"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    metrics, wanted = read_metrics(paths.metrics("one")), read_metrics(other.metrics("one"))
    assert [line["step"] for line in metrics] == [step for step in range(1, 15) if step not in left_out]
    kept = [line for line in wanted if line["step"] not in left_out]
    assert [line["loss"] for line in metrics] == [line["loss"] for line in kept]
    assert metrics[-1]["skipped_steps"] == 2


def test_a_window_s_mean_is_that_of_the_steps_taken(tmp_path, monkeypatch):
    prepared = rows_with(toy_rows(14, packed=True), 77, 1)
    poisoned(monkeypatch, 77, float("inf"))
    runs = {}
    for every in (1, 7):
        train = {**TRAIN, "logging_steps": every}
        _, paths = train_toy(tmp_path / str(every), train, model=tiny_sambay(), prepared=prepared)
        runs[every] = [line for line in read_metrics(paths.metrics("one")) if "loss" in line]
    for number, line in enumerate(runs[7]):
        taken = [one["loss"] for one in runs[1] if 7 * number < one["step"] <= 7 * (number + 1)]
        assert len(taken) == 6 and line["loss"] == pytest.approx(np.mean(taken), rel=1e-5)
        assert line["mean_token_accuracy"] <= 1


def test_killed_and_resumed_it_leaves_out_the_same(tmp_path, monkeypatch):
    prepared = rows_with(toy_rows(14, packed=True), 77, 2)
    poisoned(monkeypatch, 77, 1e4)
    train = {**TRAIN, "num_train_epochs": 4, "save_steps": 3, "guard": SETTINGS}
    straight, paths = train_toy(tmp_path / "straight", train, model=tiny_sambay(), prepared=prepared)
    for stop in (12, 20):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            signal_at(patch, stop)
            train_toy(tmp_path / "resumed", train, model=tiny_sambay(), prepared=prepared)
        (tmp_path / "resumed/stages/one/skipped_rows.jsonl").write_text("what a kill left")
    resumed, again = train_toy(tmp_path / "resumed", train, model=tiny_sambay(), prepared=prepared)
    assert straight["left_out"] == resumed["left_out"] and len(straight["left_out"]["steps"]) >= 2
    files = [one.stage_dir("one") / "skipped_rows.jsonl" for one in (paths, again)]
    assert files[0].read_text() == files[1].read_text()
    weights = saved_weights(again.final_dir("one"))
    assert all(torch.equal(weights[name], one) for name, one in saved_weights(paths.final_dir("one")).items())


class LateMarking(Marking):
    """Marks a checkpoint when the next one is saved, or at the end: as late as it may."""

    late: Any = None

    def begin(self, work: Any) -> None:
        self.finish()
        self.late = work

    def finish(self) -> None:
        work, self.late = self.late, None
        if work is not None:
            work()


def test_a_checkpoint_knows_of_its_own_steps_however_late_it_is_marked(tmp_path, monkeypatch):
    """Both epochs hold rows that are left out, the second time with a return; every other step is saved."""
    known: dict[int, dict[str, Any]] = {}
    original = trainer_module.write_marker

    def write_marker(folder, *, step, counters, **rest):
        known[step] = counters
        original(folder, step=step, counters=counters, **rest)

    monkeypatch.setattr(trainer_module, "write_marker", write_marker)
    prepared = rows_with(toy_rows(14, packed=True), 77, 2)
    poisoned(monkeypatch, 77, float("nan"))
    train = {**TRAIN, "save_steps": 2, "guard": {**SETTINGS, "max_skipped": 2}, "save_total_limit": None}
    knew = {}
    for name, marking in (("at once", Marking), ("late", LateMarking)):
        monkeypatch.setattr(trainer_module, "Marking", marking)
        manifest, _ = train_toy(tmp_path / name, train, model=tiny_sambay(), prepared=prepared)
        knew[name] = {step: {**counters, "seconds": 0} for step, counters in known.items()}
        known.clear()
    assert knew["late"] == knew["at once"] and len(manifest["left_out"]["steps"]) > 2
    for step, counters in knew["late"].items():
        assert all(line["step"] <= step for line in counters["guard"]["skipped"])


def diverging(monkeypatch: Any, first: int, last: int) -> None:
    """From the end of step `first` to that of `last` the weights are far from where they were."""
    original = SambayTrainer._get_grad_norm

    def _get_grad_norm(self, model, grad_norm=None):
        if self.state.global_step + 1 in range(first, last + 1):
            self._tr_loss += torch.nan
        return original(self, model, grad_norm)

    monkeypatch.setattr(SambayTrainer, "_get_grad_norm", _get_grad_norm)


def test_too_many_return_to_a_checkpoint_and_go_on_past_them(tmp_path, monkeypatch):
    """Steps 6 to 8 are bad, and step 5 was taken since checkpoint 4: the stage goes on with the weights of that."""
    train = {"max_steps": 10, "save_steps": 2, "guard": {**SETTINGS, "max_skipped": 2}, "save_total_limit": None}
    train |= {"ema": {"decay": 0.5}}
    seen: dict[int, dict[str, torch.Tensor]] = {}
    diverging(monkeypatch, 6, 8)
    with monkeypatch.context() as patch:
        watch_weights(patch, seen)
        manifest, paths = train_toy(tmp_path, train)
    assert manifest["left_out"] == {"steps": [6, 7, 8], "returns": [{"step": 8, "to": 4}]} and manifest["steps"] == 10
    for name, weight in saved_weights(paths.stage_dir("one") / "checkpoint-4").items():
        assert torch.equal(seen[8][name], weight) and torch.equal(seen[5][name], seen[7][name])
    assert any(not torch.equal(seen[8][name], seen[7][name]) for name in seen[8])
    rates = [line["learning_rate"] for line in read_metrics(paths.metrics("one"))]
    straight = [0.01 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in (0, 1, 2, 3, 4, 8, 9)]
    assert rates == pytest.approx(straight)


def watch_weights(patch: Any, seen: dict[int, dict[str, torch.Tensor]]) -> None:
    from sft.train.memorised import EpochEnds

    original = EpochEnds.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        seen[state.global_step] = {name: p.detach().clone() for name, p in self._trainer.model.named_parameters()}
        return original(self, args, state, control, **kwargs)

    patch.setattr(EpochEnds, "on_step_end", on_step_end)


@pytest.mark.parametrize(("saving", "told"), [(2, "after 1 return"), (100, "No checkpoint was saved before it")])
def test_after_that_it_stops_with_a_sentence(tmp_path, monkeypatch, saving, told):
    diverging(monkeypatch, 6, 99)
    train = {"max_steps": 40, "save_steps": saving, "guard": {**SETTINGS, "max_skipped": 2}}
    with pytest.raises(UserError, match=r"3 of the last 16 steps would have done harm.*--restart one") as refused:
        train_toy(tmp_path, train)
    assert told in str(refused.value) and "skipped_rows.jsonl" in str(refused.value)
    assert "3 of the last 16 steps" in read_alerts(tmp_path / "alerts.jsonl")[-1]["message"]
    assert not (tmp_path / "stages/one/manifest.json").exists()


def test_a_curriculum_that_gets_harder_is_no_spike(tmp_path):
    watching = guard(tmp_path)
    rng = np.random.default_rng(0)
    for loss in [*rng.normal(0.5, 0.05, 40), *rng.normal(1.8, 0.2, 40)]:
        assert not watching.judge(float(loss), float(np.exp(rng.normal(0, 0.5))))


def test_the_default_changes_no_stage_that_is_done():
    assert "guard" not in TrainSection().effective()
    assert TrainSection(guard=None).effective()["guard"] is None
    assert TrainSection.model_validate({"guard": {"spike": 5}}).effective()["guard"]["spike"] == 5


def test_a_good_run_is_left_alone(tmp_path):
    weights = []
    for settings in ({}, {"guard": None}):
        _, paths = train_toy(tmp_path / str(len(weights)), {"max_steps": 4, **settings}, model=tiny_qwen())
        weights.append(saved_weights(paths.final_dir("one")))
        assert not (paths.stage_dir("one") / "skipped_rows.jsonl").exists() and not paths.alerts.exists()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
