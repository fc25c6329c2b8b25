"""Ops under autocast: the same bits, forward and backward, as without it, but for a loss's products of gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import packed_ops as ops
import pytest
import torch
from sambay_kernels import (
    add_layer_norm,
    causal_conv1d,
    causal_conv1d_step,
    differential_attention,
    differential_attention_step,
    linear_cross_entropy,
    selective_scan,
    selective_scan_step,
    swiglu,
    token_statistics,
)
from torch import Tensor

BORDERS = torch.tensor([0, 5, 9], dtype=torch.int32)
LABELS = torch.tensor([1, -100, 3, 0, -100, 2, 4, 4, 1])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    seed = sum((i + 1) * size for i, size in enumerate(shape))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return selective_scan(u, delta, -A.exp(), B, C, z=delta, cu_seqlens=BORDERS, initial_state=state)


def attention(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, weight: Tensor) -> Tensor:
    return differential_attention(q, k, v, lam, weight, lambda_init=0.3, cu_seqlens_q=BORDERS, window=3)


def losses(hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, LABELS, label_smoothing=0.1, z_loss=1e-3, reduction="none")


def summed(hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, LABELS)


def norm(hidden: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return add_layer_norm(hidden, delta, weight, bias)


CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "selective_scan": (scan, [(9, 6), (9, 6), (6, 3), (9, 3), (9, 3), (2, 6, 3)]),
    "causal_conv1d": (lambda *x: causal_conv1d(*x, cu_seqlens=BORDERS), [(9, 6), (6, 4), (6,)]),
    "swiglu": (swiglu, [(9, 6), (9, 6)]),
    "add_layer_norm": (norm, [(9, 6), (9, 6), (6,), (6,)]),
    "layer_norm": (lambda h, *small: add_layer_norm(h, None, *small)[1], [(9, 6), (6,), (6,)]),
    "differential_attention": (attention, [(9, 4, 8), (9, 2, 8), (9, 2, 8), (), (16,)]),
    "linear_cross_entropy, sum": (summed, [(9, 6), (5, 6)]),
    "linear_cross_entropy, none": (losses, [(9, 6), (5, 6)]),
}


def value_and_grads(case: str, dtype: torch.dtype, autocast: bool) -> list[Tensor]:
    """Outputs and gradients; the backward pass too runs inside the region of autocast."""
    call, shapes = CASES[case]
    leaves = [random(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        out = call(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(outs, leaves, [torch.cos(x.detach()) for x in outs])
    return [*(x.detach() for x in outs), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing(case: str, name: str, dtype: torch.dtype) -> None:
    with ops.backend(name):
        plain, cast = (value_and_grads(case, dtype, autocast) for autocast in (False, True))
    assert len(plain) == len(cast)
    for place, (want, got) in enumerate(zip(plain, cast, strict=True)):
        rounded = CASES[case][0] is summed and name != "reference" and dtype == torch.float32 and place > 0
        assert got.dtype == want.dtype and torch.equal(got, want) != rounded


def of_sum(autocast: bool, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients of a sum over 700 tokens, three chunks; accuracy and entropy by token."""
    hidden, weight = (random(*shape).to(dtype).requires_grad_() for shape in ((700, 64), (300, 64)))
    labels = torch.arange(700) % 300
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), token_statistics() as tally:
        loss = linear_cross_entropy(hidden, weight, labels)
        grads = torch.autograd.grad(loss, [hidden, weight])
    return [loss.detach(), *grads], [torch.cat(tally.correct), torch.cat(tally.entropy)]


def test_autocast_rounds_the_products_of_a_sums_gradients_alone() -> None:
    (loss, *grads), (correct, entropy) = of_sum(autocast=True)
    (exact, *wanted), (right, spread) = of_sum(False, torch.float64)
    assert torch.equal(loss, of_sum(False)[0][0]) and abs(loss - exact) <= 1e-6 * exact
    for got, want in zip(grads, wanted, strict=True):
        error = (got - want).norm() / want.norm()
        assert got.dtype == torch.float32 and 1e-4 < error < 4e-3  # bfloat16 has 8 bits
    assert torch.equal(correct, right)
    torch.testing.assert_close(entropy.double(), spread, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_autocast_changes_no_step(name: str, dtype: torch.dtype) -> None:
    work = torch.float64 if dtype == torch.float64 else torch.float32
    u, delta, B, C = (random(2, n, dtype=dtype) for n in (6, 6, 3, 3))
    q, keys, values = (random(*shape, dtype=dtype) for shape in ((2, 4, 8), (2, 2, 7, 8), (2, 2, 7, 8)))

    def run() -> list[Tensor]:
        state, inputs = random(2, 6, 3, dtype=work), random(2, 6, 3, dtype=dtype)
        return [
            selective_scan_step(state, u, delta, -random(6, 3).exp(), B, C, z=u),
            causal_conv1d_step(inputs, u, random(6, 4)),
            differential_attention_step(q, keys, values, random(), random(16), lambda_init=0.3),
            state,
            inputs,
        ]

    with ops.backend(name):
        plain = run()
        with torch.autocast("cpu", torch.bfloat16):
            cast = run()
    for want, got in zip(plain, cast, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_what_needs_no_gradient_gets_none(name: str) -> None:
    gate, value = random(3, 4).requires_grad_(), random(3, 4)
    with ops.backend(name):
        swiglu(gate, value).sum().backward()
        assert not swiglu(gate.detach(), value).requires_grad
    assert gate.grad is not None and value.grad is None
