"""Functions that the Triton kernels share: those of csrc/scan_core.h, in float32, and masks.

Written out because the Triton interpreter, which runs the tests on machines without a GPU, knows no log1p.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SOFTPLUS_THRESHOLD = tl.constexpr(20.0)


@triton.jit
def exp_of(x):
    """e^x."""
    return tl.exp2(x * LOG2E)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + exp_of(-x))


@triton.jit
def silu_slope(x, s):
    """d silu / dx, given s = sigmoid(x)."""
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def log1p_of(y):
    """log(1 + y) for y in [0, 1], with small relative error down to y -> 0: 2 atanh(y / (2 + y))."""
    s = y / (2.0 + y)
    q = s * s
    p = 0.1408916711807251 * q + 0.13980300724506378
    p = p * q + 0.20012454688549042
    p = p * q + 0.3333315849304199
    p = p * q + 1.0
    return 2.0 * s * p


@triton.jit
def softplus(x):
    """log(1 + e^x); x above 20."""
    soft = tl.where(x < 0.0, 0.0, x) + log1p_of(exp_of(-tl.abs(x)))
    return tl.where(x > SOFTPLUS_THRESHOLD, x, soft)


@triton.jit
def softplus_slope(x):
    """d softplus / dx."""
    return tl.where(x > SOFTPLUS_THRESHOLD, 1.0, sigmoid(x))


@triton.jit
def limit_if(condition, limit):
    """The limit, or 0 where a condition on the whole program fails: masks a row out without a branch.

    (`mask & condition` would do on a GPU, but the interpreter can't widen a single truth value.)
    """
    return tl.where(condition, limit, 0)
