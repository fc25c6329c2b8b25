"""Adapters' dropout belongs to the document: the same alone, padded, packed and in shares, computed once or again."""

from __future__ import annotations

import pytest
import torch
from loss_toys import documents, packed, prepared
from train_toys import read_metrics, saved_weights, tiny_qwen, tiny_sambay, train_toy

from sft.train.collator import TOKEN_KEYS, PackedCollator, PaddedCollator, token_keys
from sft.train.dropout import DocumentDropout, Drawn

ADAPTERS = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.3}
TRAIN = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 3, "max_grad_norm": 0.0}
SPLITS = [(False, 6, 1, False), (False, 1, 6, True), (False, 2, 3, False), (True, 2, 1, True), (True, 1, 2, False)]
"""Whether rows are packed, rows of a micro-batch, micro-batches, whether layers are computed again."""


def trained(root, make, split):
    packs, batch, accumulation, again = split
    train = {**TRAIN, **ADAPTERS, "packing": packs, "gradient_checkpointing": again}
    train |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    rows = documents(weighted=False)
    _, paths = train_toy(root, train, model=make(), prepared=prepared(packed(rows) if packs else rows))
    return [line["loss"] for line in read_metrics(paths.metrics("one"))], saved_weights(paths.final_dir("one"))


@pytest.mark.parametrize("make", [tiny_sambay, tiny_qwen], ids=["sambay", "qwen3"])
def test_however_a_step_is_split_the_same_is_dropped(tmp_path, make):
    runs = [trained(tmp_path / str(number), make, split) for number, split in enumerate(SPLITS)]
    for losses, weights in runs[1:]:
        assert losses == pytest.approx(runs[0][0], abs=2e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, runs[0][1][name], rtol=0, atol=1e-5)


def test_torch_s_own_dropout_would_be_told(tmp_path, monkeypatch):
    monkeypatch.setattr("sft.train.dropout.drop_by_documents", lambda model, seed: None)
    (_, one), (_, other) = (trained(tmp_path / str(n), tiny_sambay, SPLITS[n]) for n in (0, 1))
    assert max((one[name] - other[name]).abs().max().item() for name in one) > 1e-3


def test_it_drops_as_often_as_was_asked_and_not_twice_the_same():
    drawn = Drawn(seed=3)
    keys = torch.from_numpy(token_keys(torch.arange(4000).numpy(), torch.tensor([1000, 3000]).numpy()))[None]
    masks = []
    for number, epoch in ((1, 0), (2, 0), (1, 1)):
        drawn.epoch = epoch
        drawn.begin({TOKEN_KEYS: keys})
        out = DocumentDropout(0.25, number, drawn).train()(torch.ones(1, 4000, 64))
        assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
        masks.append(out[0] > 0)
    for mask in masks:
        assert mask.float().mean().item() == pytest.approx(0.75, abs=0.005)  # 3 deviations of an honest coin: 0.0026
        assert (mask.float().mean(0) - 0.75).abs().max() < 0.04 and (mask.float().mean(1) - 0.75).abs().max() < 0.3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (masks[one] == masks[other]).float().mean().item() == pytest.approx(0.625, abs=0.01)
    neighbours = (masks[0][1:] == masks[0][:-1]).float().mean().item()
    assert neighbours == pytest.approx(0.625, abs=0.01)
    module = DocumentDropout(0.25, 1, drawn).eval()
    assert torch.equal(module(torch.ones(1, 4000, 64)), torch.ones(1, 4000, 64))


def test_a_document_has_the_same_keys_wherever_it_lies():
    rows = [
        {"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1], "seq_lengths": [3]},
        {"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 1, 1], "seq_lengths": [4]},
        {"input_ids": [], "assistant_masks": [], "seq_lengths": []},
    ]
    first, second = (PackedCollator(keys=True)([row])[TOKEN_KEYS][0] for row in rows[:2])
    both = PackedCollator(keys=True)(rows)[TOKEN_KEYS][0]
    padded = PaddedCollator(keys=True)(rows)[TOKEN_KEYS]
    assert torch.equal(both, torch.cat([first, second])) and torch.equal(padded[1], second)
    assert torch.equal(padded[0, :3], first) and len(set(both.tolist())) == 7
    assert PaddedCollator(keys=True)(rows[2:])[TOKEN_KEYS].shape == (1, 2)
    assert TOKEN_KEYS not in PackedCollator()(rows)
