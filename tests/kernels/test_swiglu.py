"""The gate: every backend against its definition in float64, and as a torch op."""

from __future__ import annotations

import packed_ops as ops
import pytest
import torch
from sambay_kernels import swiglu
from sambay_kernels.ops.swiglu.op import swiglu_bwd, swiglu_fused_bwd, swiglu_fused_fwd, swiglu_fwd
from sambay_kernels.ops.swiglu.reference import swiglu_reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

backends = pytest.mark.parametrize("name", ops.BACKENDS)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """gate, value and upstream gradient."""
    g = torch.Generator().manual_seed(0)
    gate, value, grad = (torch.randn(shape, generator=g).bfloat16().to(dtype) for _ in range(3))
    return 4 * gate, value, grad


def run(name: str, gate: Tensor, value: Tensor, grad: Tensor) -> dict[str, Tensor]:
    leaves = gate.detach().clone().requires_grad_(), value.detach().clone().requires_grad_()
    with ops.backend(name):
        y = swiglu(*leaves)
        grads = torch.autograd.grad(y, leaves, grad.to(y.dtype))
    assert y.dtype == gate.dtype and grads[0].dtype == gate.dtype and grads[1].dtype == value.dtype
    return {"y": y.detach(), "d_gate": grads[0], "d_value": grads[1]}


@backends
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (17,), (33, 70), (2, 3, 5), (300, 200)])
def test_fp32_matches_float64(name: str, shape: tuple[int, ...]) -> None:
    case = inputs(*shape)
    exact = run("reference", *(value.double() for value in case))
    ops.assert_close(run(name, *case), exact, 1e-5)


@backends
def test_other_types(name: str) -> None:
    for dtype, bound in ((torch.float64, 1e-13), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)):
        case = inputs(33, 70, dtype=dtype)
        exact = run("reference", *(value.double() for value in case))
        ops.assert_close(run(name, *case), exact, bound)
    gate, value, grad = inputs(33, 70)
    found = run(name, gate.bfloat16(), value, grad)
    ops.assert_close(found, run("reference", gate.double(), value.double(), grad.double()), 5e-3)


@backends
def test_far_values(name: str) -> None:
    gate = torch.tensor([-200.0, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 3e38])
    found = run(name, gate, torch.ones(9), torch.ones(9))
    exact = run("reference", gate.double(), torch.ones(9).double(), torch.ones(9))
    for key, value in found.items():
        assert torch.allclose(value.double(), exact[key], rtol=1e-5, atol=1e-35), key
    bad = run(name, torch.tensor([float("nan"), 1.0]), torch.ones(2), torch.ones(2))
    assert bad["y"][0].isnan() and bad["y"][1].isfinite()


@backends
def test_strided_inputs_and_rows_by_themselves(name: str) -> None:
    gate, value, grad = inputs(64, 70)
    want = run(name, gate, value, grad)
    halves = torch.cat([gate, value], 1)
    with ops.backend(name):
        y = swiglu(*halves.chunk(2, 1))
        rows = torch.cat([swiglu(gate[i : i + 7], value[i : i + 7]) for i in range(0, 64, 7)])
    assert y.is_contiguous()
    assert ops.rms_error(y, want["y"]) <= 1e-7 and ops.rms_error(rows, want["y"]) <= 1e-7


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2,), (3, 0), (33, 70), (2, 3, 10), (300, 200)])
def test_halves_of_one_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As two tensors give, with one gradient; also from rows that stand apart."""
    fused, _, up = inputs(*shape[:-1], shape[-1] + 6, dtype=dtype)
    with ops.backend(name):
        for leaf in (fused[..., :-6].clone().requires_grad_(), fused.requires_grad_()):
            both = leaf if leaf.shape == shape else leaf[..., :-6]
            gate, value = (half.detach().clone().requires_grad_() for half in both.chunk(2, -1))
            want = swiglu(gate, value)
            y, grad = swiglu(both), up[..., : shape[-1] // 2]
            assert y.is_contiguous() and ops.rms_error(y, want) <= 1e-7
            (found,) = torch.autograd.grad(y, leaf, grad)
            halves = torch.autograd.grad(want, (gate, value), grad)
            assert found.dtype == dtype and ops.rms_error(found[..., : shape[-1]], torch.cat(halves, -1)) <= 1e-7


def test_gradcheck_of_the_reference() -> None:
    gate, value, _ = inputs(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(swiglu_reference, [gate.requires_grad_(), value.requires_grad_()])


@backends
def test_opcheck(name: str) -> None:
    gate, value, grad = inputs(3, 4)
    with ops.backend(name):
        torch.library.opcheck(swiglu_fwd.op, (gate.requires_grad_(), value.requires_grad_(), name))
        args = (grad, gate.detach(), value.detach(), name)
        torch.library.opcheck(swiglu_bwd.op, args, test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(swiglu_fused_fwd.op, (gate, name))
        torch.library.opcheck(
            swiglu_fused_bwd.op, (grad[:, :2], gate.detach(), name), test_utils=("test_schema", "test_faketensor")
        )


@backends
def test_compile_and_checkpoint_give_the_same_gradients(name: str) -> None:
    gate, value, _ = inputs(6, 8)

    def call(*tensors: Tensor) -> Tensor:
        return swiglu(*tensors).sin().sum()

    def gradients(function: object) -> list[Tensor]:
        leaves = [gate.clone().requires_grad_(), value.clone().requires_grad_()]
        return list(torch.autograd.grad(function(*leaves), leaves))

    torch.compiler.reset()  # a compiled graph keeps the backend it was traced with
    with ops.backend(name):
        want = gradients(call)
        compiled = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"))
        kept = gradients(lambda *leaves: checkpoint(call, *leaves, use_reentrant=False))
    for one, two, three in zip(want, compiled, kept, strict=True):
        assert torch.equal(one, three) and ops.rms_error(two, one) <= 1e-7


def test_flops_are_counted() -> None:
    gate, value, _ = inputs(6, 8)
    with ops.backend("torch"), FlopCounterMode(display=False) as counter:
        swiglu(gate.requires_grad_(), value).sum().backward()
    assert counter.get_total_flops() == 9 * 48


@pytest.mark.parametrize("name", [*ops.BACKENDS, "reference"])
def test_bad_input_is_named(name: str) -> None:
    gate = torch.zeros(2, 3)
    with ops.backend(name):
        with pytest.raises(ValueError, match="value must have shape \\(2, 3\\), got \\(3,\\)"):
            swiglu(gate, torch.zeros(3))
        with pytest.raises(ValueError, match="gate's last dimension must be even, got shape \\(2, 3\\)"):
            swiglu(gate)
        with pytest.raises(ValueError, match="gate must be float32"):
            swiglu(gate.int(), gate)
        with pytest.raises(ValueError, match="value is on meta"):
            swiglu(gate, gate.to("meta"))
        with pytest.raises(TypeError, match="gate must be a tensor"):
            swiglu([1.0], gate)
