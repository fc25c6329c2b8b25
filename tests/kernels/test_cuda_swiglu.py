"""The CUDA C++ gate on the CPU, by an emulated runtime, against its definition in float64."""

from __future__ import annotations

from collections.abc import Iterator

import emulated_cuda
import packed_ops as ops
import pytest
import torch
from sambay_kernels import swiglu
from sambay_kernels.ops.swiglu.op import swiglu_bwd, swiglu_fwd
from torch import Tensor

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with emulated_cuda.emulated():
        yield


def check(gate: Tensor, value: Tensor, bound: float) -> None:
    """Output and both gradients against float64."""
    results = []
    for wide, call in ((None, swiglu), (torch.float64, lambda g, m: torch.nn.functional.silu(g) * m)):
        leaves = [x.detach() if wide is None else x.detach().to(wide) for x in (gate, value)]
        out = call(*[leaf.requires_grad_() for leaf in leaves])
        up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
        results.append([out, *torch.autograd.grad(out, leaves, up)])
    for found, want, like in zip(*results, (gate, gate, value), strict=True):
        assert found.dtype == like.dtype and ops.rms_error(found.detach(), want.detach()) <= bound


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 100), (2, 2048), (7, 2056)])
def test_contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whole vectors of 16 bytes, and a tail."""
    check(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("width", "skip"), [(1040, 0), (1040, 8), (1037, 0), (1040, 3), (6, 1)])
def test_halves_of_one_projection(width: int, skip: int, dtype: torch.dtype) -> None:
    """Rows that start at multiples of 16 bytes and rows that don't; what lies between them is NaN."""
    fused = torch.full((3, 2 * width + skip), float("nan"), dtype=dtype)
    gate, value = fused[:, :width], fused[:, width + skip :]
    gate.copy_(torch.randn(3, width)), value.copy_(torch.randn(3, width))
    check(gate, value, BOUNDS[dtype])
    if skip == 0:
        leaf = fused.clone().requires_grad_()
        wide = fused.double().requires_grad_()
        out, exact = swiglu(leaf), torch.nn.functional.silu(wide[:, :width]) * wide[:, width:]
        (found,), (want,) = (torch.autograd.grad(y.sum(), x) for y, x in ((out, leaf), (exact, wide)))
        assert torch.equal(out, swiglu(gate, value)) and ops.rms_error(found, want) <= BOUNDS[dtype]


def test_mixed_types() -> None:
    check(torch.randn(3, 50).bfloat16(), torch.randn(3, 50), 5e-3)


def test_extremes_and_nothing() -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 100.0, 1e4, float("inf"), float("nan")])
    out = swiglu(gate, torch.full((8,), 2.0))
    want = torch.nn.functional.silu(gate.double()) * 2
    assert torch.allclose(out.double(), want, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert swiglu(torch.ones(0, 3), torch.ones(0, 3)).shape == (0, 3)
    assert swiglu(torch.tensor(1.0), torch.tensor(2.0)).item() == pytest.approx(1.4621172)


def test_a_transposed_gate_is_copied() -> None:
    check(torch.randn(50, 3).t(), torch.randn(3, 50), 1e-6)


def test_as_torch_ops() -> None:
    gate, value = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(swiglu_fwd.op, (gate, value, "cuda"))
    torch.library.opcheck(swiglu_bwd.op, (torch.randn(3, 5), gate.detach(), value.detach(), "cuda"))
