"""Causal depthwise convolution in Triton, forward and backward.

A program takes one short segment of a document and BLOCK channels, and walks through its tokens with the last WIDTH - 1
inputs in registers, so that every input is read about once. The backward walks from the end, computes the outputs
before the activation again, and holds the gradients of the WIDTH - 1 tokens ahead instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.functions import limit_if, sigmoid, silu_slope


@triton.jit
def _input(x, initial, x_row, token, border, stop, document, c, channels, WIDTH: tl.constexpr):
    """The input of a token of a document; before its first token the initial state, and zero outside of both."""
    here = (token >= border) & (token < stop)
    value = tl.load(x + tl.cast(token, tl.int64) * x_row + c, mask=c < limit_if(here, channels), other=0.0).to(
        tl.float32
    )
    if initial is not None:
        slot = token - border + WIDTH - 1
        before = (token < border) & (slot >= 0)
        place = (tl.cast(document, tl.int64) * channels + c) * (WIDTH - 1) + slot
        value += tl.load(initial + place, mask=c < limit_if(before, channels), other=0.0).to(tl.float32)
    return value


@triton.jit
def _weights(weight, bias, c, channels, WIDTH: tl.constexpr):
    """The filter as WIDTH vectors over channels, and the bias (zeros where there is none)."""
    taps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + c * WIDTH + k, mask=c < channels, other=0.0).to(tl.float32),)  # noqa: RUF005
    shift = tl.zeros(c.shape, tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    return taps, shift


@triton.jit
def conv_forward_kernel(
    x, weight, bias, initial, starts, ends, documents, borders, y, final, channels, x_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y, and after a document's last segment its final state."""
    tile, segment = tl.program_id(0), tl.program_id(1)
    document = tl.load(documents + segment)
    if document < 0:
        return
    start, end = tl.load(starts + segment), tl.load(ends + segment)
    border, stop = tl.load(borders + document), tl.load(borders + document + 1)
    c = tile * BLOCK + tl.arange(0, BLOCK)
    taps, shift = _weights(weight, bias, c, channels, WIDTH)
    window = ()
    for k in tl.static_range(WIDTH - 1):
        window = window + (  # noqa: RUF005
            _input(x, initial, x_row, start - (WIDTH - 1) + k, border, stop, document, c, channels, WIDTH),
        )
    for token in range(start, end):
        place = tl.cast(token, tl.int64)
        new = tl.load(x + place * x_row + c, mask=c < channels, other=0.0).to(tl.float32)
        window = window + (new,)  # noqa: RUF005
        out = shift
        for k in tl.static_range(WIDTH):
            out += taps[k] * window[k]
        if SILU:
            out *= sigmoid(out)
        tl.store(y + place * channels + c, out.to(y.dtype.element_ty), mask=c < channels)
        window = window[1:]
    if end == stop:
        for k in tl.static_range(WIDTH - 1):
            place = (tl.cast(document, tl.int64) * channels + c) * (WIDTH - 1) + k
            tl.store(final + place, window[k].to(final.dtype.element_ty), mask=c < channels)


