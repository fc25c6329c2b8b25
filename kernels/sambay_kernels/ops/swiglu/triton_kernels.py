"""SwiGLU in Triton, forward and backward: one pass over the elements each."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.functions import sigmoid, silu_slope


@triton.jit
def swiglu_forward_kernel(gate, value, out, width, gate_row, value_row, BLOCK: tl.constexpr):
    """out = silu(gate) * value, for BLOCK elements of a row."""
    row, column = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(value + row * value_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (g * sigmoid(g) * m).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    grad, gate, value, grad_gate, grad_value, width, grad_row, gate_row, value_row, BLOCK: tl.constexpr
):
    """Both gradients, for BLOCK elements of a row."""
    row, column = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    upstream = tl.load(grad + row * grad_row + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(value + row * value_row + column, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(g)
    of_gate, of_value = upstream * m * silu_slope(g, s), upstream * g * s
    tl.store(grad_gate + row * width + column, of_gate.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_value + row * width + column, of_value.to(grad_value.dtype.element_ty), mask=inside)
