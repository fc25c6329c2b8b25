"""The loss of held-out rows, against transformers' own model row by row; and that looking changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from train_toys import read_metrics, saved_weights, tiny_qwen, tiny_sambay, toy_rows, train_toy

from sft.train.interrupt import Interrupted
from sft.train.validation import Schedule, Validation
from sft.utils.errors import UserError

TRAIN: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "learning_rate": 3e-3}
STEPS = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}


def documents(prepared: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and masks of the documents in rows."""
    found = []
    for row in prepared.dataset:
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            found.append((row["input_ids"][part], row["assistant_masks"][part]))
            start += length
    return found


def row_by_row(model: Any, prepared: Any) -> tuple[float, int]:
    """The mean loss of all supervised tokens, each document alone, by the model itself; and their number."""
    total, tokens = 0.0, 0
    model = copy.deepcopy(model).float().eval()
    for ids, mask in documents(prepared):
        labels = torch.tensor([[token if trained else -100 for token, trained in zip(ids, mask, strict=True)]])
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
        total, tokens = total + float(loss) * count, tokens + count
    return total / tokens, tokens


def held_out_lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(path) if "eval_loss" in line]


def test_no_logits_of_a_whole_row_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 65,536 tokens and 200,064 logits for each would be 26 GB in bfloat16."""
    import sft.models.sambay.modeling_phi4flash as modeling

    model, seen = tiny_sambay(), []
    forward = modeling.LanguageModelHead.forward

    def noted(head: Any, hidden: Any, targets: Any = None, **options: Any) -> Any:
        seen.append(targets is None)
        return forward(head, hidden, targets, **options)

    monkeypatch.setattr(modeling.LanguageModelHead, "forward", noted)
    _, paths = train_toy(tmp_path, TRAIN, model=model, prepared=toy_rows(16, packed=False, held_out=7))
    assert len(held_out_lines(paths.metrics("one"))) == 2
    # But for the probes of how the model is run, before the first step.
    assert not any(seen[-len(seen) // 2 :]) and seen.count(True) < 20


@pytest.mark.parametrize("make", [tiny_qwen, tiny_sambay])
@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_the_models_own_row_by_row(make: Any, packed: bool, tmp_path: Path) -> None:
    prepared, model = toy_rows(16, packed=packed, held_out=7), make()
    wanted, tokens = row_by_row(model, prepared.validation)
    manifest, paths = train_toy(tmp_path, {**TRAIN, "packing": packed}, model=model, prepared=prepared)
    first, last = held_out_lines(paths.metrics("one"))
    assert (first["step"], last["step"]) == (0, 6) and first["eval_supervised_tokens"] == tokens
    assert first["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    after = row_by_row(type(model).from_pretrained(paths.final_dir("one")), prepared.validation)[0]
    assert last["eval_loss"] == pytest.approx(after, rel=1e-5) and after != pytest.approx(wanted, rel=1e-3)
    told = manifest["validation"]
    assert (told["loss_at_start"], told["loss_at_end"]) == (first["eval_loss"], last["eval_loss"])


@pytest.mark.parametrize(
    ("train", "stage"),
    [
        ({"ema": {"decay": 0.5}}, None),
        ({}, {"average": {"last": 2}}),
        ({}, {"average": {"with": "start", "weight": 0.5}}),
    ],
)
@pytest.mark.parametrize("make", [tiny_qwen, tiny_sambay])
def test_what_is_handed_on_has_a_loss_of_its_own(make: Any, train: Any, stage: Any, tmp_path: Path) -> None:
    prepared = toy_rows(16, packed=False, held_out=7)
    manifest, paths = train_toy(tmp_path, {**TRAIN, **train}, model=make(), prepared=prepared, stage=stage)
    handed_on = row_by_row(type(make()).from_pretrained(paths.final_dir("one")), prepared.validation)[0]
    told, last = manifest["validation"], held_out_lines(paths.metrics("one"))[-1]["eval_loss"]
    assert told["loss_at_end"] == pytest.approx(handed_on, rel=1e-5)
    assert told["loss_of_last_step"] == last != pytest.approx(handed_on, rel=1e-4)


def test_the_best_checkpoint_s_loss_is_told(tmp_path: Path) -> None:
    prepared = toy_rows(16, packed=False, held_out=7)
    suite = {"name": "words", "source": {"generate": {"family": "words", "rows": 2, "split": "test"}}}
    stage = {"keep_best": "words", "evaluate": {"suites": [suite]}}
    score = {2: 0.25, 4: 0.5, 6: 0.25}
    options = {"stage": stage, "prepared": prepared, "score": lambda folder, step: score[step]}
    manifest, paths = train_toy(tmp_path, {**TRAIN, "save_total_limit": 3}, **options)
    assert manifest["best"]["step"] == 4
    handed_on = row_by_row(type(tiny_qwen()).from_pretrained(paths.final_dir("one")), prepared.validation)[0]
    assert manifest["validation"]["loss_at_end"] == pytest.approx(handed_on, rel=1e-5)
    assert [line["step"] for line in held_out_lines(paths.metrics("one"))] == [0, 2, 4, 6]


def test_a_batch_of_any_size_and_adapters_with_dropout_give_the_same(tmp_path: Path) -> None:
    prepared = toy_rows(16, packed=False, held_out=7)
    wanted, _ = row_by_row(tiny_qwen(), prepared.validation)
    lora = {"use_peft": True, "lora_dropout": 0.5, "neftune_noise_alpha": 5.0}
    for size in (1, 3, 50):
        train = {**TRAIN, **lora, "per_device_eval_batch_size": size}
        _, paths = train_toy(tmp_path / str(size), train, prepared=prepared)
        assert held_out_lines(paths.metrics("one"))[0]["eval_loss"] == pytest.approx(wanted, rel=1e-5)


def test_looking_changes_nothing_of_what_is_trained(tmp_path: Path) -> None:
    """Bit for bit, with dropout; and every step's own line is there."""
    lora = {**TRAIN, "use_peft": True, "lora_dropout": 0.3}
    _, plain = train_toy(tmp_path / "plain", lora, prepared=toy_rows(16, packed=False))
    _, looked = train_toy(tmp_path / "looked", {**lora, **STEPS}, prepared=toy_rows(16, packed=False, held_out=5))
    weights = saved_weights(looked.final_dir("one"))
    assert weights and all(weights[n].equal(w) for n, w in saved_weights(plain.final_dir("one")).items())
    keys = ("step", "loss", "grad_norm", "tokens", "supervised_tokens")
    lines = [[line for line in read_metrics(paths.metrics("one")) if "loss" in line] for paths in (plain, looked)]
    assert [[line[key] for key in keys] for line in lines[0]] == [[line[key] for key in keys] for line in lines[1]]
    assert [line["step"] for line in held_out_lines(looked.metrics("one"))] == [0, 2, 4, 6]


