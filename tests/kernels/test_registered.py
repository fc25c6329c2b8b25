"""Ops called without torch's dispatcher: the same bits as by it, and none the less followed by all that follows."""

from __future__ import annotations

import pytest
import torch
from sambay_kernels import swiglu
from sambay_kernels.ops.swiglu.op import swiglu_fused_bwd, swiglu_fused_fwd
from sambay_kernels.runtime.registered import RegisteredOp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class Seen(TorchDispatchMode):
    """Notes the ops that torch is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def outcome(fused: Tensor) -> list[Tensor]:
    out = swiglu(fused)
    return [out, torch.autograd.grad(out, fused, torch.cos(out))[0]]


@pytest.mark.parametrize("autocast", [False, True])
def test_the_dispatcher_makes_no_difference_and_modes_see_the_op(autocast: bool) -> None:
    fused = torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = outcome(fused)
        with Seen() as seen:
            followed = outcome(fused)
    assert all(map(torch.equal, plain, followed))
    assert {"sambay_kernels::swiglu_fused_fwd", "sambay_kernels::swiglu_fused_bwd"} <= set(seen.names)


def test_counts_profiles_and_traces_hold_the_op() -> None:
    fused = torch.randn(5, 8)
    with FlopCounterMode(display=False) as counter:
        swiglu(fused)
    assert counter.get_total_flops() == 2 * 20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        swiglu(fused)
    assert "sambay_kernels::swiglu_fused_fwd" in {event.key for event in profiled.key_averages()}
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: swiglu(x))(fused)
    assert "swiglu_fused_fwd" in traced.code


def test_what_has_no_gradient_is_refused_and_nothing_is_recorded_without_need() -> None:
    grad, fused = torch.randn(5, 4), torch.randn(5, 8)
    assert swiglu(fused).grad_fn is None
    with torch.no_grad():
        assert not swiglu(fused.requires_grad_()).requires_grad
    with pytest.raises(RuntimeError, match="no autograd"):
        swiglu_fused_bwd(grad, fused, "torch").sum().backward()
    assert isinstance(swiglu_fused_fwd, RegisteredOp)
