"""Differential attention in Triton, maps and what follows them, against its float64 definition."""

from __future__ import annotations

from typing import Any

import packed_ops as ops
import pytest
import torch
from sambay_kernels import differential_attention
from sambay_kernels.ops.differential_attention import triton as triton_backend
from sambay_kernels.ops.differential_attention.op import (
    differential_combine_bwd,
    differential_combine_fwd,
    differential_maps_bwd,
    differential_maps_fwd,
)
from sambay_kernels.ops.differential_attention.torch import diff_combine
from torch import Tensor

SUFFIX = ([0, 1, 2, 20, 0, 3], [4, 1, 5, 40, 0, 37])
WHOLE = ([0, 1, 2, 33, 0, 37],) * 2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {0: triton_backend.Blocks(*[(16, 16)] * 3)}
    monkeypatch.setattr(triton_backend, "BLOCKS", blocks)
    monkeypatch.setattr(triton_backend, "SINGLE_BLOCKS", blocks)


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make(queries: list[int], keys: list[int], heads: tuple[int, int], d: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(sum(queries), heads[0], d), (sum(keys), heads[1], d), (sum(keys), heads[1], d), (), (2 * d,)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def run(name: str, tensors: list[Tensor], lengths: tuple[list[int], list[int]], window: int | None) -> list[Tensor]:
    """The output, and the gradients of q, k, v, lambda and the norm's weight."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    options: dict[str, Any] = {"cu_seqlens_q": borders(lengths[0]), "cu_seqlens_k": borders(lengths[1])}
    with ops.backend(name):
        out = differential_attention(*leaves, lambda_init=0.5, window=window, **options)
        up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, up)]


def assert_near(found: list[Tensor], want: list[Tensor], bound: float) -> None:
    """Root mean square error; lambda's gradient is one sum of terms that cancel, measured against their number."""
    for got, exact in zip(found, want, strict=True):
        scale = exact.norm() if exact.dim() else want[0].numel() ** 0.5
        assert (got.double() - exact).norm() <= bound * scale + 1e-6 * want[0].numel() ** 0.5


@pytest.mark.parametrize("lengths", [WHOLE, SUFFIX], ids=["whole", "suffix"])
@pytest.mark.parametrize("window", [None, 1, 7, 16])
def test_fp32_matches_the_definition(lengths: tuple[list[int], list[int]], window: int | None) -> None:
    tensors = make(*lengths, (8, 4), 8, torch.float32)
    exact = run("reference", [x.double() for x in tensors], lengths, window)
    assert_near(run("triton", tensors, lengths, window), exact, 1e-5)


@pytest.mark.parametrize(("heads", "d"), [((4, 2), 20), ((2, 2), 16), ((12, 4), 4)])
def test_head_counts_and_ragged_widths(heads: tuple[int, int], d: int) -> None:
    tensors = make(*SUFFIX, heads, d, torch.float32)
    exact = run("reference", [x.double() for x in tensors], SUFFIX, 9)
    assert_near(run("triton", tensors, SUFFIX, 9), exact, 1e-5)


def test_half_precision() -> None:
    """In float16: the interpreter multiplies the bits of bfloat16 matrices, not their values."""
    tensors = [x.half() if x.dim() == 3 else x for x in make(*WHOLE, (4, 2), 16, torch.float32)]
    exact, found = run("reference", [x.double() for x in tensors], WHOLE, 12), run("triton", tensors, WHOLE, 12)
    assert [x.dtype for x in found[:4]] == [torch.float16] * 4
    errors = [ops.rms_error(got, want) for got, want in zip(found, exact, strict=True) if want.dim()]
    assert max(errors) <= 2e-3, errors


def test_heads_of_a_fused_projection_are_read_in_place() -> None:
    tokens, heads, keys, d = sum(WHOLE[0]), 4, 2, 8
    fused = torch.randn(tokens, (heads + 2 * keys) * d)
    views = [x.unflatten(1, (-1, d)) for x in fused.split([heads * d, keys * d, keys * d], 1)]
    others = make(*WHOLE, (heads, keys), d, torch.float32)[3:]
    found = run("triton", [x.contiguous() for x in views] + others, WHOLE, 7)[0]
    with ops.backend("triton"), torch.no_grad():
        out = differential_attention(*views, *others, lambda_init=0.5, cu_seqlens_q=borders(WHOLE[0]), window=7)
    assert torch.equal(out, found)


@pytest.mark.parametrize("window", [None, 7])
def test_one_document_changes_nothing_in_another(window: int | None) -> None:
    lengths = ([20, 17, 5],) * 2
    tensors = make(*lengths, (4, 2), 8, torch.float32)
    changed = [x.clone() for x in tensors]
    for x in changed[:3]:
        x[20:37] += 1.0
    others = torch.tensor([*range(20), *range(37, 42)])
    for before, after in zip(
        run("triton", tensors, lengths, window), run("triton", changed, lengths, window), strict=True
    ):
        if before.dim() > 1:
            assert torch.equal(before[others], after[others])


@pytest.mark.parametrize("window", [None, 7])
def test_packed_equals_separate(window: int | None) -> None:
    tensors = make(*SUFFIX, (4, 2), 8, torch.float32)
    packed = run("triton", tensors, SUFFIX, window)[0]
    starts = [borders(lengths).tolist() for lengths in SUFFIX]
    for s, (n, m) in enumerate(zip(*SUFFIX, strict=True)):
        q0, k0 = starts[0][s], starts[1][s]
        own = [tensors[0][q0 : q0 + n], tensors[1][k0 : k0 + m], tensors[2][k0 : k0 + m], *tensors[3:]]
        with ops.backend("triton"), torch.no_grad():
            out = differential_attention(
                *own, lambda_init=0.5, cu_seqlens_q=borders([n]), cu_seqlens_k=borders([m]), window=window
            )
        assert torch.equal(out, packed[q0 : q0 + n])


@pytest.mark.parametrize("tokens", [1, 33])
def test_combine_matches_the_plain_form(tokens: int) -> None:
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=g).requires_grad_() for s in ((tokens, 6, 10), (), (10,))]
    results = []
    for form, wide in ((differential_combine_fwd, torch.float32), (diff_combine, torch.float64)):
        own = [x.detach().to(wide).requires_grad_() for x in leaves]
        out = form(*own, 0.3, 1e-5)
        up = torch.cos(torch.arange(out.numel())).view(out.shape).to(wide)
        results.append([out.detach(), *torch.autograd.grad(out, own, up)])
    for found, want in zip(*results, strict=True):
        assert ops.rms_error(found, want) <= 1e-5


def test_as_torch_ops() -> None:
    q, k, v, lam, weight = (x.requires_grad_() for x in make([5, 9], [7, 9], (4, 2), 8, torch.float32))
    plan = (borders([5, 9]), borders([7, 9]), 4, 0.5, "triton")
    torch.library.opcheck(differential_maps_fwd.op, (q, k, v, *plan))
    maps, lse = (x.detach() for x in differential_maps_fwd(q, k, v, *plan))
    fixed = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(differential_maps_bwd.op, (torch.randn_like(maps), *fixed, maps, lse, *plan))
    torch.library.opcheck(differential_combine_fwd.op, (maps.requires_grad_(), lam, weight, 0.5, 1e-5))
    out = differential_combine_fwd(maps, lam, weight, 0.5, 1e-5).detach()
    torch.library.opcheck(differential_combine_bwd.op, (out, maps.detach(), lam.detach(), weight.detach(), 0.5, 1e-5))
