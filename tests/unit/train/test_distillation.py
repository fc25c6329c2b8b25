"""What a teacher says of each token reaches the loss at that token, through rows, collators and the trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loss_toys import documents, packed
from train_toys import VOCABULARY, ToyPrepared, read_metrics, saved_weights, tiny_qwen, tiny_sambay, train_toy

from sft.utils.errors import UserError

TRAIN = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 2, "max_grad_norm": 0.0}
SPLITS = [(False, 6, 1), (False, 1, 6), (True, 2, 1)]
COLUMNS = ("teacher_ids", "teacher_logprobs")


def with_teacher(rows: list[dict[str, Any]], k: int) -> list[dict[str, Any]]:
    """The rows with k tokens of a random teacher at each trained token; at some places it says nothing."""
    rng = np.random.default_rng(3)
    for row in rows:
        count = sum(row["assistant_masks"])
        ids = np.stack([rng.permutation(VOCABULARY)[:k] for _ in range(count)]) if count else np.zeros((0, k))
        scores = rng.normal(size=(count, k)) * 2
        log_probs = scores - np.log(np.exp(scores).sum(1, keepdims=True)) - (0.0 if k == VOCABULARY else 0.2)
        silent = rng.random(count) < 0.2
        ids[silent], log_probs[silent] = -1, 0.0
        row |= {"teacher_ids": ids.astype(np.int32).tolist(), "teacher_logprobs": log_probs.astype(np.float16).tolist()}
    return rows


def prepared(rows: list[dict[str, Any]], k: int) -> ToyPrepared:
    from datasets import Dataset, Features, List, Value

    kinds = {"input_ids": "int32", "assistant_masks": "uint8", "seq_lengths": "int32"}
    features = {name: List(Value(kind)) for name, kind in kinds.items()}
    features |= {name: List(List(Value(kind), k)) for name, kind in zip(COLUMNS, ("int32", "float16"), strict=True)}
    return ToyPrepared(Dataset.from_list(rows, features=Features(features)))


def dense(model: Any, rows: list[dict[str, Any]], weight: float) -> float:
    """(1 - w) nll + w KL(p || q) over the whole vocabulary, a mean over trained tokens; a silent teacher: nll alone."""
    summed, count = 0.0, 0
    for row in rows:
        ids, mask = torch.tensor(row["input_ids"]), np.array(row["assistant_masks"])
        log_q = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        for number, place in enumerate(np.flatnonzero(mask)):
            if place == 0:
                continue
            nll = -log_q[place - 1, ids[place]].item()
            named = torch.tensor(row["teacher_ids"][number])
            if named[0] < 0:
                summed += nll
            else:
                log_p = torch.tensor(row["teacher_logprobs"][number], dtype=torch.float64).log_softmax(-1)
                apart = (log_p.exp() * (log_p - log_q[place - 1, named])).sum().item()
                summed += (1 - weight) * nll + weight * apart
            count += 1
    return summed / count


@pytest.mark.parametrize("make", [tiny_sambay, tiny_qwen], ids=["sambay", "qwen3"])
def test_a_teacher_of_the_whole_vocabulary_is_a_dense_divergence(tmp_path, make):
    rows = with_teacher(documents(), VOCABULARY)
    wanted = dense(make().double().eval(), rows, 0.7)
    distill = {"weight": 0.7, "tail": "renormalize"}
    for packs, batch, accumulation in SPLITS:
        train = {**TRAIN, "packing": packs, "distill": distill, "per_device_train_batch_size": batch}
        train |= {"gradient_accumulation_steps": accumulation, "max_steps": 1}
        data = prepared(packed(rows) if packs else rows, VOCABULARY)
        _, paths = train_toy(tmp_path / f"{packs}-{batch}", train, model=make(), prepared=data)
        assert read_metrics(paths.metrics("one"))[0]["loss"] == pytest.approx(wanted, rel=2e-4)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "skewed"])
def test_however_a_step_is_split_the_same_is_learned_from_a_teacher(tmp_path, divergence):
    rows, runs = with_teacher(documents(), 4), []
    for packs, batch, accumulation in SPLITS:
        train = {**TRAIN, "packing": packs, "distill": {"divergence": divergence, "temperature": 2.0}}
        train |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        data = prepared(packed(rows) if packs else rows, 4)
        _, paths = train_toy(tmp_path / f"{packs}-{batch}", train, model=tiny_sambay(), prepared=data)
        runs.append(saved_weights(paths.final_dir("one")))
    for weights in runs[1:]:
        for name, weight in weights.items():
            torch.testing.assert_close(weight, runs[0][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("make", [tiny_sambay, tiny_qwen], ids=["sambay", "qwen3"])
def test_a_teacher_teaches_in_bfloat16_too(tmp_path, make, packs):
    rows, told = with_teacher(documents(), 4), []
    for bf16 in (False, True):
        train = {**TRAIN, "packing": packs, "per_device_train_batch_size": 2, "distill": {"weight": 0.7}, "bf16": bf16}
        data = prepared(packed(rows) if packs else rows, 4)
        _, paths = train_toy(tmp_path / str(bf16), train, model=make(), prepared=data)
        told.append(read_metrics(paths.metrics("one"))[0]["loss"])
    assert told[1] == pytest.approx(told[0], rel=0.02) and told[1] != told[0]


def test_accuracy_and_entropy_are_the_students(tmp_path):
    rows, told = with_teacher(documents(), 4), []
    for number, keys in enumerate(({}, {"distill": {"weight": 0.7}}, {"distill": {"divergence": "reverse"}})):
        train = {**TRAIN, "packing": True, "per_device_train_batch_size": 2, "max_steps": 1, **keys}
        _, paths = train_toy(tmp_path / str(number), train, model=tiny_sambay(), prepared=prepared(packed(rows), 4))
        told.append(read_metrics(paths.metrics("one"))[0])
    for line in told[1:]:
        assert line["mean_token_accuracy"] == told[0]["mean_token_accuracy"]
        assert line["entropy"] == pytest.approx(told[0]["entropy"], abs=2e-6)


def test_a_step_that_trains_nothing_has_no_teacher(tmp_path):
    """Six steps of a document each; one of them supervises nothing."""
    train = {**TRAIN, "max_steps": 6, "per_device_train_batch_size": 1, "distill": {}}
    manifest, _ = train_toy(tmp_path, train, model=tiny_sambay(), prepared=prepared(with_teacher(documents(), 4), 4))
    assert manifest["steps"] == 6


def test_rows_without_a_teacher_are_told(tmp_path):
    with pytest.raises(UserError, match="its loss reads teacher_ids, which the rows don't have"):
        train_toy(tmp_path, {**TRAIN, "distill": {}}, model=tiny_sambay())
