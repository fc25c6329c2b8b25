"""A whole SambaY with every op in Triton: loss, gradients and a decoding step as with the torch forms."""

from __future__ import annotations

import packed_ops as ops
import pytest
import torch
from sambay_kernels.ops.differential_attention import triton as triton_backend
from tiny_sambay import tiny_model


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {0: triton_backend.Blocks(*[(16, 16)] * 3)}
    monkeypatch.setattr(triton_backend, "BLOCKS", blocks)
    monkeypatch.setattr(triton_backend, "SINGLE_BLOCKS", blocks)


def loss_and_gradients(name: str) -> dict[str, torch.Tensor]:
    model = tiny_model().train()
    ids = torch.randint(1, 96, (1, 26), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = labels[0, 18:21] = -100
    borders = torch.tensor([0, 18, 26], dtype=torch.int32)
    with ops.backend(name):
        loss = model(input_ids=ids, labels=labels, cu_seq_lens_q=borders, cu_seq_lens_k=borders).loss
        loss.backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return {"loss": loss.detach(), **found}


def test_loss_and_every_gradient() -> None:
    want, found = loss_and_gradients("torch"), loss_and_gradients("triton")
    worst = {key: ops.rms_error(found[key], want[key]) for key in want}
    # lambda's gradients are differences of nearly equal sums
    assert all(error <= (1e-3 if ".lambda_" in key else 2e-5) for key, error in worst.items()), worst


@torch.no_grad()
def test_prefill_and_a_decoding_step() -> None:
    model = tiny_model()
    ids = torch.randint(1, 96, (2, 13), generator=torch.Generator().manual_seed(0))
    with ops.backend("torch"):
        want = model(input_ids=ids).logits[:, -1]
    with ops.backend("triton"):
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        found = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert ops.rms_error(found, want) <= 2e-5
