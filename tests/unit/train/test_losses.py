"""Every loss of `train.loss` is its plain definition, however a step's documents are split, packed or padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loss_toys import LOSSES, WEIGHTS, documents, packed, plain_loss, prepared
from pydantic import ValidationError
from sambay_kernels.ops.linear_cross_entropy.inputs import LceInputs
from sambay_kernels.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from train_toys import read_metrics, saved_weights, tiny_qwen, tiny_sambay, toy_recipe, train_toy

from sft.recipe import TrainSection
from sft.train.collator import PackedCollator, PaddedCollator, label_weights
from sft.train.objective import Objective
from sft.train.probe import accepted_inputs, chunk_own_loss
from sft.utils.errors import UserError

TRAIN = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 2, "max_grad_norm": 0.0}
SPLITS = [(False, 6, 1), (False, 1, 6), (False, 2, 3), (True, 2, 1), (True, 1, 2)]
"""Whether rows are packed, rows of a micro-batch, micro-batches: each a step of all documents."""


def rows_of(loss: dict[str, Any]) -> list[dict[str, Any]]:
    return documents(weighted="weights" in loss)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_however_a_step_is_split_the_same_is_trained(tmp_path, loss):
    runs, rows = [], rows_of(loss)
    for packs, batch, accumulation in SPLITS:
        train = {**TRAIN, "packing": packs, "loss": loss}
        train |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        data = prepared(packed(rows) if packs else rows)
        root = tmp_path / f"{packs}-{batch}"
        _, paths = train_toy(root, train, model=tiny_sambay(), prepared=data)
        runs.append((read_metrics(paths.metrics("one")), saved_weights(paths.final_dir("one"))))
    wanted = plain_loss(tiny_sambay().double().eval(), rows, loss).item()
    for metrics, weights in runs:
        assert metrics[0]["loss"] == pytest.approx(wanted, rel=1e-5)
        assert [line["loss"] for line in metrics] == pytest.approx([line["loss"] for line in runs[0][0]], abs=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, runs[0][1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [tiny_sambay, tiny_qwen], ids=["sambay", "qwen3"])
def test_accuracy_and_entropy_are_the_models_whatever_it_is_trained_for(tmp_path, make):
    told = []
    for number, loss in enumerate(LOSSES):
        train = {**TRAIN, "packing": True, "loss": loss, "max_steps": 1, "gradient_accumulation_steps": 2}
        _, paths = train_toy(tmp_path / str(number), train, model=make(), prepared=prepared(packed(rows_of(loss))))
        told.append(read_metrics(paths.metrics("one"))[0])
    for line in told[1:]:
        assert line["mean_token_accuracy"] == told[0]["mean_token_accuracy"]
        assert line["entropy"] == pytest.approx(told[0]["entropy"], abs=2e-6)


@pytest.mark.parametrize("loss", LOSSES[-2:], ids=str)
def test_another_family_trains_it_through_the_chunked_head(tmp_path, loss):
    rows = rows_of(loss)
    runs = []
    for packs, batch, accumulation in SPLITS[1], SPLITS[3]:
        train = {**TRAIN, "packing": packs, "loss": loss}
        train |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        data = prepared(packed(rows) if packs else rows)
        _, paths = train_toy(tmp_path / str(packs), train, model=tiny_qwen(), prepared=data)
        runs.append((read_metrics(paths.metrics("one")), saved_weights(paths.final_dir("one"))))
    wanted = plain_loss(tiny_qwen().double().eval(), rows, loss).item()
    for metrics, weights in runs:
        assert metrics[0]["loss"] == pytest.approx(wanted, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, runs[0][1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [tiny_sambay, tiny_qwen], ids=["sambay", "qwen3"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_values_and_gradients_in_float64(make, loss):
    """The sum over the micro-batches of a step, as the trainer makes it, against the definition: to 1e-12 (a Qwen3's
    norms round to float32 whatever it is in)."""
    tolerance = 1e-12 if make is tiny_sambay else 1e-7
    rows, objective = rows_of(loss), Objective.of(TrainSection.model_validate({"loss": loss}))
    model = make().double().train()
    leaves = list(model.parameters())
    chunked = make is tiny_qwen and chunk_own_loss(model, PackedCollator())
    splits = ([packed(rows)], [[row] for row in rows], [rows], [rows[:4], rows[4:]])
    found = []
    for collator in (PackedCollator(0, objective.normalize), PaddedCollator(0, objective.normalize)):
        for batches in splits if isinstance(collator, PackedCollator) else splits[1:]:
            made = [collator(batch) for batch in batches]
            total = torch.tensor(sum(batch["num_weighted"] for batch in made), dtype=torch.float64)
            loss_of_step = 0.0
            for batch in made:
                inputs = accepted_inputs(model, {k: v for k, v in batch.items() if k != WEIGHTS})
                said = objective.arguments(batch)
                loss_of_step += model(**inputs, **said, num_items_in_batch=total, use_cache=False).loss
            found.append([loss_of_step.detach(), *torch.autograd.grad(loss_of_step, leaves, allow_unused=True)])
    assert chunked or make is tiny_sambay
    model = make().double().train()
    wanted = plain_loss(model, rows, loss)
    exact = [wanted.detach(), *torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)]
    for got in found:
        for value, true in zip(got, exact, strict=True):
            assert (value is None) == (true is None)
            if true is not None:
                assert (value - true).abs().max() <= tolerance * max(1.0, float(true.abs().max()))


DISTILL = [
    {"weight": 0.5},
    {"weight": 1.0, "divergence": "reverse", "tail": "renormalize", "temperature": 2.0},
    {"weight": 0.3, "divergence": "skewed", "alpha": 0.2},
]


def teacher_of(rows: list[dict[str, Any]], k: int = 5) -> dict[str, torch.Tensor]:
    """A random teacher's best tokens for each token of `rows`, end to end; silent on every fourth."""
    ids = [token for row in rows for token in row["input_ids"]]
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(len(ids), 96, generator=generator, dtype=torch.float64).mul(2).log_softmax(1)
    log_probs, named = table.topk(k)
    named[::4] = -1
    return {"teacher_ids": named[None], "teacher_logprobs": log_probs[None]}


