"""Rows of one optimizer step are dealt out by length; which rows a step has, and its gradient, stay what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from train_toys import read_metrics, saved_weights, tiny_qwen, tiny_sambay, toy_rows, train_toy

from sft.train.sampler import Balance, EpochOrder, balanced, row_lengths


def shares(order: list[int], lengths: np.ndarray, balance: Balance) -> np.ndarray:
    """Tokens of each micro-batch, (micro-batches, processes)."""
    return lengths[np.array(order)].reshape(-1, balance.processes, balance.rows).sum(2)


@pytest.mark.parametrize(("rows", "processes", "micro_batches"), [(1, 8, 8), (2, 4, 4), (4, 2, 1), (1, 1, 5)])
def test_a_step_keeps_its_rows_and_processes_wait_less(rows, processes, micro_batches):
    lengths = np.exp(np.random.default_rng(0).normal(7, 0.9, 4096)).astype(int)
    balance, group = Balance(rows, processes), rows * processes * micro_batches
    plain = EpochOrder(4096, seed=1, group=group)
    order = EpochOrder(4096, seed=1, lengths=lengths.tolist(), group=group, grouped=False, balance=balance)
    used: dict[str, list[float]] = {"plain": [], "by micro-batch": [], "by step": []}
    for start in range(0, 4096 - group, group):
        before, after = (found.of_epoch(3)[start : start + group] for found in (plain, order))
        assert sorted(before) == sorted(after)
        tokens = shares(after, lengths, balance)
        used["plain"].append(tokens.sum() / shares(before, lengths, balance).max(1).sum() / processes)
        used["by micro-batch"].append(tokens.sum() / tokens.max(1).sum() / processes)
        used["by step"].append(tokens.sum() / tokens.sum(0).max() / processes)
    found = {name: float(np.mean(values)) for name, values in used.items()}
    if (rows, processes) == (1, 8):
        assert found["plain"] < 0.4 and found["by micro-batch"] > 0.65 and found["by step"] > 0.8, found
    assert found["by micro-batch"] >= found["plain"] and found["by step"] >= found["by micro-batch"] - 1e-9


def test_a_step_that_is_not_full_is_left_alone():
    assert balanced([3, 1, 2], [9, 1, 5, 7], Balance(1, 2)) == [3, 1, 2]


def test_lengths_are_those_of_the_rows():
    dataset = toy_rows(7, packed=True).dataset
    expected = [len(row) for row in dataset["input_ids"]]
    assert row_lengths(dataset) == expected
    assert row_lengths(dataset.select([4, 2, 2]).with_format("numpy")) == [expected[4], expected[2], expected[2]]


@pytest.mark.parametrize("make", [tiny_sambay, tiny_qwen])
def test_the_gradient_is_the_same(tmp_path, monkeypatch, make):
    train = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    train |= {"optim": "sgd", "learning_rate": 0.1}
    runs = []
    for name, order in (("balanced", balanced), ("as drawn", lambda step, *_: list(step))):
        monkeypatch.setattr("sft.train.sampler.balanced", order)
        _, paths = train_toy(tmp_path / name, train, model=make(), prepared=toy_rows(14, packed=False))
        runs.append((read_metrics(paths.metrics("one")), saved_weights(paths.final_dir("one"))))
    for one, other in zip(runs[0][0], runs[1][0], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-6) and one["tokens"] == other["tokens"]
    for name, weight in runs[0][1].items():
        torch.testing.assert_close(weight, runs[1][1][name], rtol=0, atol=2e-6)
