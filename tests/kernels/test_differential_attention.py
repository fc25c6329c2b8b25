"""Differential attention against explicit softmax matrices, and the promises of packing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import packed_ops as ops
import pytest
import torch
from sambay_kernels import differential_attention, differential_attention_step
from sambay_kernels.ops.differential_attention import cpp as cpp_backend
from sambay_kernels.ops.differential_attention import torch as torch_backend
from sambay_kernels.ops.differential_attention.inputs import DiffInputs
from sambay_kernels.ops.differential_attention.op import (
    differential_attention_bwd,
    differential_attention_fwd,
    differential_maps_bwd,
    differential_maps_fwd,
    flash_attention_bwd,
    flash_attention_fwd,
    visible_pairs,
)
from sambay_kernels.ops.differential_attention.torch import differential_attention_torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

LAMBDA_INIT = 0.3555


@pytest.fixture(params=["torch", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU's backends one by one."""
    with ops.backend(request.param):
        yield request.param


on_each_backend = pytest.mark.usefixtures("backend")


class LargestTensor(TorchDispatchMode):
    """The largest storage, in bytes, that the operations inside make; views of what was there don't count."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.size = max(self.size, x.untyped_storage().nbytes())
        return out


def definition(*leaves: Tensor, **options: Any) -> Tensor:
    """The reference backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMBAY_KERNELS", "reference")
        return differential_attention(*leaves, **options)


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def make(
    queries: list[int],
    keys: list[int] | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    d: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves q, k, v, lambda, subln weight and the keyword arguments of a packed row with these document lengths."""
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    shapes = [(sum(queries), heads[0], d), (sum(keys), heads[1], d), (sum(keys), heads[1], d), (), (2 * d,)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    options = {"lambda_init": LAMBDA_INIT, "cu_seqlens_q": borders(queries), "cu_seqlens_k": borders(keys)}
    return leaves, options


def value_and_grads(op: Callable[..., Tensor], leaves: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    out = op(*leaves, **options)
    probe = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).to(out).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, probe)]


def assert_relative(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    """Root-mean-square error against the values' own size; lambda's gradient is one sum of terms that cancel."""
    terms = wanted[0].numel() ** 0.5
    for got, true in zip(found, wanted, strict=True):
        assert (got.double() - true).norm() < bound * (true.norm() if true.dim() else terms)


def explicit(leaves: list[Tensor], options: dict[str, Any], window: int | None) -> Tensor:
    """The published definition for the whole packed row at once: one (Tq, Tk) matrix, heads gathered by index."""
    q, k, v, lam, weight = leaves
    pairs, d = q.shape[1] // 2, q.shape[2]
    kv = torch.arange(pairs) // (pairs // (k.shape[1] // 2))
    starts_q, starts_k = options["cu_seqlens_q"].long(), options["cu_seqlens_k"].long()
    document_q = torch.repeat_interleave(torch.arange(len(starts_q) - 1), starts_q.diff())
    document_k = torch.repeat_interleave(torch.arange(len(starts_k) - 1), starts_k.diff())
    place_q = torch.arange(len(q)) - starts_q[1:][document_q] + starts_k.diff()[document_q]
    place_k = torch.arange(len(k)) - starts_k[:-1][document_k]
    age = place_q[:, None] - place_k
    seen = (document_q[:, None] == document_k) & (age >= 0) & (age < (window or len(k)))
    maps = []
    for stripe in (0, 1):
        scores = torch.einsum("qjd,kjd->jqk", q[:, stripe::2], k[:, stripe::2][:, kv]) / d**0.5
        weights = torch.where(seen, scores, -torch.inf).softmax(-1)
        maps.append(torch.cat([weights @ v[:, half::2][:, kv].transpose(0, 1) for half in (0, 1)], -1))
    out = maps[0] - lam * maps[1]
    out = out / (out.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight * (1 - LAMBDA_INIT)
    return out.permute(1, 0, 2).reshape(len(q), -1)


LENGTHS = [[1], [7, 1, 0, 16, 17], [15, 33, 40], [130, 3], [0, 300, 129]]


@on_each_backend
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (12, 4)])
@pytest.mark.parametrize("window", [None, 1, 2, 16, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_the_definition(lengths: list[int], window: int | None, heads: tuple[int, int]) -> None:
    leaves, options = make(lengths, heads=heads)
    ours = value_and_grads(differential_attention, leaves, {**options, "window": window})
    theirs = value_and_grads(lambda *x, **o: explicit(list(x), o, window), leaves, options)
    oracle = value_and_grads(definition, leaves, {**options, "window": window})
    for got, wanted, looped in zip(ours, theirs, oracle, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(looped, wanted, rtol=1e-10, atol=1e-10)


@on_each_backend
@pytest.mark.parametrize("length", [511, 512, 513, 600, 1024, 1300])
@pytest.mark.parametrize("window", [None, 512])
def test_float32_error_across_the_published_window(length: int, window: int | None) -> None:
    leaves, options = make([length], heads=(4, 2), d=8, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found = value_and_grads(differential_attention, leaves, {**options, "window": window})
    wanted = value_and_grads(definition, exact, {**options, "window": window})
    assert_relative(found, wanted, 2e-6)


@on_each_backend
def test_bfloat16_is_as_exact_as_its_rounding() -> None:
    leaves, options = make([40, 90], d=8, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got = value_and_grads(differential_attention, leaves, {**options, "window": 16})
    wanted = value_and_grads(definition, exact, {**options, "window": 16})
    assert [x.dtype for x in got] == [torch.bfloat16] * 6
    assert_relative(got, wanted, 1e-2)


@on_each_backend
@pytest.mark.parametrize("window", [None, 1, 16, 64])
@pytest.mark.parametrize(
    ("queries", "keys"), [([1, 0, 5], [40, 7, 5]), ([150, 40, 1], [290, 45, 16]), ([0, 0], [3, 4])]
)
def test_suffix_queries_equal_the_tail_of_the_whole(queries: list[int], keys: list[int], window: int | None) -> None:
    (q, *rest), options = make(keys)
    ends = borders(keys)[1:].tolist()
    tail = [row for n, end in zip(queries, ends, strict=True) for row in range(end - n, end)]
    whole = differential_attention(q, *rest, **options, window=window)
    part_options = {**options, "cu_seqlens_q": borders(queries)}
    part = differential_attention(q[tail], *rest, **part_options, window=window)
    torch.testing.assert_close(part, whole[tail], rtol=1e-10, atol=1e-10)
    probe = torch.randn_like(part)
    found = torch.autograd.grad(part, [q, *rest], probe)
    for got, wanted in zip(found, torch.autograd.grad(whole[tail], [q, *rest], probe), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 16, 200])
def test_packed_equals_separate_bit_for_bit(window: int | None, dtype: torch.dtype) -> None:
    lengths = [30, 1, 1100, 30, 17]
    leaves, options = make(lengths, d=8, dtype=dtype)
    out, *grads = value_and_grads(differential_attention, leaves, {**options, "window": window})
    probe = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).to(dtype).view(out.shape)
    bounds = borders(lengths).tolist()
    for start, stop in pairwise(bounds):
        own = [x.detach()[start:stop].clone().requires_grad_() for x in leaves[:3]]
        alone = differential_attention(
            *own, *leaves[3:], lambda_init=LAMBDA_INIT, cu_seqlens_q=borders([stop - start]), window=window
        )
        assert torch.equal(alone, out[start:stop])
        for got, wanted in zip(torch.autograd.grad(alone, own, probe[start:stop]), grads, strict=False):
            assert torch.equal(got, wanted[start:stop])


@on_each_backend
@pytest.mark.parametrize("value", [1e4, float("nan")])
@pytest.mark.parametrize("window", [None, 32])
def test_a_document_never_sees_another(window: int | None, value: float) -> None:
    lengths = [45, 150, 20]
    leaves, options = make(lengths, d=8, dtype=torch.float32)
    before = value_and_grads(differential_attention, leaves, {**options, "window": window})
    with torch.no_grad():
        for x in leaves[:3]:
            x[:45] = value
            x[-20:] = value
    after = value_and_grads(differential_attention, leaves, {**options, "window": window})
    for old, new in zip(before[:4], after[:4], strict=True):
        assert torch.equal(old[45:195], new[45:195])
    assert not torch.equal(before[0][:45], after[0][:45])


@on_each_backend
@pytest.mark.parametrize("window", [None, 24])
def test_no_query_sees_ahead_or_behind_its_window(window: int | None) -> None:
    (q, k, v, *rest), options = make([200], d=8)
    at = 120
    with torch.no_grad():
        before = differential_attention(q, k, v, *rest, **options, window=window)
        k[at], v[at] = 50.0, -50.0
        moved = (differential_attention(q, k, v, *rest, **options, window=window) != before).any(-1)
    last = 200 if window is None else at + window
    assert moved.nonzero()[:, 0].tolist() == list(range(at, last))


@on_each_backend
def test_gradcheck() -> None:
    leaves, options = make([5, 0, 40], [9, 2, 40], d=2)
    op = lambda *x: differential_attention(*x, **options, window=8)  # noqa: E731
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [3, 8, 32])
def test_any_memory_layout(d: int, dtype: torch.dtype) -> None:
    """q, k, v as they come: slices of one projection, heads before tokens, elements apart, at an odd address."""
    leaves, options = make([50, 9], heads=(4, 2), d=d, dtype=dtype)
    plain = [x.detach() for x in leaves[:3]]
    fused = torch.cat([x.flatten(1) for x in plain], -1)
    projected = [x.unflatten(-1, (-1, d)) for x in fused.split([4 * d, 2 * d, 2 * d], -1)]
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain]
    apart = [torch.stack([x, x], -1)[..., 0] for x in plain]
    odd = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in plain]
    assert not any(x.is_contiguous() for x in (projected[0], heads_first[0], apart[0]))
    wanted = value_and_grads(differential_attention, leaves, {**options, "window": 8})
    for views in (projected, heads_first, apart, odd):
        given = [*(x.detach().requires_grad_() for x in views), *leaves[3:]]
        found = value_and_grads(differential_attention, given, {**options, "window": 8})
        assert all(map(torch.equal, found, wanted))


def test_cpp_copies_no_slice_of_a_projection() -> None:
    fused = torch.randn(59, 32)
    views = [x.unflatten(-1, (-1, 4)) for x in fused.split([16, 8, 8], -1)]
    cu = borders([50, 9])
    with ops.backend("cpp"):
        made = cpp_backend._Call(DiffInputs(*views, cu, cu, 0, 0.5), torch.tensor(0.3), torch.ones(8), 0.3, 1e-5)
    assert [x.data_ptr() for x in made.heads] == [x.data_ptr() for x in views]


@on_each_backend
@pytest.mark.parametrize("window", [None, 100, 700])
@pytest.mark.parametrize(("queries", "keys"), [([1, 1300, 1100], [1, 1300, 1500]), ([0, 1024], [40, 1700])])
def test_long_documents(queries: list[int], keys: list[int], window: int | None) -> None:
    """Their keys' gradients are sums over several runs of queries; keys that no query sees get zeros."""
    leaves, options = make(queries, keys, heads=(4, 2), d=4)
    found = value_and_grads(differential_attention, leaves, {**options, "window": window})
    for got, wanted in zip(found, value_and_grads(definition, leaves, {**options, "window": window}), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 300])
