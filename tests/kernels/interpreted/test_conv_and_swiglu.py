"""The causal convolution and the gate in Triton against their float64 definitions."""

from __future__ import annotations

from dataclasses import replace

import packed_ops as ops
import pytest
import torch
from sambay_kernels import swiglu
from sambay_kernels.ops.causal_conv1d import triton as triton_backend
from sambay_kernels.ops.causal_conv1d.op import causal_conv1d_bwd, causal_conv1d_fwd
from sambay_kernels.ops.swiglu.op import swiglu_bwd, swiglu_fwd
from step_ops import assert_conv_steps_match

LENGTHS = [0, 1, 2, 3, 4, 7, 0, 8, 9, 21, 0]


@pytest.fixture(params=[64, 8])
def time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents in one segment, and in several."""
    monkeypatch.setattr(triton_backend, "TIME", request.param)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_conv_fp32_matches_the_definition(time: None, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "channel_block", lambda *_: 16)  # 24 channels: two tiles, one ragged
    case = ops.conv_case(LENGTHS, width=width)
    ops.assert_close(ops.run(case, "triton"), ops.run(case.to(torch.float64), "reference"), 1e-5)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("absent", [("bias",), ("initial_state",), ("bias", "initial_state")])
def test_conv_optional_inputs(activation: str | None, absent: tuple[str, ...]) -> None:
    case = ops.conv_case([5, 0, 12]).without(*absent)
    exact = ops.run(case.to(torch.float64), "reference", activation=activation)
    ops.assert_close(ops.run(case, "triton", activation=activation), exact, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conv_half_precision(time: None, dtype: torch.dtype) -> None:
    case = ops.conv_case([20, 3, 17])
    case = replace(case, tensors={**case.tensors, "x": case.tensors["x"].to(dtype)})
    found, exact = ops.run(case, "triton"), ops.run(case.to(torch.float64), "reference")
    assert found["y"].dtype == dtype
    ops.assert_close(found, exact, 5e-3, d_weight=1e-4, d_bias=1e-4)


def test_conv_packed_equals_separate() -> None:
    ops.assert_packed_equals_separate(ops.conv_case(LENGTHS), "triton", exact=True)


def test_conv_one_document_changes_nothing_in_another(time: None) -> None:
    case = ops.conv_case([20, 17, 5])
    changed = replace(case, tensors={key: value.clone() for key, value in case.tensors.items()})
    changed.tensors["x"][20:37] += 1.0
    before, after = ops.run(case, "triton"), ops.run(changed, "triton")
    others = torch.tensor([*range(20), *range(37, 42)])
    assert all(torch.equal(before[key][others], after[key][others]) for key in ("y", "d_x"))
    assert all(torch.equal(before[key][[0, 2]], after[key][[0, 2]]) for key in ("final_state", "d_initial_state"))


def test_conv_reads_strided_rows_in_place() -> None:
    case = ops.conv_case([5, 12])
    wide = torch.randn(17, 48)
    wide[:, :24] = case.tensors["x"]
    with ops.backend("triton"):
        y, _ = case.op(**{**case.tensors, "x": wide[:, :24]}, cu_seqlens=case.cu_seqlens)
    assert torch.equal(y, ops.run(case, "triton")["y"])


# The interpreter cuts bfloat16 off where a GPU rounds it: one value may be wrong by 2**-7, twice as much as need be.
@pytest.mark.parametrize("shape", [(7, 40), (2, 3, 8), (5,), (), (0, 4)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_gate_matches_the_definition(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    gate, value = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    results = {}
    for name, wide in (("triton", dtype), ("reference", torch.float64)):
        leaves = [x.to(wide).requires_grad_() for x in (gate, value)]
        with ops.backend(name):
            out = swiglu(*leaves)
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    for found, want in zip(results["triton"], results["reference"], strict=True):
        assert found.dtype == dtype and ops.rms_error(found, want) <= bound


def test_gate_of_two_halves_of_one_matrix() -> None:
    fused = torch.randn(7, 80, requires_grad=True)
    with ops.backend("triton"):
        out = swiglu(*fused.chunk(2, -1))
    (grad,) = torch.autograd.grad(out.sum(), fused)
    want = torch.nn.functional.silu(fused[:, :40]) * fused[:, 40:]
    (exact,) = torch.autograd.grad(want.sum(), fused)
    assert torch.allclose(out, want, atol=1e-6) and torch.allclose(grad, exact, atol=1e-6)


def test_as_torch_ops() -> None:
    case = ops.conv_case([3, 9])
    values = [case.tensors[key].requires_grad_() for key in ("x", "weight", "bias", "initial_state")]
    inputs = (*values[:3], "silu", case.cu_seqlens, values[3])
    torch.library.opcheck(causal_conv1d_fwd.op, (*inputs, "triton"))
    fixed = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
    torch.library.opcheck(causal_conv1d_bwd.op, (*causal_conv1d_fwd(*fixed, "triton"), *fixed, "triton"))
    gate = torch.randn(3, 8)
    torch.library.opcheck(swiglu_fwd.op, (gate.requires_grad_(), gate, "triton"))
    torch.library.opcheck(swiglu_bwd.op, (gate.detach(), gate.detach(), gate.detach(), "triton"))


@pytest.mark.parametrize("slots", [None, [4, 0, 2]])
@pytest.mark.parametrize(("width", "activation"), [(4, "silu"), (2, None), (1, "silu")])
def test_conv_steps_are_those_of_the_whole(slots: list[int] | None, width: int, activation: str | None) -> None:
    assert_conv_steps_match("triton", slots, width, activation)
