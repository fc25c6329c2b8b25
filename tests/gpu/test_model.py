"""A whole SambaY on a GPU, packed and token by token, against itself in float64 on the CPU."""

from __future__ import annotations

import packed_ops as ops
import pytest
import torch
from gpu_backends import chosen
from step_ops import assert_conv_steps_match, assert_steps_match
from tiny_sambay import tiny_model
from torch import Tensor

from sft.models import Phi4FlashForCausalLM

pytestmark = pytest.mark.gpu

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "mamba_d_state": 16, "sliding_window": 100}


def loss_and_gradients(model: Phi4FlashForCausalLM) -> dict[str, Tensor]:
    """Of three documents in a row, prompts unsupervised; on the CPU in float64."""
    device = next(model.parameters()).device
    ids = torch.randint(1, 96, (1, 900), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :50] = labels[0, 300:333] = labels[0, 777:780] = -100
    borders = torch.tensor([0, 300, 777, 900], dtype=torch.int32, device=device)
    options = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    loss = model.train()(input_ids=ids.to(device), labels=labels.to(device), **options).loss
    loss.backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return {key: value.detach().double().cpu() for key, value in {"loss": loss, **found}.items()}


def errors(name: str, dtype: torch.dtype, want: dict[str, Tensor]) -> dict[str, float]:
    """Of loss and gradients on the GPU by a backend."""
    with chosen(name):
        found = loss_and_gradients(tiny_model(**SHAPE).to(dtype).cuda())
    return {key: ops.rms_error(found[key], want[key]) for key in want}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["auto", "triton", "cuda"])
def test_loss_and_every_gradient(name: str, dtype: torch.dtype) -> None:
    """In half precision as near as plain torch comes; lambda's gradients are differences of nearly equal sums."""
    want = loss_and_gradients(tiny_model(**SHAPE).to(dtype).double())
    plain = errors("torch", dtype, want) if dtype == torch.bfloat16 else dict.fromkeys(want, 1e-4)
    for key, error in errors(name, dtype, want).items():
        assert error <= plain[key] * (20 if ".lambda_" in key else 1.5) + 1e-3 * (dtype == torch.bfloat16), key


@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_prefill_and_decoding_steps(name: str) -> None:
    ids = torch.randint(1, 96, (2, 213), generator=torch.Generator().manual_seed(0))
    want = tiny_model(**SHAPE).double()(input_ids=ids).logits[:, -9:]
    model, cache, found = tiny_model(**SHAPE).cuda(), None, []
    with chosen(name):
        for part in ids[:, :-8].cuda(), *ids[:, -8:].cuda().split(1, 1):
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[:, -1:])
    assert ops.rms_error(torch.cat(found, 1).cpu(), want) <= 1e-4


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("slots", [None, [4, 0, 2]])
def test_steps(name: str, slots: list[int] | None) -> None:
    for gated in (True, False):
        assert_steps_match(name, slots, gated, "cuda")
    for width, activation in ((4, "silu"), (2, None), (1, "silu")):
        assert_conv_steps_match(name, slots, width, activation, "cuda")
