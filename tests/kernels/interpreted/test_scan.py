"""The selective scan in Triton against the float64 loop."""

from __future__ import annotations

from dataclasses import replace

import packed_ops as ops
import pytest
import torch
from sambay_kernels.ops.selective_scan import triton as triton_backend
from sambay_kernels.ops.selective_scan.op import selective_scan_bwd, selective_scan_fwd
from step_ops import assert_steps_match
from torch.utils.checkpoint import checkpoint

KEPT = triton_backend.TRITON_KEPT_EVERY
LENGTHS = [0, 1, 2, KEPT - 1, KEPT, KEPT + 1, 0, 2 * KEPT + 3, 0]


@pytest.fixture(params=["whole", "cut"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents in one segment, and cut into segments of one kept block each."""
    if request.param == "cut":
        monkeypatch.setattr(triton_backend, "segment_length", lambda *_: KEPT)


@pytest.mark.parametrize("channels", [24, 70])
def test_fp32_matches_the_float64_loop(cut: None, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "channel_block", lambda *_: 32)  # 70 channels: three tiles, the last ragged
    case = ops.scan_case(LENGTHS, channels=channels)
    ops.assert_close(ops.run(case, "triton"), ops.run(case.to(torch.float64), "reference"), 1e-5)


def test_one_long_document_among_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "segment_length", lambda *_: 2 * KEPT)
    case = ops.scan_case([3, 9 * KEPT + 5, 2 * KEPT, 2 * KEPT + 1])
    ops.assert_close(ops.run(case, "triton"), ops.run(case.to(torch.float64), "reference"), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(cut: None, dtype: torch.dtype) -> None:
    case = ops.scan_case([20, 3, 17])
    mixed = {key: case.tensors[key].to(dtype) for key in ("u", "delta", "B", "C", "z")}
    case = replace(case, tensors={**case.tensors, **mixed})
    found = ops.run(case, "triton")
    assert found["y"].dtype == dtype and found["final_state"].dtype == torch.float32
    exact = ops.run(case.to(torch.float64), "reference")
    ops.assert_close(found, exact, 5e-3, d_A=1e-4, d_D=1e-4, d_delta_bias=1e-4, d_initial_state=1e-5, final_state=1e-5)


@pytest.mark.parametrize("states", [1, 5, 16])
@pytest.mark.parametrize("absent", [("initial_state",), ("D", "z", "delta_bias"), ("z", "initial_state")])
def test_optional_inputs_and_ragged_states(absent: tuple[str, ...], states: int) -> None:
    case = ops.scan_case([5, 0, 20], states=states).without(*absent)
    ops.assert_close(ops.run(case, "triton"), ops.run(case.to(torch.float64), "reference"), 1e-5)


def test_without_softplus(cut: None) -> None:
    case = ops.scan_case([5, 0, 20])
    case.tensors["delta"].abs_().mul_(0.1)
    case.tensors["delta_bias"].abs_()
    exact = ops.run(case.to(torch.float64), "reference", delta_softplus=False)
    ops.assert_close(ops.run(case, "triton", delta_softplus=False), exact, 1e-5)


@pytest.mark.parametrize("delta", [-30.0, 19.9, 20.1, 60.0])
def test_tiny_and_huge_steps(cut: None, delta: float) -> None:
    """A = -16 with a step of 5 underflows the decay; softplus passes through above 20."""
    case = ops.scan_case([20, 13]).without("delta_bias")
    case.tensors["A"].fill_(-16.0)
    case.tensors["delta"].fill_(delta).add_(torch.linspace(-0.05, 0.05, 24))
    exact, found = ops.run(case.to(torch.float64), "reference"), ops.run(case, "triton")
    assert ops.rms_error(found["y"], exact["y"]) <= 1e-5
    for key in found:
        difference = (found[key].double() - exact[key]).abs()
        assert (difference <= 2e-5 * exact[key].abs().max() + 1e-30).all(), key


def test_only_the_final_state_used(cut: None) -> None:
    case = ops.scan_case([5, 0, 20])
    leaves = {key: value.clone().requires_grad_() for key, value in case.tensors.items()}
    grads = {}
    for name in ("triton", "reference"):
        with ops.backend(name):
            final = case.op(**leaves, cu_seqlens=case.cu_seqlens)[1]
        grads[name] = torch.autograd.grad(final.square().sum(), list(leaves.values()), allow_unused=True)
    for key, found, want in zip(leaves, grads["triton"], grads["reference"], strict=True):
        zero = torch.zeros_like(leaves[key])
        assert ops.rms_error(zero if found is None else found, zero if want is None else want) <= 1e-5, key


def test_strided_rows_are_read_in_place() -> None:
    """B and C are views of one projection, u and z of another, as in the model."""
    case = ops.scan_case([5, 20])
    want = ops.run(case, "triton")
    maps = torch.cat([case.tensors["B"], case.tensors["C"]], 1)
    wide = torch.cat([case.tensors["u"], case.tensors["z"]], 1)
    states, channels = 16, 24
    views = {"B": maps[:, :states], "C": maps[:, states:], "u": wide[:, :channels], "z": wide[:, channels:]}
    with ops.backend("triton"):
        y, final = case.op(**{**case.tensors, **views}, cu_seqlens=case.cu_seqlens)
    assert torch.equal(y, want["y"]) and torch.equal(final, want["final_state"])


def test_packed_equals_separate() -> None:
    ops.assert_packed_equals_separate(ops.scan_case(LENGTHS), "triton", exact=True)


def test_one_document_changes_nothing_in_another(cut: None) -> None:
    case = ops.scan_case([20, 17, 5])
    changed = replace(case, tensors={key: value.clone() for key, value in case.tensors.items()})
    for key in case.tokens:
        changed.tensors[key][20:37] += 1.0
    before, after = ops.run(case, "triton"), ops.run(changed, "triton")
    others = torch.tensor([*range(20), *range(37, 42)])
    for key in ("y", *(f"d_{name}" for name in case.tokens)):
        assert torch.equal(before[key][others], after[key][others]), key
    for key in ("final_state", "d_initial_state"):
        assert torch.equal(before[key][[0, 2]], after[key][[0, 2]]), key


def test_without_tokens() -> None:
    case = ops.scan_case([0, 0])
    found = ops.run(case, "triton")
    assert torch.equal(found["final_state"], case.tensors["initial_state"])


def test_as_a_torch_op() -> None:
    case = ops.scan_case([3, 9])
    values = [case.tensors[key] for key in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    inputs = (*values, True, case.cu_seqlens, case.tensors["initial_state"])
    torch.library.opcheck(selective_scan_fwd.op, (*[x.requires_grad_() for x in values], *inputs[8:], True, "triton"))
    fixed = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
    y, final, kept = selective_scan_fwd(*fixed, True, "triton")
    torch.library.opcheck(selective_scan_bwd.op, (y, final, *fixed, kept, "triton"))


def test_checkpointed_and_compiled_gradients_are_the_same() -> None:
    case = ops.scan_case([3, 9])
    leaves = {key: value.requires_grad_() for key, value in case.tensors.items()}

    def loss(**tensors: torch.Tensor) -> torch.Tensor:
        y, final = case.op(**tensors, cu_seqlens=case.cu_seqlens)
        return y.square().sum() + final.sum()

    with ops.backend("triton"):
        forms = (
            loss,
            lambda **x: checkpoint(loss, use_reentrant=False, **x),
            torch.compile(loss, fullgraph=True, backend="aot_eager"),
        )
        grads = [torch.autograd.grad(form(**leaves), list(leaves.values())) for form in forms]
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("slots", [None, [4, 0, 2]])
@pytest.mark.parametrize("gated", [True, False])
def test_steps_are_those_of_the_whole_scan(slots: list[int] | None, gated: bool) -> None:
    assert_steps_match("triton", slots, gated)