@pytest.mark.parametrize("stop", [2, 3, 4, 6])
def test_a_stage_that_was_stopped_has_the_same_lines(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = toy_rows(16, packed=False, held_out=5)
    train = {**TRAIN, **STEPS, "save_steps": 3}
    _, straight = train_toy(tmp_path / "straight", train, prepared=prepared)
    on_step_end = Validation.on_step_end

    def told_to_stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, Interrupted)):
        patch.setattr(Validation, "on_step_end", told_to_stop)
        train_toy(tmp_path / "stopped", train, prepared=prepared)
    _, resumed = train_toy(tmp_path / "stopped", train, prepared=prepared)
    assert held_out_lines(resumed.metrics("one")) == held_out_lines(straight.metrics("one"))


def test_when_it_is_looked() -> None:
    def steps(schedule: Schedule, last: int = 10, epoch: int = 4) -> list[int]:
        return [step for step in range(1, last + 1) if schedule.due(step, last, epoch)]

    assert steps(Schedule()) == [10]
    assert steps(Schedule(steps=3)) == [3, 6, 9, 10]
    assert steps(Schedule(steps=0.25)) == [3, 6, 9, 10]  # as transformers rounds: up
    assert steps(Schedule(epochs=True)) == [4, 8, 10]
    assert steps(Schedule(steps=100)) == [10]


def test_a_loss_that_is_not_finite_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.train.validation.held_out_loss", lambda *_: (float("nan"), 5))
    with pytest.raises(UserError, match=r"loss of the held-out rows \(data.validation\) after step 0 isn't finite"):
        train_toy(tmp_path, TRAIN, prepared=toy_rows(16, packed=False, held_out=2))
