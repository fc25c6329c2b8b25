"""SwiGLU in Triton, forward and backward: one pass over the elements each."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.functions import sigmoid, silu_slope


@triton.jit
def _piece(width, BLOCK: tl.constexpr):
    """A program's row and its columns. One axis of programs: the others of a grid are short."""
    pieces = tl.cdiv(width, BLOCK)
    row, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    return tl.cast(row, tl.int64), tl.cast(piece, tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def swiglu_forward_kernel(gate, value, out, width, gate_row, value_row, out_row, BLOCK: tl.constexpr):
    """out = silu(gate) * value, for BLOCK elements of a row."""
    row, column = _piece(width, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(value + row * value_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column, (g * sigmoid(g) * m).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    grad, gate, value, of_gate, of_value, width, grad_row, gate_row, value_row, of_gate_row, of_value_row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Both gradients, for BLOCK elements of a row."""
    row, column = _piece(width, BLOCK)
    inside = column < width
    upstream = tl.load(grad + row * grad_row + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(value + row * value_row + column, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(g)
    to_gate, to_value = upstream * m * silu_slope(g, s), upstream * g * s
    tl.store(of_gate + row * of_gate_row + column, to_gate.to(of_gate.dtype.element_ty), mask=inside)
    tl.store(of_value + row * of_value_row + column, to_value.to(of_value.dtype.element_ty), mask=inside)