@pytest.mark.parametrize("make", [tiny_sambay, tiny_qwen], ids=["sambay", "qwen3"])
@pytest.mark.parametrize("distill", DISTILL, ids=str)
def test_a_teacher_s_tokens_stand_where_their_labels_do(make, distill):
    """Packed and one by one, with logits beside the loss and without: values and gradients are the definition's."""
    rows, tolerance = documents(), 1e-10 if make is tiny_sambay else 1e-7
    objective = Objective.of(TrainSection.model_validate({"distill": distill}))
    model = make().double()
    chunk_own_loss(model.eval(), PackedCollator())
    model.train()
    batch = {**PackedCollator()(packed(rows)), **teacher_of(rows)}
    starts = np.cumsum([0, *(len(row["input_ids"]) for row in rows)])
    parts = [
        {**PackedCollator()([row]), **{name: value[:, start:end] for name, value in teacher_of(rows).items()}}
        for row, start, end in zip(rows, starts[:-1], starts[1:], strict=True)
    ]
    total = torch.tensor(batch["num_supervised"])

    def loss(of: list[dict[str, Any]], **how: Any) -> torch.Tensor:
        plain = [{k: v for k, v in one.items() if k not in ("teacher_ids", "teacher_logprobs")} for one in of]
        return sum(
            model(**accepted_inputs(model, told), **objective.arguments(one), num_items_in_batch=total, **how).loss
            for one, told in zip(of, plain, strict=True)
        )

    leaves = [p for p in model.parameters() if p.requires_grad]
    whole, split = (loss(of, use_cache=False) for of in ([batch], parts))
    named = batch["teacher_ids"][0].roll(-1, 0), batch["teacher_logprobs"][0].roll(-1, 0)
    logits = torch.cat([model(input_ids=part["input_ids"], use_cache=False).logits[0] for part in parts])
    targets = batch["labels"][0].roll(-1)
    told = objective.options
    own = (told["distill_weight"], told["divergence"], told["skew"], told["tail"], told["temperature"])
    identity = torch.eye(96, dtype=torch.float64)
    inputs = LceInputs(logits, identity, targets, -100, 0.0, 0.0, 256, None, "nll", 0.0, *named, *own)
    wanted = linear_cross_entropy_reference(inputs) / total
    grads = [torch.autograd.grad(x, leaves, allow_unused=True) for x in (whole, split, wanted)]
    assert abs(whole - wanted) <= tolerance and abs(split - wanted) <= tolerance
    for one, two, true in zip(*grads, strict=True):
        assert true is None or max((one - true).abs().max(), (two - true).abs().max()) <= tolerance
    if make is tiny_sambay:
        with torch.no_grad():
            assert abs(loss([batch], skip_logits=False) - wanted) <= tolerance


