"""The loss counts each supervised token once; counters, weight decay, full fine-tuning in float32."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import concatenate_datasets
from train_toys import ToyPrepared, read_metrics, saved_weights, tiny_qwen, tiny_sambay, toy_recipe, toy_rows, train_toy

from sft.train.arguments import check_arguments
from sft.train.optimizer import takes_decay
from sft.train.trainer import SambayTrainer
from sft.utils.errors import UsageError, UserError


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("make", [tiny_qwen, tiny_sambay], ids=["qwen3", "sambay"])
def test_the_split_into_micro_batches_changes_nothing(tmp_path, make, packed):
    """1x8 = 2x4 = 8x1, on 19 rows: the last step is filled up with empty rows. SGD, because Adam blows up rounding."""
    prepared = toy_rows(19, packed=packed)
    runs = {}
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        train = {
            "packing": packed,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
        }
        manifest, paths = train_toy(tmp_path / str(batch), train, model=make(), prepared=prepared)
        losses = [line["loss"] for line in read_metrics(paths.metrics("one"))]
        runs[batch] = losses, saved_weights(paths.final_dir("one")), manifest["counters"]
    assert len(runs[8][0]) == 3
    for batch in (2, 1):
        assert runs[batch][0] == pytest.approx(runs[8][0], abs=1e-6)
        for name, weight in runs[8][1].items():
            torch.testing.assert_close(runs[batch][1][name], weight, rtol=0, atol=1e-6)
        for key in ("tokens", "supervised_tokens"):
            assert runs[batch][2][key] == runs[8][2][key]


def test_every_supervised_token_counts_once_an_epoch(tmp_path):
    prepared = toy_rows(13, packed=True)
    train = {"packing": True, "per_device_train_batch_size": 4, "num_train_epochs": 2}
    manifest, paths = train_toy(tmp_path, train, prepared=prepared)
    expected = 0
    for row in prepared.dataset:
        start = 0
        for length in row["seq_lengths"]:
            expected += sum(row["assistant_masks"][start + 1 : start + length])
            start += length
    assert manifest["counters"]["supervised_tokens"] == 2 * expected
    assert manifest["counters"]["tokens"] == 2 * sum(len(row["input_ids"]) for row in prepared.dataset)
    last = read_metrics(paths.metrics("one"))[-1]
    assert last["supervised_tokens"] == 2 * expected
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "tokens_per_second"} <= set(
        last
    )


@pytest.mark.parametrize("make", [tiny_qwen, tiny_sambay], ids=["qwen3", "sambay"])
def test_micro_batches_without_a_supervised_token_change_nothing(tmp_path, make):
    """Rows whose mask is all zero, as a whole micro-batch and as a whole step, give zero loss and zero gradients."""
    masked = toy_rows(4, packed=False, seed=1).dataset.map(lambda row: {"assistant_masks": [0] * len(row["input_ids"])})
    masked = masked.cast(toy_rows(1, packed=False).dataset.features)
    real = toy_rows(2, packed=False).dataset
    prepared = ToyPrepared(concatenate_datasets([masked, real, masked]))
    train = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "optim": "sgd",
    }
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, paths = train_toy(tmp_path, train, model=model, prepared=prepared)
    losses = [line["loss"] for line in read_metrics(paths.metrics("one"))]
    norms = [line["grad_norm"] for line in read_metrics(paths.metrics("one"))]
    assert losses[:2] == [0, 0] and losses[3:] == [0, 0] and losses[2] > 1
    assert norms[:2] == [0, 0] and norms[3:] == [0, 0] and norms[2] > 0
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_rows_that_only_fill_a_step_up_do_not_run_the_model(tmp_path, monkeypatch):
    """14 rows in steps of 40 micro-batches: 14 passes an epoch, and the same model as with one micro-batch a step."""
    runs, passes = [], []
    original = SambayTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        passes.append(torch.is_grad_enabled())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SambayTrainer, "compute_loss", compute_loss)
    for batch, accumulation in ((1, 40), (14, 1)):
        train = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        train |= {"num_train_epochs": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
        passes.clear()
        _, layout = train_toy(tmp_path / str(batch), train, model=tiny_sambay(), prepared=toy_rows(14, packed=False))
        assert sum(passes) == 2 * 14 / batch
        runs.append((read_metrics(layout.metrics("one")), saved_weights(layout.final_dir("one"))))
    assert [line["loss"] for line in runs[0][0]] == pytest.approx([line["loss"] for line in runs[1][0]], abs=1e-6)
    for name, weight in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], weight, rtol=0, atol=1e-6)


def test_weight_decay_leaves_state_space_lambdas_norms_and_biases_alone():
    model = tiny_sambay()
    decayed = {name for name, p in model.named_parameters() if takes_decay(name, p)}
    free = {name for name, _ in model.named_parameters()} - decayed
    for part in ("A_log", ".D", "lambda_q1", "subln", "layernorm", "bias"):
        assert any(part in name for name in free), part
        assert not any(part in name for name in decayed), part
    for part in ("embed_tokens", "in_proj.weight", "out_proj.weight", "conv1d.weight", "fc1.weight"):
        assert any(part in name for name in decayed), part
        assert not any(part in name for name in free), part


def test_weight_decay_groups_reach_the_optimizer(tmp_path):
    """On rows that supervise nothing, one step of AdamW does nothing but shrink the decayed parameters."""
    model = tiny_sambay()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masked = toy_rows(2, packed=False).dataset
    masked = masked.map(lambda row: {"assistant_masks": [0] * len(row["input_ids"])}).cast(masked.features)
    train = {
        "max_steps": 1,
        "learning_rate": 0.1,
        "weight_decay": 0.5,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
    }
    train_toy(tmp_path, train, model=model, prepared=ToyPrepared(masked))
    for name, p in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if takes_decay(name, p) else before[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-9, msg=name)


def test_full_fine_tuning_holds_float32_weights(tmp_path):
    model = tiny_qwen().to(torch.bfloat16)
    _, paths = train_toy(tmp_path, {"max_steps": 1}, model=model)
    assert {tensor.dtype for tensor in saved_weights(paths.final_dir("one")).values()} == {torch.float32}


def test_the_configuration_is_handed_on_as_it_came(tmp_path):
    model = tiny_qwen()
    before = model.config.to_dict()
    _, paths = train_toy(tmp_path, {"max_steps": 1, "gradient_checkpointing": True}, model=model)
    after = json.loads((paths.final_dir("one") / "config.json").read_text())
    # These two are filled in by any save.
    compared = before.keys() & after.keys() - {"dtype", "architectures"}
    assert {key: after[key] for key in compared} == {key: before[key] for key in compared}
    assert after["use_cache"] is True


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """Recomputed activations give the same losses and weights, bit for bit, in every layer of SambaY."""
    runs = []
    for on in (False, True):
        train = {"packing": True, "max_steps": 4, "per_device_train_batch_size": 2, "gradient_checkpointing": on}
        _, paths = train_toy(tmp_path / str(on), train, model=tiny_sambay())
        runs.append((read_metrics(paths.metrics("one")), saved_weights(paths.final_dir("one"))))
    assert [line["loss"] for line in runs[0][0]] == [line["loss"] for line in runs[1][0]]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_without_resume_old_checkpoints_go(tmp_path):
    train = {"max_steps": 4, "save_steps": 2}
    first, paths = train_toy(tmp_path, train)
    second, _ = train_toy(tmp_path, train, resume=False)
    assert second["final_loss"] == first["final_loss"]
    assert [line["step"] for line in read_metrics(paths.metrics("one"))] == [1, 2, 3, 4]


def test_lora_trains_float32_adapters_on_weights_that_stay(tmp_path):
    model = tiny_qwen().to(torch.bfloat16)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    _, paths = train_toy(tmp_path, {"max_steps": 2, "use_peft": True}, model=model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight, before)
    saved = saved_weights(paths.final_dir("one"))
    assert all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in saved.items())
    assert json.loads((paths.final_dir("one") / "base.json").read_text())["kind"] == "start"


@pytest.mark.parametrize("extra", [{"use_dora": True}, {"use_rslora": True}], ids=["dora", "rslora"])
def test_lora_variants_train(tmp_path, extra):
    train = {"max_steps": 8, "use_peft": True, "lora_dropout": 0.0, "packing": True, **extra}
    _, paths = train_toy(tmp_path, train, model=tiny_sambay())
    losses = [line["loss"] for line in read_metrics(paths.metrics("one"))]
    assert losses[-1] < losses[0]
    config = json.loads((paths.final_dir("one") / "adapter_config.json").read_text())
    assert all(config[key] is True for key in extra)


def test_a_diverging_run_stops_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"The gradient norm is not a finite number at step 2: training diverged"):
        train_toy(
            tmp_path, {"max_steps": 60, "learning_rate": 1e30, "optim": "sgd", "max_grad_norm": 0.0, "guard": None}
        )


def test_no_rows_are_told(tmp_path):
    nothing = ToyPrepared(toy_rows(1, packed=False).dataset.select([]))
    with pytest.raises(UserError, match="Stage one has no row to train on"):
        train_toy(tmp_path, {"max_steps": 1}, prepared=nothing)


def test_settings_that_cannot_be_met_are_usage_errors(tmp_path):
    (stage,) = toy_recipe(tmp_path, {"activation_offloading": True}).stages
    with pytest.raises(UsageError, match=r"stages\[one\]\.train\.activation_offloading: needs a GPU"):
        check_arguments(stage)
    with pytest.raises(UsageError, match=r"train\.lora_target_modules: .*nowhere"):
        train_toy(tmp_path, {"max_steps": 1, "use_peft": True, "lora_target_modules": ["nowhere"]})
