"""Every op on a GPU, by each backend there is, against float64 on the same GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import packed_ops as ops
import pytest
import torch
from gpu_backends import chosen
from sambay_kernels import add_layer_norm, differential_attention, swiglu
from sambay_kernels.runtime.segments import LONGEST
from torch import Tensor

pytestmark = pytest.mark.gpu

LENGTHS = [0, 1, 2, 700, 0, LONGEST + 77, 513, 64]
BACKENDS = ("triton", "torch")
WITH_CUDA = ("triton", "cuda", "torch")  # the ops that have CUDA C++ kernels
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 5e-3}


def on_gpu(case: ops.Case, dtype: torch.dtype, half: tuple[str, ...]) -> ops.Case:
    """The case on the GPU, the named tensors in `dtype`, the others in float32."""
    tensors = {key: value.cuda().to(dtype if key in half else value.dtype) for key, value in case.tensors.items()}
    return replace(case, tensors=tensors)


def run(case: ops.Case, name: str) -> dict[str, Tensor]:
    """Outputs and gradients on the GPU (packed_ops.run works on CPU)."""
    leaves = {key: value.detach().clone().requires_grad_() for key, value in case.tensors.items()}
    with chosen(name):
        y, final = case.op(**leaves, cu_seqlens=case.cu_seqlens.cuda())
        weights = ops.loss_weights({"y": y.shape, "final_state": final.shape})
        upstream = [weights["y"].cuda().to(y.dtype), weights["final_state"].cuda().to(final.dtype)]
        grads = torch.autograd.grad([y, final], list(leaves.values()), upstream)
    return {"y": y, "final_state": final, **{f"d_{key}": grad for key, grad in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("name", WITH_CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "states"), [(128, 16), (100, 16), (100, 40)])
def test_scan(name: str, dtype: torch.dtype, channels: int, states: int) -> None:
    case = ops.scan_case(LENGTHS, channels=channels, states=states)
    case.tensors["delta"].sub_(3.0)
    case = on_gpu(case, dtype, ("u", "delta", "B", "C", "z"))
    exact = run(replace(case, tensors={key: value.double() for key, value in case.tensors.items()}), "torch")
    found = run(case, name)
    loose = {key: 1e-4 for key in ("d_A", "d_D", "d_delta_bias", "d_initial_state", "final_state")}
    ops.assert_close(found, exact, BOUNDS[dtype], **(loose if dtype == torch.float32 else {}))
    again = run(case, name)
    assert name == "torch" or all(torch.equal(found[key], again[key]) for key in found)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv(name: str, dtype: torch.dtype) -> None:
    case = on_gpu(ops.conv_case(LENGTHS, channels=300), dtype, ("x",))
    exact = run(replace(case, tensors={key: value.double() for key, value in case.tensors.items()}), "torch")
    ops.assert_close(run(case, name), exact, BOUNDS[dtype])


@pytest.mark.parametrize("name", WITH_CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [True, False])
def test_gate(name: str, dtype: torch.dtype, split: bool) -> None:
    fused = torch.randn(777, 2 * 1040, device="cuda", dtype=dtype)
    results = []
    for wide, backend, halved in ((dtype, name, split), (torch.float64, "torch", True)):
        leaf = fused.to(wide).requires_grad_()
        with chosen(backend):
            out = swiglu(*leaf.chunk(2, -1)) if halved else swiglu(leaf)
        results.append([out, *torch.autograd.grad(out, leaf, torch.ones_like(out))])
    for found, want in zip(*results, strict=True):
        assert ops.rms_error(found, want) <= BOUNDS[dtype]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", [(4099, 2560), (777, 160), (3, 5000)])
def test_norm(name: str, dtype: torch.dtype, added: bool, shape: tuple[int, int]) -> None:
    """A float32 stream, whose neighbours are in `dtype`; the same bits again."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, delta, *ups = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(4))
    weight, bias = (torch.randn(shape[1:], device="cuda", generator=generator) for _ in range(2))

    def run(backend: str, stream: torch.dtype, beside: torch.dtype) -> list[Tensor]:
        leaves = [hidden.to(stream), weight.to(stream), bias.to(stream), *([delta.to(beside)] if added else [])]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with chosen(backend):
            total, normed = add_layer_norm(leaves[0], leaves[3] if added else None, *leaves[1:3], out_dtype=beside)
        outs = [total, normed]
        return [*outs, *torch.autograd.grad(outs, leaves, [up.to(x.dtype) for up, x in zip(ups, outs, strict=True)])]

    found, exact = run(name, torch.float32, dtype), run("torch", torch.float64, torch.float64)
    for got, want in zip(found, exact, strict=True):
        assert ops.rms_error(got, want) <= BOUNDS[dtype]
    assert name == "torch" or all(map(torch.equal, found, run(name, torch.float32, dtype)))


@pytest.mark.parametrize(("name", "dtype", "bound"), [
    ("triton", torch.bfloat16, 1e-2), ("torch", torch.bfloat16, 1e-2), ("triton", torch.float32, 1e-5),
])  # fmt: skip
@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("lengths", [([0, 1, 700, 1300],) * 2, ([0, 1, 30, 1000], [4, 1, 700, 1300])])
def test_attention(
    name: str, dtype: torch.dtype, bound: float, window: int | None, lengths: tuple[list[int], list[int]]
) -> None:
    """In half precision `torch` is FlashAttention."""
    generator = torch.Generator("cuda").manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    queries, keys = map(sum, lengths)
    tensors = [make(queries, 8, 64), make(keys, 4, 64), make(keys, 4, 64), make(), make(128)]
    borders = [torch.tensor([0, *x]).cumsum(0).int().cuda() for x in lengths]
    options: dict[str, Any] = {
        "lambda_init": 0.5,
        "window": window,
        "cu_seqlens_q": borders[0],
        "cu_seqlens_k": borders[1],
    }
    tensors = [x.to(dtype) if x.dim() == 3 else x for x in tensors]
    results = []
    for wide, backend in ((None, name), (torch.float64, "torch")):
        leaves = [(x if wide is None else x.to(wide)).detach().clone().requires_grad_() for x in tensors]
        with ops.backend(backend):
            out = differential_attention(*leaves, **options)
        up = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
        results.append([out, *torch.autograd.grad(out, leaves, up.to(out.dtype))])
    for index, (found, want) in enumerate(zip(*results, strict=True)):
        # lambda's gradient (index 4) is one sum of terms that cancel
        scale = want.norm() if index != 4 else want.new_tensor(results[1][0].numel() ** 0.5)
        assert (found.double() - want).norm() <= bound * scale, index
