"""Decoding steps on the CPU's backends: token by token as the whole, in slots, in place."""

from __future__ import annotations

import packed_ops as ops
import pytest
import torch
from sambay_kernels import causal_conv1d_step, selective_scan_step
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
