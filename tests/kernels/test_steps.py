"""Decoding steps on the CPU's backends: token by token as the whole, in slots, in place."""

from __future__ import annotations

import packed_ops as ops
import pytest
import torch
from sambay_kernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step, why
from sambay_kernels.triton.launch import problem as triton_problem
from step_ops import assert_conv_steps_match, assert_steps_match

backends = pytest.mark.parametrize("name", [*ops.BACKENDS, "reference"])


@backends
@pytest.mark.parametrize("slots", [None, [4, 0, 2]])
@pytest.mark.parametrize("gated", [True, False])
def test_scan_steps(name: str, slots: list[int] | None, gated: bool) -> None:
    assert_steps_match(name, slots, gated)


@backends
@pytest.mark.parametrize("slots", [None, [4, 0, 2]])
@pytest.mark.parametrize(("width", "activation"), [(4, "silu"), (2, None), (1, "silu")])
def test_conv_steps(name: str, slots: list[int] | None, width: int, activation: str | None) -> None:
    assert_conv_steps_match(name, slots, width, activation)


@pytest.mark.parametrize("name", ops.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_steps_in_other_types_are_the_packed_ops(name: str, dtype: torch.dtype) -> None:
    scan, conv = (_one_token(case, dtype) for case in (ops.scan_case([1, 1, 1]), ops.conv_case([1, 1, 1])))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-12
    borders = torch.arange(4, dtype=torch.int32)
    with ops.backend(name):
        want = selective_scan(**scan, cu_seqlens=borders)
        state = scan.pop("initial_state")
        got = (selective_scan_step(state, **scan), state)
        want += causal_conv1d(**conv, cu_seqlens=borders)
        state = conv.pop("initial_state")
        got += (causal_conv1d_step(state, **conv), state)
    for value, expected in zip(got, want, strict=True):
        assert value.dtype == expected.dtype
        assert ops.rms_error(value.double(), expected.double()) <= tolerance


def _one_token(case: ops.Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The case's tensors in this type; a scan's state, (documents, d, N), in the type it is calculated in."""
    tensors = {key: value.to(dtype) for key, value in case.tensors.items()}
    if "A" in tensors:
        tensors["initial_state"] = case.tensors["initial_state"].to(torch.promote_types(dtype, torch.float32))
    return tensors


@pytest.mark.parametrize("name", ops.BACKENDS)
def test_autograd_notices_that_a_state_has_changed(name: str) -> None:
    """A state that a backward pass still needs must not be changed behind its back."""
    u, maps = torch.randn(2, 8), torch.randn(2, 4)
    state, weight = torch.zeros(2, 8, 4), torch.ones(2, 8, 4, requires_grad=True)
    product = (state * weight).sum()
    with ops.backend(name):
        selective_scan_step(state, u, u, -torch.ones(8, 4), maps, maps)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_steps_are_traced_whole() -> None:
    u, maps, A, taps = torch.randn(2, 8), torch.randn(2, 4), -torch.rand(8, 4), torch.randn(8, 4)

    def step(scan_state: torch.Tensor, conv_state: torch.Tensor) -> torch.Tensor:
        return selective_scan_step(scan_state, causal_conv1d_step(conv_state, u, taps), u, A, maps, maps)

    traced = torch.compile(step, backend="eager", fullgraph=True)
    with ops.backend("cpp"):
        results = []
        for function in (step, traced):
            states = (torch.ones(2, 8, 4), torch.ones(2, 8, 3))
            results.append([function(*states), *states])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wish", ["auto", "cuda", "reference"])
def test_a_wish_that_a_step_lacks_leaves_it_its_best(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMBAY_KERNELS", wish)
    best = "torch" if triton_problem() else "triton"
    assert why("selective_scan_step", "cuda").backend == why("causal_conv1d_step", "cuda").backend == best
    assert why("causal_conv1d_step", "cpu").backend == "torch"


def test_bad_states_are_named() -> None:
    u, maps, A = torch.randn(2, 8), torch.randn(2, 4), -torch.rand(8, 4)
    with pytest.raises(ValueError, match="state has 3 slots for 2 sequences: pass slots too"):
        selective_scan_step(torch.zeros(3, 8, 4), u, u, A, maps, maps)
    with pytest.raises(ValueError, match="state must be contiguous"):
        selective_scan_step(torch.zeros(2, 4, 8).transpose(1, 2), u, u, A, maps, maps)
    with pytest.raises(ValueError, match=r"state must be torch\.float32, got torch\.bfloat16"):
        selective_scan_step(torch.zeros(2, 8, 4, dtype=torch.bfloat16), u, u, A, maps, maps)
    with pytest.raises(ValueError, match="slots must be int64 of shape"):
        causal_conv1d_step(torch.zeros(3, 8, 3), u, torch.randn(8, 4), slots=torch.zeros(2, dtype=torch.int32))