def test_held_out_rows_keep_the_plain_loss(tmp_path):
    """So that stages with other losses can be compared."""
    seen = []
    rows = documents(weighted=True)
    for loss in ({}, {"type": "dft", "weights": "weight", "label_smoothing": 0.3}, {"normalize": "sample"}):
        data = prepared(rows)
        data.validation = prepared(documents(weighted="weights" in loss))
        data.validation.manifest.update({"documents": 6, "tokens": 0, "supervised_tokens": 0})
        train = {**TRAIN, "learning_rate": 0.0, "eval_strategy": "epoch", "per_device_train_batch_size": 6}
        manifest, _ = train_toy(tmp_path / str(len(seen)), {**train, "loss": loss}, prepared=data)
        seen.append(manifest["validation"]["loss_at_start"])
    assert seen[1] == seen[0] and seen[2] == seen[0]


def test_what_a_label_weighs():
    supervised, lengths = np.array([0, 1, 1, 0, 1, 0, 0], dtype=bool), np.array([3, 2, 2])
    assert label_weights(supervised, lengths, None, "token") == (None, 3.0)
    weights, total = label_weights(supervised, lengths, None, "sample")
    assert weights.tolist() == [0, 0.5, 0.5, 0, 1, 0, 0] and total == 2.0
    given = np.array([9, 1, 3, 9, 0.5, 9, 9])
    weights, total = label_weights(supervised, lengths, given, "token")
    assert weights.tolist() == [0, 1, 3, 0, 0.5, 0, 0] and total == 4.5
    weights, total = label_weights(supervised, lengths, given, "sample")
    assert weights.tolist() == [0, 0.5, 1.5, 0, 0.5, 0, 0] and total == 2.5


def test_a_loss_of_the_models_own_is_told(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    with pytest.raises(UserError, match=r"stages\[one\].train.loss: Gemma2ForCausalLM makes its loss in a way of its"):
        train_toy(tmp_path, {"max_steps": 1, "loss": {"type": "dft"}}, model=model)


BAD = [
    ({"type": "focal"}, "'nll', 'dft', 'power' or 'threshold'"),
    ({"type": "power"}, "is needed with `type: power`"),
    ({"type": "power", "alpha": 0.0}, "alpha"),
    ({"type": "power", "alpha": -1.0}, "alpha"),
    ({"alpha": 1.0}, "has no effect without `type: power`"),
    ({"type": "threshold"}, "is needed with `type: threshold`"),
    ({"type": "threshold", "threshold": 1.0}, "threshold"),
    ({"type": "threshold", "threshold": 0.0}, "threshold"),
    ({"type": "dft", "threshold": 0.5}, "has no effect without `type: threshold`"),
    ({"normalize": "batch"}, "'token' or 'sample'"),
    ({"label_smoothing": 1.5}, "label_smoothing"),
    ({"z_loss": -1e-4}, "z_loss"),
    ({"weights": ""}, "weights"),
    ({"gamma": 2.0}, "gamma"),
]


@pytest.mark.parametrize(("loss", "message"), BAD, ids=str)
def test_a_bad_setting_is_named(tmp_path, loss, message):
    with pytest.raises(ValidationError) as told:
        toy_recipe(tmp_path, {"loss": loss})
    assert len(told.value.errors()) == 1 and message in str(told.value)
    assert told.value.errors()[0]["loc"][:4] == ("stages", 0, "train", "loss")