def test_cpp_gives_the_same_bits_for_any_number_of_threads(window: int | None, dtype: torch.dtype) -> None:
    leaves, options = make([70, 1300, 1, 33], heads=(8, 4), d=8, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with ops.backend("cpp"):
                results.append(value_and_grads(differential_attention, leaves, {**options, "window": window}))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@on_each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("where", [0, 1, 2], ids="qkv")
def test_what_is_not_finite_is_seen(where: int, window: int | None, value: float) -> None:
    """By the queries that see it, in the outputs and in the gradients, and by no other document."""
    leaves, options = make([40, 100, 30], d=8, dtype=torch.float32)
    with torch.no_grad():
        leaves[where][90, 1] = value
    out, *grads = value_and_grads(differential_attention, leaves, {**options, "window": window})
    bad = ~out.isfinite().all(-1)
    last = 91 if where == 0 else 140 if window is None else 90 + window
    if value != float("-inf") or where != 1:
        assert bad[90:last].all()
    assert bad[90:last].any() and not bad[:40].any() and not bad[140:].any()
    for grad in grads[:3]:
        lost = ~grad.flatten(1).isfinite().all(-1)
        assert lost[40:140].any() and not lost[:40].any() and not lost[140:].any()


@on_each_backend
def test_scores_of_any_size() -> None:
    """Far beyond what exp can hold, and far below: the highest counts."""
    leaves, options = make([50, 200], d=8)
    with torch.no_grad():
        leaves[0] *= 300
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
        given = [x.detach().to(dtype).requires_grad_() for x in leaves]
        exact = [x.detach().double().requires_grad_() for x in given]
        found = value_and_grads(differential_attention, given, options)
        assert_relative(found[:4], value_and_grads(definition, exact, options)[:4], bound)


@on_each_backend
def test_no_documents_and_no_queries() -> None:
    for queries, keys in (([], []), ([0], [0]), ([0, 0], [5, 0])):
        leaves, options = make(queries, keys, d=8, dtype=torch.float32)
        out, *grads = value_and_grads(differential_attention, leaves, options)
        assert out.shape == (0, 32) and all(not x.any() for x in grads)


@pytest.mark.parametrize("window", [None, 8])
def test_torch_form_equals_the_op(window: int | None) -> None:
    leaves, options = make([3, 50], [7, 90])
    with ops.backend("torch"):
        ours, form = (
            value_and_grads(f, leaves, {**options, "window": window})
            for f in (differential_attention, differential_attention_torch)
        )
    assert all(map(torch.equal, ours, form))


@pytest.mark.parametrize("window", [None, 40])
def test_bounded_scores_change_nothing(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few scores at a time: pairs of heads and tiles are then done one by one."""
    monkeypatch.setenv("SAMBAY_KERNELS", "torch")
    leaves, options = make([30, 200], heads=(8, 4))
    wanted = value_and_grads(differential_attention, leaves, {**options, "window": window})
    monkeypatch.setattr(torch_backend, "DIFF_SCORES", 1)
    for got, w in zip(
        value_and_grads(differential_attention, leaves, {**options, "window": window}), wanted, strict=True
    ):
        torch.testing.assert_close(got, w, rtol=1e-12, atol=1e-12)


@on_each_backend
def test_autocast_does_not_reach_the_scores() -> None:
    leaves, options = make([30, 90], dtype=torch.float32)
    wanted = value_and_grads(differential_attention, leaves, options)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_grads(differential_attention, leaves, options)
    assert all(map(torch.equal, found, wanted))


class FlashAttention:
    """FlashAttention's contract in plain torch: key head h // group, a (left, 0) window, documents apart.

    As the package's function, and as the kernels that torch calls, which have no implementation on the CPU.
    """

    def __init__(self) -> None:
        self.deterministic: list[bool] = []
        self.broken = False

    def documents(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, left: int, scale: float
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
        """Of every document the places of its queries and keys, the weights (heads, n, m), and keys and values."""
        for a, b, c, e in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            behind = torch.arange(e - c - (b - a), e - c)[:, None] - torch.arange(e - c)
            seen = (behind >= 0) & ((behind <= left) if left >= 0 else True)
            keys, values = (x[c:e].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
            yield slice(a, b), slice(c, e), scores.masked_fill(~seen, -torch.inf).softmax(-1), keys, values

    def attend(self, q: Tensor, *args: Any) -> Tensor:
        return torch.cat([torch.einsum("hqk,khd->qhd", p, values) for _, _, p, _, values in self.documents(q, *args)])

    def varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
        softmax_scale: float, causal: bool, window_size: tuple[int, int], deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        assert causal and window_size[1] == 0 and (max_q, max_k) == (20, 33)
        self.deterministic.append(deterministic)
        return self.attend(q, k, v, cu_q, cu_k, window_size[0], softmax_scale)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float,
        causal: bool, debug: bool, *, scale: float, window_size_left: int, window_size_right: int, **rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (max_q, max_k, dropout, window_size_right) == (20, 33, 0.0, 0) and causal == (window_size_left < 0)
        empty = q.new_empty(0)
        out = self.attend(q, k, v, cu_q, cu_k, window_size_left, scale)
        return out, q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32), empty, empty, empty

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
        max_q: int, max_k: int, dropout: float, causal: bool, state: Tensor, unused: Tensor, *, scale: float,
        window_size_left: int, window_size_right: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self.deterministic.append(torch.are_deterministic_algorithms_enabled() and not warn_only)
        if self.broken:
            raise RuntimeError("out of memory")
        assert (max_q, max_k, dropout, window_size_right) == (20, 33, 0.0, 0) and causal == (window_size_left < 0)
        assert lse.shape == (q.shape[1], q.shape[0]) and state.shape == (2,)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        for mine, its, p, keys, values in self.documents(q, k, v, cu_q, cu_k, window_size_left, scale):
            slope = torch.einsum("qhd,khd->hqk", grad[mine], values)
            slope = p * (slope - (slope * p).sum(-1, keepdim=True)) * scale
            grad_q[mine] = torch.einsum("hqk,khd->qhd", slope, keys)
            for total, part in (
                (grad_k, torch.einsum("hqk,qhd->khd", slope, q[mine])),
                (grad_v, torch.einsum("hqk,qhd->khd", p, grad[mine])),
            ):
                total[its] = part.unflatten(1, (k.shape[1], -1)).sum(2)
        return grad_q, grad_k, grad_v


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashAttention]:
    """FlashAttention in place of torch's kernels; the package isn't there."""
    made, library = FlashAttention(), torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", made.forward, "CPU")
    library.impl("_flash_attention_backward", made.backward, "CPU")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    torch_backend.diff_flash_attn.cache_clear()
    yield made
    library._destroy()
    torch_backend.diff_flash_attn.cache_clear()


def flash_op(*args: Any) -> Tensor:
    return flash_attention_fwd(*args)[0]


@pytest.mark.parametrize("heads", [(4, 4), (12, 4)])
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("way", ["package", "torch, registered", "torch, exported"])
def test_flash_call_is_right_and_deterministic(
    heads: tuple[int, int], window: int, way: str, flash: FlashAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads, windows and borders as FlashAttention wants them, and a backward that is asked for the same bits."""
    if way == "package":
        package = ModuleType("flash_attn")
        package.flash_attn_varlen_func = flash.varlen_func  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn", package)
    leaves, options = make([20, 0, 4], [33, 5, 4], heads=heads)
    cu = options["cu_seqlens_q"], options["cu_seqlens_k"]
    form = flash_op if way == "torch, registered" else torch_backend.DiffFlash.apply
    results = []
    for call in (
        lambda inputs: torch_backend.diff_maps_varlen(inputs, (20, 33), form),
        lambda inputs: differential_maps_fwd(*inputs, "torch")[0],
    ):
        out = call(DiffInputs(*leaves[:3], *cu, window, 0.5))
        results.append([out, *torch.autograd.grad(out, leaves[:3], torch.cos(out.detach()))])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert flash.deterministic == [True] and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_the_switch_is_put_back(before: tuple[bool, bool], flash: FlashAttention) -> None:
    flash.broken = True
    leaves, options = make([20, 4], [33, 4], heads=(4, 4))
    inputs = DiffInputs(*leaves[:3], options["cu_seqlens_q"], options["cu_seqlens_k"], 0, 0.5)
    out = torch_backend.diff_maps_varlen(inputs, (20, 33), flash_op)
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        with pytest.raises(RuntimeError, match="out of memory"):
            out.sum().backward()
        found = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        assert found == before and flash.deterministic == [True]
    finally:
        torch.use_deterministic_algorithms(False)


def test_flash_as_a_torch_op(flash: FlashAttention) -> None:
    leaves, options = make([20, 4], [33, 4], heads=(4, 4), dtype=torch.float32)
    plan = (options["cu_seqlens_q"], options["cu_seqlens_k"], 8, 0.5, 20, 33)
    torch.library.opcheck(flash_attention_fwd.op, (*leaves[:3], *plan))
    fixed = [x.detach() for x in leaves[:3]]
    out, lse = flash_attention_fwd(*fixed, *plan)
    torch.library.opcheck(flash_attention_bwd.op, (torch.cos(out), out, lse, *fixed, *plan))
    with FlopCounterMode(display=False) as counter:
        flash_attention_fwd(*leaves[:3], *plan)[0].sum().backward()
    assert counter.get_total_flops() == (3 + 7) * 4 * 4 * visible_pairs([0, 20, 24], [0, 33, 37], 8)


def test_memory_is_linear() -> None:
    """No tensor inside forward or backward grows with the square of the document."""
    for queries, keys, window in (([3000], [3000], 64), ([3000], [3000], None), ([2900], [3000], None)):
        leaves, options = make(queries, keys, heads=(2, 2), d=2, dtype=torch.float32)
        bounds = options["cu_seqlens_q"], options["cu_seqlens_k"]
        inputs = DiffInputs(*(x.detach() for x in leaves[:3]), *bounds, window or 0, 0.5)
        with LargestTensor() as largest:
            maps, lse = torch_backend.diff_maps(inputs)
            torch_backend.diff_maps_backward(maps, inputs, maps, lse)
        assert 0 < largest.size <= 128 * 3000 * 8 < 3000 * 3000


@pytest.mark.parametrize("window", [0, 8])
def test_opcheck(window: int) -> None:
    leaves, options = make([5, 20], [9, 20], dtype=torch.float32)
    q, k, v = leaves[:3]
    plan = (options["cu_seqlens_q"], options["cu_seqlens_k"], window, 0.5, "torch")
    torch.library.opcheck(differential_maps_fwd.op, (q, k, v, *plan))
    maps, lse = (x.detach() for x in differential_maps_fwd(q, k, v, *plan))
    fixed = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(differential_maps_bwd.op, (torch.randn_like(maps), *fixed, maps, lse, *plan))


MEMORY = """
import resource
import torch
from sambay_kernels import differential_attention
def run(tokens, window):
    q = torch.zeros(tokens, 2, 2, requires_grad=True)
    rest = torch.tensor(0.3), torch.ones(4)
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    differential_attention(q, q, q, *rest, lambda_init=0.3, cu_seqlens_q=cu, window=window).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(64, None)
print(max(run(9000, None), run(9000, 2000)) - before)
"""


def test_cpp_memory_is_linear() -> None:
    """Neither pass keeps a matrix of scores: one map of one head would be 316 MiB."""
    env = {**os.environ, "SAMBAY_KERNELS": "cpp", "OMP_NUM_THREADS": "1"}
    with ops.backend("cpp"):
        done = subprocess.run([sys.executable, "-c", MEMORY], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60 * 1024, f"{done.stdout} KiB more"


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_whole(window: int, dtype: torch.dtype) -> None:
    leaves, options = make([5, 20], [9, 20], dtype=dtype)
    cu = options["cu_seqlens_q"], options["cu_seqlens_k"]
    with ops.backend("cpp"):
        torch.library.opcheck(differential_attention_fwd.op, (*leaves[:3], *cu, window, 0.5, *leaves[3:], 0.3, 1e-5))
        fixed = [x.detach() for x in leaves]
        args = (*fixed[:3], *cu, window, 0.5, *fixed[3:], 0.3, 1e-5)
        out, mixed, softmax = differential_attention_fwd(*args)
        torch.library.opcheck(differential_attention_bwd.op, (torch.cos(out), mixed, softmax, *args))


@on_each_backend
def test_compiled_and_checkpointed_gradients_are_the_same() -> None:
    leaves, options = make([5, 30], dtype=torch.float32)
    options["window"] = 8
    wanted = value_and_grads(differential_attention, leaves, options)
    saved = lambda *x, **o: checkpoint(differential_attention, *x, use_reentrant=False, **o)  # noqa: E731
    for got, w in zip(value_and_grads(saved, leaves, options), wanted, strict=True):
        assert torch.equal(got, w)
    torch._dynamo.reset()
    compiled = torch.compile(differential_attention, fullgraph=True, backend="aot_eager")
    for got, w in zip(value_and_grads(compiled, leaves, options), wanted, strict=True):
        torch.testing.assert_close(got, w)


@on_each_backend
def test_flops_count_visible_pairs() -> None:
    leaves, options = make([3, 10], [5, 10], heads=(4, 2), d=4)
    pairs = sum(sum(min(5, t + 1) for t in range(m - n, m)) for n, m in ((3, 5), (10, 10)))
    assert visible_pairs([0, 3, 13], [0, 5, 15], 5) == pairs
    with FlopCounterMode(display=False) as counter:
        differential_attention(*leaves, **options, window=5).sum().backward()
    assert counter.get_total_flops() == 2 * (3 + 7) * 4 * 4 * pairs


step_backends = pytest.mark.parametrize("name", ["cpp", "torch"])


@step_backends
@pytest.mark.parametrize("heads", [(2, 2), (4, 4), (12, 4)])
def test_step_equals_the_last_row(heads: tuple[int, int], name: str) -> None:
    """Three sequences of different lengths in one batch: left-padded, right-padded, and full."""
    lengths, width = [5, 9, 12], 12
    leaves, options = make(lengths, heads=heads)
    q, k, v, *rest = (x.detach() for x in leaves)
    ends = borders(lengths).tolist()
    cache_k, cache_v = (torch.full((3, heads[1], width, 4), 99.0, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(3, width, dtype=torch.bool)
    for b, place in enumerate((slice(width - 5, width), slice(0, 9), slice(0, 12))):
        mask[b, place] = True
        for cache, source in ((cache_k, k), (cache_v, v)):
            cache[b, :, place] = source[ends[b] : ends[b + 1]].transpose(0, 1)
    last = torch.tensor(ends[1:]) - 1
    with ops.backend(name):
        got = differential_attention_step(q[last], cache_k, cache_v, *rest, lambda_init=LAMBDA_INIT, key_mask=mask)
        full = differential_attention_step(q[last], cache_k, cache_v, *rest, lambda_init=LAMBDA_INIT)
    wanted = differential_attention(q, k, v, *rest, **options)[last]
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(full[2], wanted[2], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(full[0], wanted[0])


@pytest.mark.parametrize("keys", [1, 70, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_reads_any_cache(keys: int, dtype: torch.dtype) -> None:
    """Buffers with room, transposed or of different strides, a mask that is a view: all as where nothing has gaps."""
    g = torch.Generator().manual_seed(0)
    shape = (3, 4, keys, 8)
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in ((3, 8, 8), shape, shape))
    rest, mask = (torch.tensor(0.3), torch.randn(16, generator=g)), torch.rand(3, keys, generator=g) < 0.8
    mask[:, -1] = True

    def in_buffer(x: Tensor, room: int) -> Tensor:
        buffer = x.new_full((3, 4, room, 8), float("nan"))
        buffer[:, :, 5 : 5 + keys] = x
        return buffer[:, :, 5 : 5 + keys]

    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return differential_attention_step(q, k, v, *rest, lambda_init=LAMBDA_INIT, key_mask=mask)

    wanted = step(q, k, v, mask)
    apart = q.transpose(0, 1).contiguous().transpose(0, 1)
    across = torch.stack([mask, ~mask], -1)[..., 0]
    for others in (
        (in_buffer(k, 300), in_buffer(v, 300)),
        (in_buffer(k, 300), in_buffer(v, 301)),
        (k.transpose(1, 2).contiguous().transpose(1, 2), v.transpose(1, 2).contiguous().transpose(1, 2)),
        (k.transpose(2, 3).contiguous().transpose(2, 3), v),
        (k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)),
    ):
        expanded = others[0].stride(0) == 0
        assert torch.equal(step(apart, *others, across)[:1], wanted[:1])
        assert expanded or torch.equal(step(apart, *others, across), wanted)


def test_a_sequence_is_the_same_bits_in_any_batch() -> None:
    """Whatever stands beside it, and however many places of padding stand before it."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=g) for s in ((2, 8, 8), (2, 4, 90, 8), (2, 4, 90, 8)))
    rest, mask = (torch.tensor(0.3), torch.randn(16, generator=g)), torch.ones(2, 90, dtype=torch.bool)
    mask[0, :13] = False
    both = differential_attention_step(q, k, v, *rest, lambda_init=LAMBDA_INIT, key_mask=mask)
    alone = differential_attention_step(q[:1], k[:1, :, 13:], v[:1, :, 13:], *rest, lambda_init=LAMBDA_INIT)
    assert torch.equal(both[:1], alone)


def test_step_in_half_precision_keeps_its_scores_in_float32() -> None:
    leaves, options = make([300], heads=(4, 2), d=16, dtype=torch.bfloat16)
    q, k, v, *rest = (x.detach() for x in leaves)
    q = q * 8  # large scores, whose rounding would show
    cache = [x.transpose(0, 1)[None] for x in (k, v)]
    got = differential_attention_step(q[-1:], *cache, *rest, lambda_init=LAMBDA_INIT)
    packed = differential_attention(q, k, v, *rest, **options)[-1:]
    exact = definition(*(x.double() for x in (q, k, v, *rest)), **options)[-1:]
    assert got.dtype == torch.bfloat16
    for found in (got, packed):
        assert (found.double() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "heads", "d", "keys"), [(1, (2, 2), 16, 700), (3, (40, 20), 64, 300)])
def test_step_never_widens_the_cache(
    batch: int, heads: tuple[int, int], d: int, keys: int, masked: bool, dtype: torch.dtype
) -> None:
    """Nothing it makes in float32 or copies is near the size of the cache, and it is as exact as its type."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in ((batch, heads[0], d), *[(batch, heads[1], keys, d)] * 2))
    rest, mask = (torch.tensor(0.3), torch.randn(2 * d, generator=g)), torch.rand(batch, keys, generator=g) < 0.8
    options = {"lambda_init": LAMBDA_INIT, "key_mask": mask if masked else None}
    with LargestTensor() as largest:
        got = differential_attention_step(q, k, v, *rest, **options)
    assert 0 < largest.size <= k.numel() * k.element_size() // 8
    exact = differential_attention_step(*(x.double() for x in (q, k, v, *rest)), **options)
    assert got.dtype == dtype and (got.double() - exact).norm() <= 5e-3 * exact.norm()


@step_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sequence_that_sees_nothing_disturbs_no_other(dtype: torch.dtype, name: str) -> None:
    q, k, v = torch.randn(2, 4, 8).to(dtype), torch.randn(2, 2, 9, 8).to(dtype), torch.randn(2, 2, 9, 8).to(dtype)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    options = {"lambda_init": LAMBDA_INIT, "key_mask": mask}
    rest = (torch.tensor(0.3), torch.ones(16))
    with ops.backend(name):
        got = differential_attention_step(q, k, v, *rest, **options)
        alone = differential_attention_step(q[:1], k[:1], v[:1], *rest, lambda_init=LAMBDA_INIT)
    assert got.isfinite().all()
    torch.testing.assert_close(got[:1], alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_step_equals_the_definition(masked: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in ((3, 8, 64), (3, 4, 300, 64), (3, 4, 300, 64)))
    rest, mask = (torch.tensor(0.3), torch.randn(128, generator=g)), torch.rand(3, 300, generator=g) < 0.8
    exact = differential_attention_step(
        *(x.double() for x in (q, k, v, *rest)), lambda_init=LAMBDA_INIT, key_mask=mask if masked else None
    )
    found = differential_attention_step(
        *(x.cuda() for x in (q, k, v, *rest)), lambda_init=LAMBDA_INIT, key_mask=mask.cuda() if masked else None
    )
    assert_relative([found.cpu()], [exact], 2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("suffix", [False, True])
def test_cuda_equals_the_definition(suffix: bool, window: int | None, dtype: torch.dtype) -> None:
    keys = [300, 64, 1, 129]
    leaves, options = make([5, 0, 1, 129] if suffix else keys, keys, heads=(8, 4), d=64, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = value_and_grads(definition, exact, {**options, "window": window})
    moved = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}
    on_device = [x.detach().cuda().requires_grad_() for x in leaves]
    found = value_and_grads(
        lambda *x, **o: differential_attention(*x, **o).cpu(), on_device, {**moved, "window": window}
    )
    assert_relative([x.cpu() for x in found], wanted, 2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 64])
def test_cuda_gives_the_same_bits_every_time(window: int | None) -> None:
    leaves, options = make([3000, 64, 500], heads=(8, 4), d=64, dtype=torch.bfloat16)
    moved = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}
    on_device = [x.detach().cuda().requires_grad_() for x in leaves]
    first, *others = (value_and_grads(differential_attention, on_device, {**moved, "window": window}) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def bad(**changes: Any) -> Callable[[], Tensor]:
    names = ("q", "k", "v", "lambda_full", "subln_weight")
    leaves, options = make([4, 6], heads=(4, 2))
    return lambda: differential_attention(**{**dict(zip(names, leaves, strict=True)), **options, **changes})


@on_each_backend
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(10, 4)}, "3 dimensions"),
        ({"q": torch.zeros(10, 4, 4, dtype=torch.int64)}, "float"),
        ({"q": torch.zeros(10, 4, 4)}, "one type"),
        ({"q": torch.zeros(10, 3, 4, dtype=torch.float64)}, "multiple of key heads"),
        ({"k": torch.zeros(10, 1, 4, dtype=torch.float64), "v": torch.zeros(10, 1, 4, dtype=torch.float64)}, "pairs"),
        ({"v": torch.zeros(9, 2, 4, dtype=torch.float64)}, "v must have shape"),
        ({"lambda_full": torch.zeros(1)}, "lambda_full"),
        ({"subln_weight": torch.ones(4)}, "subln_weight"),
        ({"window": 0}, "window"),
        ({"cu_seqlens_q": borders([4, 6]).long()}, "int32"),
        ({"cu_seqlens_q": borders([4, 5])}, "cu_seqlens_q must end"),
        ({"cu_seqlens_k": borders([10])}, "as many documents"),
        ({"cu_seqlens_k": borders([3, 7])}, "document 0 has 4 queries but 3 keys"),
        ({"cu_seqlens_k": torch.tensor([0, 12, 10], dtype=torch.int32)}, "decrease"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad(**changes)()


def test_bad_step_input_is_named() -> None:
    q, lam, weight = torch.zeros(2, 4, 4), torch.tensor(0.1), torch.ones(8)
    k = torch.zeros(2, 2, 5, 4)
    with pytest.raises(ValueError, match="key_mask must be bool"):
        differential_attention_step(q, k, k, lam, weight, lambda_init=0.3, key_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="sequences"):
        differential_attention_step(q[:1], k, k, lam, weight, lambda_init=0.3)


def test_reference_backend_is_used_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, options = make([7, 20], dtype=torch.float32)
    wanted = differential_attention(*leaves, **options)
    monkeypatch.setenv("SAMBAY_KERNELS", "reference")
    got = differential_attention(*leaves, **options)
    assert "maps_fwd" not in str(got.grad_fn)
    torch.testing.assert_close(got, wanted)