@triton.jit
def conv_backward_kernel(
    grad_y, grad_final, x, weight, bias, initial, starts, ends, documents, borders,
    grad_x, grad_weight, grad_bias, grad_initial, channels, grad_row, x_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """grad_x, grad_initial; grad_weight (n, WIDTH, d) and grad_bias (n, d): each segment's own sum over its tokens."""
    tile, segment = tl.program_id(0), tl.program_id(1)
    document = tl.load(documents + segment)
    start, end = tl.load(starts + segment), tl.load(ends + segment)
    border, stop = tl.load(borders + tl.maximum(document, 0)), tl.load(borders + tl.maximum(document, 0) + 1)
    c = tile * BLOCK + tl.arange(0, BLOCK)
    taps, shift = _weights(weight, bias, c, channels, WIDTH)
    # x of tokens t - WIDTH + 2 .. t, gradients (before the activation) of tokens t + 1 .. t + WIDTH - 1, sums.
    window, ahead, sums = (), (), ()
    for k in tl.static_range(WIDTH - 1):
        window = window + (_input(x, initial, x_row, end + k, border, stop, document, c, channels, WIDTH),)  # noqa: RUF005
        ahead = ahead + (tl.zeros((BLOCK,), tl.float32),)  # noqa: RUF005
    for _ in tl.static_range(WIDTH):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)  # noqa: RUF005
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    # The first segment of a document goes on through the initial state; an unused one (document -1) does nothing.
    low = tl.where(start == border, start - (WIDTH - 1), start)
    high = tl.where(document < 0, low, end + WIDTH - 1)
    for back in range(0, high - low):
        token = high - 1 - back
        place = tl.cast(token, tl.int64)
        window = (_input(x, initial, x_row, token - (WIDTH - 1), border, stop, document, c, channels, WIDTH),) + window  # noqa: RUF005
        alive, own = (token >= border) & (token < stop), (token >= start) & (token < end)
        g = tl.zeros((BLOCK,), tl.float32)
        if grad_y is not None:
            g = tl.load(grad_y + place * grad_row + c, mask=c < limit_if(alive, channels), other=0.0).to(tl.float32)
        if SILU:
            out = shift
            for k in tl.static_range(WIDTH):
                out += taps[k] * window[k]
            g *= silu_slope(out, sigmoid(out))
        ahead = (g,) + ahead  # noqa: RUF005
        grad = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(WIDTH):
            grad += taps[WIDTH - 1 - k] * ahead[k]
        if grad_final is not None:
            slot = token - stop + WIDTH - 1
            kept = tl.where((slot >= 0) & (token < stop), channels, 0)
            at = (tl.cast(document, tl.int64) * channels + c) * (WIDTH - 1) + slot
            grad += tl.load(grad_final + at, mask=c < kept, other=0.0).to(tl.float32)
        tl.store(grad_x + place * channels + c, grad.to(grad_x.dtype.element_ty), mask=c < limit_if(own, channels))
        if grad_initial is not None:
            at = (tl.cast(document, tl.int64) * channels + c) * (WIDTH - 1) + (token - border + WIDTH - 1)
            tl.store(grad_initial + at, grad, mask=c < limit_if(token < border, channels))
        g = tl.where(own, g, 0.0)
        added = ()
        for k in tl.static_range(WIDTH):
            added = added + (sums[k] + g * window[k],)  # noqa: RUF005
        sums = added
        sum_bias += g
        window, ahead = window[:-1], ahead[:-1]
    for k in tl.static_range(WIDTH):
        tl.store(grad_weight + (tl.cast(segment, tl.int64) * WIDTH + k) * channels + c, sums[k], mask=c < channels)
    if grad_bias is not None:
        tl.store(grad_bias + tl.cast(segment, tl.int64) * channels + c, sum_bias, mask=c < channels)


@triton.jit
def conv_step_kernel(
    state, x, weight, bias, slots, y, channels, x_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr
):
    """One token of one sequence: y, and the inputs in its slot move on by one."""
    tile, row = tl.program_id(0), tl.program_id(1)
    slot = tl.cast(row, tl.int64)
    if slots is not None:
        slot = tl.load(slots + row)
    c = tile * BLOCK + tl.arange(0, BLOCK)
    taps, out = _weights(weight, bias, c, channels, WIDTH)
    place = (slot * channels + c) * (WIDTH - 1)
    new = tl.load(x + tl.cast(row, tl.int64) * x_row + c, mask=c < channels, other=0.0)
    out += taps[WIDTH - 1] * new.to(tl.float32)
    for k in tl.static_range(WIDTH - 1):
        value = tl.load(state + place + k, mask=c < channels, other=0.0)
        out += taps[k] * value.to(tl.float32)
        if k > 0:
            tl.store(state + place + k - 1, value, mask=c < channels)
    if WIDTH > 1:
        tl.store(state + place + WIDTH - 2, new.to(state.dtype.element_ty), mask=c < channels)
    if SILU:
        out *= sigmoid(out)
    tl.store(y + tl.cast(row, tl.int64) * channels + c, out.to(y.dtype.element_ty), mask=c < channels)
