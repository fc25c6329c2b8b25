"""NEFTune's noise is the document's own: its size, its values, whatever row it stands in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from train_toys import read_metrics, saved_weights, tiny_qwen, tiny_sambay, toy_rows, train_toy

from sft.train.collator import PackedCollator, PaddedCollator
from sft.train.neftune import document_noise


def row(*documents: np.ndarray) -> dict:
    ids = np.concatenate(documents)
    return {"input_ids": ids, "assistant_masks": np.ones(len(ids)), "seq_lengths": [len(d) for d in documents]}


def noise_of(model, batch: dict, alpha: float = 5.0, *, seed: int = 1, epoch: int = 0) -> torch.Tensor:
    """What a training forward adds to the embeddings, (B, T, d)."""
    seen = []
    names = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
    names += ("max_length_q", "max_length_k")
    inputs = {
        name: batch[name] for name in names if name in batch and not (name == "seq_idx" and "Qwen" in repr(model))
    }
    embeddings = model.get_input_embeddings()
    with document_noise(model, alpha, seed=seed, epoch=epoch):
        handle = embeddings.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
        model.train()(**inputs, use_cache=False)
        handle.remove()
    return seen[0] - embeddings(batch["input_ids"]).detach()


@pytest.fixture
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 90, size=n) for n in (12, 5, 40)]


@pytest.mark.parametrize("make", [tiny_sambay, tiny_qwen], ids=["sambay", "qwen3"])
def test_noise_is_the_documents_own(make, documents) -> None:
    model = make()
    packed = noise_of(model, PackedCollator()([row(*documents)]))[0]
    other = noise_of(model, PackedCollator()([row(documents[2], documents[0])]))[0]
    padded = noise_of(model, PaddedCollator()([row(document) for document in documents]))
    start = 0
    for index, document in enumerate(documents):
        mine = packed[start : start + len(document)]
        start += len(document)
        torch.testing.assert_close(mine, padded[index, : len(document)], rtol=0, atol=1e-6)
        assert padded[index, len(document) :].abs().max() == 0 if len(document) < 40 else True
        bound = 5.0 / math.sqrt(len(document) * 32)
        assert 0.8 * bound < mine.abs().max() <= bound * 1.001
        assert mine.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    torch.testing.assert_close(packed[:12], other[40:], rtol=0, atol=1e-6)
    assert not torch.allclose(packed[:5], packed[12:17])


def test_noise_changes_with_epoch_and_seed_and_ends_with_its_block(documents) -> None:
    model = tiny_qwen()
    batch = PackedCollator()([row(*documents)])
    first = noise_of(model, batch)
    assert torch.equal(first, noise_of(model, batch))
    for other in ({"epoch": 1}, {"seed": 2}):
        assert not torch.allclose(first, noise_of(model, batch, **other))
    torch.testing.assert_close(noise_of(model, batch, alpha=10.0), 2 * first, rtol=0, atol=1e-6)
    assert not model._forward_pre_hooks and not model.get_input_embeddings()._forward_hooks
    model.eval()
    with document_noise(model, 5.0, seed=1, epoch=0):
        embeds = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(embeds, model.get_input_embeddings()(batch["input_ids"]))


def test_packing_does_not_change_what_is_trained_with_noise(tmp_path) -> None:
    """The same documents, packed and one a row, train to the same weights: promise 2, with noise."""
    packed = toy_rows(4, packed=True)
    alone = [
        {"input_ids": row["input_ids"][start:end], "assistant_masks": row["assistant_masks"][start:end]}
        | {"seq_lengths": [end - start], "document_ids": [str(start)]}
        for row in packed.dataset
        for start, end in zip(np.cumsum([0, *row["seq_lengths"]]), np.cumsum(row["seq_lengths"]), strict=False)
    ]
    from datasets import Dataset
    from train_toys import ToyPrepared

    single = ToyPrepared(Dataset.from_list(alone, features=packed.dataset.features))
    common = {"optim": "sgd", "max_steps": 2, "neftune_noise_alpha": 5.0, "lr_scheduler_type": "constant"}
    weights = []
    for name, prepared, batch in (("packed", packed, 4), ("single", single, len(alone))):
        train = {**common, "packing": name == "packed", "per_device_train_batch_size": batch}
        _, paths = train_toy(tmp_path / name, train, model=tiny_sambay(), prepared=prepared)
        weights.append(saved_weights(paths.final_dir("one")))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=2e-6)


def test_noise_reaches_training(tmp_path) -> None:
    losses = {}
    for alpha in (None, 1.0, 50.0):
        train = {"max_steps": 2, "packing": True, "neftune_noise_alpha": alpha}
        _, paths = train_toy(tmp_path / str(alpha), train, model=tiny_sambay())
        losses[alpha] = [line["loss"] for line in read_metrics(paths.metrics("one"))]
    assert len({loss[0] for loss in losses.values()}) == 3
