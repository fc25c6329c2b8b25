"""Selective scan in Triton, forward and backward.

A program takes one segment of a document and BLOCK channels, and walks through the segment's tokens. With one warp and
32 channels every lane holds all states of its channel in registers, so the sum over states needs no exchange between
lanes. Decays are powers of two of delta * A * log2(e).

A document that is one segment takes one pass. Longer ones take three: `local` runs each segment but the last from zero,
`carry` adds up the states at the cuts, `forward` runs from those. The backward mirrors this from the end. It gets the
states before every KEEP-th token from the forward pass, and computes the others again, GROUP tokens at a time, in
registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.functions import LOG2E, limit_if, sigmoid, silu_slope, softplus, softplus_slope


@triton.jit
def _time_step(raw, bias, SOFTPLUS: tl.constexpr):
    """The step delta' from its stored form; bias is zero where there is none."""
    step = raw + bias
    return softplus(step) if SOFTPLUS else step


@triton.jit
def _load_row(pointer, stride, token, index, limit):
    """Entries `index` below `limit` of a row of a (T, width) matrix in float32, zero elsewhere."""
    return tl.load(pointer + tl.cast(token, tl.int64) * stride + index, mask=index < limit, other=0.0).to(tl.float32)


@triton.jit
def _load_channels(pointer, index, mask):
    """A vector over channels in float32; zeros where the argument is None."""
    values = tl.zeros(mask.shape, tl.float32)
    if pointer is not None:
        values = tl.load(pointer + index, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _decay(A, c, n, inside, STATES: tl.constexpr):
    """A (d_inner, N) as (N, channels), times log2(e)."""
    return tl.load(A + c[None, :] * STATES + n[:, None], mask=inside, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def _place(segment, c, n, channels, STATES: tl.constexpr):
    """Where a segment's states stand in (n, N, d_inner)."""
    return tl.cast(segment, tl.int64) * STATES * channels + n[:, None] * channels + c[None, :]


@triton.jit
def scan_local_kernel(
    u, delta, A, B, bias, starts, ends, documents, borders, local, total_step,
    channels, u_row, delta_row, B_row,
    STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The state after each segment that began from zero, (n, N, d_inner), and the sum of its steps, (n, d_inner).

    Only where another segment of the same document follows.
    """
    tile, segment = tl.program_id(0), tl.program_id(1)
    document = tl.load(documents + segment)
    if document < 0:
        return
    start, end = tl.load(starts + segment), tl.load(ends + segment)
    if end == tl.load(borders + document + 1):
        return
    c, n = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    in_c, in_n = c < channels, n < STATES
    inside = in_n[:, None] & in_c[None, :]
    decay = _decay(A, c, n, inside, STATES)
    shift = _load_channels(bias, c, in_c)
    h = tl.zeros((PADDED, BLOCK), tl.float32)
    elapsed = tl.zeros((BLOCK,), tl.float32)
    x, raw = _load_row(u, u_row, start, c, channels), _load_row(delta, delta_row, start, c, channels)
    b = _load_row(B, B_row, start, n, STATES)
    for token in range(start, end):
        step, driven, b_now = _time_step(raw, shift, SOFTPLUS), x, b
        more = token + 1 < end
        x = _load_row(u, u_row, token + 1, c, limit_if(more, channels))
        raw = _load_row(delta, delta_row, token + 1, c, limit_if(more, channels))
        b = _load_row(B, B_row, token + 1, n, limit_if(more, STATES))
        h = tl.exp2(decay * step[None, :]) * h + b_now[:, None] * (step * driven)[None, :]
        elapsed += step
    place = tl.cast(segment, tl.int64) * channels + c
    tl.store(total_step + place, elapsed, mask=in_c)
    tl.store(local + _place(segment, c, n, channels, STATES), h, mask=inside)


@triton.jit
def scan_carry_kernel(
    A, initial, first, local, total_step, carried, channels,
    STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state before every segment of a document but its first, (n, N, d_inner): the cuts, one after another."""
    tile, document = tl.program_id(0), tl.program_id(1)
    begin, stop = tl.load(first + document), tl.load(first + document + 1)
    c, n = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    in_c = c < channels
    inside = (n < STATES)[:, None] & in_c[None, :]
    decay = _decay(A, c, n, inside, STATES)
    h = tl.zeros((PADDED, BLOCK), tl.float32)
    if initial is not None:
        place = (tl.cast(document, tl.int64) * channels + c[None, :]) * STATES + n[:, None]
        h = tl.load(initial + place, mask=inside, other=0.0).to(tl.float32)
    for segment in range(begin, stop - 1):
        elapsed = tl.load(total_step + tl.cast(segment, tl.int64) * channels + c, mask=in_c, other=0.0)
        place = _place(segment, c, n, channels, STATES)
        h = tl.exp2(decay * elapsed[None, :]) * h + tl.load(local + place, mask=inside, other=0.0)
        tl.store(carried + place + STATES * channels, h, mask=inside)


@triton.jit
def scan_forward_kernel(
    u, delta, A, B, C, D, z, bias, initial, carried, starts, ends, documents, borders, y, final, kept,
    channels, u_row, delta_row, B_row, C_row, z_row,
    STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """y, the documents' final states, and if `kept` is given the state before every KEEP-th token of a document."""
    tile, segment = tl.program_id(0), tl.program_id(1)
    document = tl.load(documents + segment)
    if document < 0:
        return
    start, end = tl.load(starts + segment), tl.load(ends + segment)
    border = tl.load(borders + document)
    c, n = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    in_c, in_n = c < channels, n < STATES
    inside = in_n[:, None] & in_c[None, :]
    decay = _decay(A, c, n, inside, STATES)
    skip, shift = _load_channels(D, c, in_c), _load_channels(bias, c, in_c)
    h = tl.zeros((PADDED, BLOCK), tl.float32)
    by_document = (tl.cast(document, tl.int64) * channels + c[None, :]) * STATES + n[:, None]
    if initial is not None:
        h = tl.load(
            initial + by_document, mask=in_n[:, None] & (c < limit_if(start == border, channels))[None, :], other=0.0
        ).to(tl.float32)
    if carried is not None:
        place = _place(segment, c, n, channels, STATES)
        h += tl.load(carried + place, mask=in_n[:, None] & (c < limit_if(start > border, channels))[None, :], other=0.0)
    x, raw = (
        _load_row(u, u_row, start, c, limit_if(start < end, channels)),
        _load_row(delta, delta_row, start, c, limit_if(start < end, channels)),
    )
    b, r = (
        _load_row(B, B_row, start, n, limit_if(start < end, STATES)),
        _load_row(C, C_row, start, n, limit_if(start < end, STATES)),
    )
    row = tl.cast(border // KEEP + document + (start - border) // KEEP, tl.int64)
    for chunk in range(start, end, KEEP):
        if kept is not None:
            tl.store(kept + row * STATES * channels + n[:, None] * channels + c[None, :], h, mask=inside)
            row += 1
        for token in range(chunk, tl.minimum(chunk + KEEP, end)):
            step, driven, b_now, r_now = _time_step(raw, shift, SOFTPLUS), x, b, r
            # The next token's rows are asked for before this one's are used.
            more = token + 1 < end
            x = _load_row(u, u_row, token + 1, c, limit_if(more, channels))
            raw = _load_row(delta, delta_row, token + 1, c, limit_if(more, channels))
            b, r = (
                _load_row(B, B_row, token + 1, n, limit_if(more, STATES)),
                _load_row(C, C_row, token + 1, n, limit_if(more, STATES)),
            )
            h = tl.exp2(decay * step[None, :]) * h + b_now[:, None] * (step * driven)[None, :]
            out = tl.sum(h * r_now[:, None], 0) + skip * driven
            if z is not None:
                gate = _load_row(z, z_row, token, c, channels)
                out *= gate * sigmoid(gate)
            tl.store(y + tl.cast(token, tl.int64) * channels + c, out.to(y.dtype.element_ty), mask=in_c)
    if end == tl.load(borders + document + 1):
        tl.store(final + by_document, h, mask=inside)


@triton.jit
def scan_local_backward_kernel(
    grad_y, delta, A, C, z, bias, starts, ends, documents, borders, local, total_step,
    channels, grad_row, delta_row, C_row, z_row,
    STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before each segment that nothing follows, and the sum of its steps.

    Only where another segment of the same document comes before.
    """
    tile, segment = tl.program_id(0), tl.program_id(1)
    document = tl.load(documents + segment)
    if document < 0:
        return
    start, end = tl.load(starts + segment), tl.load(ends + segment)
    if start == tl.load(borders + document):
        return
    c, n = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    in_c, in_n = c < channels, n < STATES
    inside = in_n[:, None] & in_c[None, :]
    decay = _decay(A, c, n, inside, STATES)
    shift = _load_channels(bias, c, in_c)
    g = tl.zeros((PADDED, BLOCK), tl.float32)
    elapsed = tl.zeros((BLOCK,), tl.float32)
    for back in range(0, end - start):
        token = end - 1 - back
        step = _time_step(_load_row(delta, delta_row, token, c, channels), shift, SOFTPLUS)
        upstream = _load_row(grad_y, grad_row, token, c, channels)
        if z is not None:
            gate = _load_row(z, z_row, token, c, channels)
            upstream *= gate * sigmoid(gate)
        g += _load_row(C, C_row, token, n, STATES)[:, None] * upstream[None, :]
        g *= tl.exp2(decay * step[None, :])
        elapsed += step
    tl.store(total_step + tl.cast(segment, tl.int64) * channels + c, elapsed, mask=in_c)
    tl.store(local + _place(segment, c, n, channels, STATES), g, mask=inside)


@triton.jit
def scan_carry_backward_kernel(
    A, grad_final, first, local, total_step, carried, channels,
    STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after every segment of a document but its last, from the end to the beginning."""
    tile, document = tl.program_id(0), tl.program_id(1)
    begin, stop = tl.load(first + document), tl.load(first + document + 1)
    c, n = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    in_c = c < channels
    inside = (n < STATES)[:, None] & in_c[None, :]
    decay = _decay(A, c, n, inside, STATES)
    g = tl.zeros((PADDED, BLOCK), tl.float32)
    if grad_final is not None:
        place = (tl.cast(document, tl.int64) * channels + c[None, :]) * STATES + n[:, None]
        g = tl.load(grad_final + place, mask=inside, other=0.0).to(tl.float32)
    for back in range(0, stop - 1 - begin):
        segment = stop - 1 - back
        elapsed = tl.load(total_step + tl.cast(segment, tl.int64) * channels + c, mask=in_c, other=0.0)
        place = _place(segment, c, n, channels, STATES)
        g = tl.exp2(decay * elapsed[None, :]) * g + tl.load(local + place, mask=inside, other=0.0)
        tl.store(carried + place - STATES * channels, g, mask=inside)


@triton.jit
def scan_backward_kernel(
    grad_y, grad_final, u, delta, A, B, C, D, z, bias, carried, kept, starts, ends, documents, borders,
    grad_u, grad_delta, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_initial,
    tokens, channels, grad_row, u_row, delta_row, B_row, C_row, z_row,
    STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """All gradients of a segment and BLOCK channels.

    grad_B, grad_C: (tiles, T, N), each tile's own sum over its channels. grad_A (n, N, d_inner), grad_D, grad_bias
    (n, d_inner): each segment's own sum over its tokens. Added up afterwards in a fixed order, so that the same input
    gives the same bits.
    """
    tile, segment = tl.program_id(0), tl.program_id(1)
    document = tl.load(documents + segment)
    start, end = tl.load(starts + segment), tl.load(ends + segment)
    c, n = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    in_c, in_n = c < channels, n < STATES
    inside = in_n[:, None] & in_c[None, :]
    by_state = n[:, None] * channels + c[None, :]
    exponent = tl.load(A + c[None, :] * STATES + n[:, None], mask=inside, other=0.0).to(tl.float32)
    skip, shift = _load_channels(D, c, in_c), _load_channels(bias, c, in_c)
    border, stop = tl.load(borders + tl.maximum(document, 0)), tl.load(borders + tl.maximum(document, 0) + 1)
    by_document = (tl.cast(document, tl.int64) * channels + c[None, :]) * STATES + n[:, None]
    g = tl.zeros((PADDED, BLOCK), tl.float32)
    if grad_final is not None:
        g = tl.load(
            grad_final + by_document,
            mask=in_n[:, None] & (c < limit_if((document >= 0) & (end == stop), channels))[None, :],
            other=0.0,
        ).to(tl.float32)
    if carried is not None:
        place = tl.cast(segment, tl.int64) * STATES * channels + by_state
        g += tl.load(
            carried + place,
            mask=in_n[:, None] & (c < limit_if((document >= 0) & (end < stop), channels))[None, :],
            other=0.0,
        )
    sum_A = tl.zeros((PADDED, BLOCK), tl.float32)
    sum_D, sum_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    groups = (end - start + GROUP - 1) // GROUP
    for back in range(0, groups):
        group = start + (groups - 1 - back) * GROUP
        # From the state that was kept, forward to the beginning of the group.
        chunk = group - (group - border) % KEEP
        row = tl.cast(border // KEEP + document + (chunk - border) // KEEP, tl.int64)
        h = tl.load(kept + row * STATES * channels + by_state, mask=inside, other=0.0)
        for token in range(chunk, group):
            step = _time_step(_load_row(delta, delta_row, token, c, channels), shift, SOFTPLUS)
            drive = step * _load_row(u, u_row, token, c, channels)
            h = (
                tl.exp2(exponent * step[None, :] * LOG2E) * h
                + _load_row(B, B_row, token, n, STATES)[:, None] * drive[None, :]
            )
        # Forward through the group; a token beyond the segment's end has step zero and changes nothing.
        before = ()
        for j in tl.static_range(GROUP):
            here = group + j < end
            step = _time_step(_load_row(delta, delta_row, group + j, c, limit_if(here, channels)), shift, SOFTPLUS)
            drive = tl.where(here, step * _load_row(u, u_row, group + j, c, limit_if(here, channels)), 0.0)
            before = before + (h,)  # noqa: RUF005 - Triton knows no unpacking
            step = tl.where(here, step, 0.0)
            b = _load_row(B, B_row, group + j, n, limit_if(here, STATES))
            h = tl.exp2(exponent * step[None, :] * LOG2E) * h + b[:, None] * drive[None, :]
        # And backward.
        for k in tl.static_range(GROUP):
            token = group + (GROUP - 1 - k)
            here = token < end
            in_here, n_here = c < limit_if(here, channels), n < limit_if(here, STATES)
            raw = _load_row(delta, delta_row, token, c, limit_if(here, channels)) + shift
            step = tl.where(here, softplus(raw) if SOFTPLUS else raw, 0.0)
            x = _load_row(u, u_row, token, c, limit_if(here, channels))
            b, r = (
                _load_row(B, B_row, token, n, limit_if(here, STATES)),
                _load_row(C, C_row, token, n, limit_if(here, STATES)),
            )
            upstream = tl.zeros((BLOCK,), tl.float32)
            if grad_y is not None:
                upstream = _load_row(grad_y, grad_row, token, c, limit_if(here, channels))
            by_token = tl.cast(token, tl.int64) * channels + c
            if z is not None:
                gate = _load_row(z, z_row, token, c, limit_if(here, channels))
                s = sigmoid(gate)
                slope = upstream * silu_slope(gate, s)
                tl.store(
                    grad_z + by_token,
                    (slope * (tl.sum(h * r[:, None], 0) + skip * x)).to(grad_z.dtype.element_ty),
                    mask=in_here,
                )
                upstream *= gate * s
            g += r[:, None] * upstream[None, :]
            by_map = (tl.cast(tile, tl.int64) * tokens + token) * STATES + n
            tl.store(grad_C + by_map, tl.sum(h * upstream[None, :], 1), mask=n_here)
            tl.store(grad_B + by_map, tl.sum(g * (step * x)[None, :], 1), mask=n_here)
            grad_drive = tl.sum(g * b[:, None], 0)
            g *= tl.exp2(exponent * step[None, :] * LOG2E)
            h = before[GROUP - 1 - k]
            grad_exponent = g * h
            sum_A += grad_exponent * step[None, :]
            grad_step = tl.sum(grad_exponent * exponent, 0) + grad_drive * x
            grad_raw = grad_step * softplus_slope(raw) if SOFTPLUS else grad_step
            sum_bias += tl.where(here, grad_raw, 0.0)
            sum_D += upstream * x
            tl.store(grad_delta + by_token, grad_raw.to(grad_delta.dtype.element_ty), mask=in_here)
            tl.store(grad_u + by_token, (grad_drive * step + skip * upstream).to(grad_u.dtype.element_ty), mask=in_here)
    tl.store(grad_A + tl.cast(segment, tl.int64) * STATES * channels + by_state, sum_A, mask=inside)
    place = tl.cast(segment, tl.int64) * channels + c
    if grad_D is not None:
        tl.store(grad_D + place, sum_D, mask=in_c)
    if grad_bias is not None:
        tl.store(grad_bias + place, sum_bias, mask=in_c)
    if grad_initial is not None:
        tl.store(
            grad_initial + by_document,
            g,
            mask=in_n[:, None] & (c < limit_if((document >= 0) & (start == border), channels))[None, :],
        )


@triton.jit
def scan_step_kernel(
    state, u, delta, A, B, C, D, z, bias, slots, y, channels, u_row, delta_row, B_row, C_row, z_row,
    STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One token of one sequence: the state in its slot moves on, y comes out."""
    tile, row = tl.program_id(0), tl.program_id(1)
    slot = tl.cast(row, tl.int64)
    if slots is not None:
        slot = tl.load(slots + row)
    c, n = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    in_c = c < channels
    inside = in_c[:, None] & (n < STATES)[None, :]
    place = (slot * channels + c[:, None]) * STATES + n[None, :]
    h = tl.load(state + place, mask=inside, other=0.0)
    decay = tl.load(A + c[:, None] * STATES + n[None, :], mask=inside, other=0.0).to(tl.float32) * LOG2E
    x = _load_row(u, u_row, row, c, channels)
    step = _time_step(_load_row(delta, delta_row, row, c, channels), _load_channels(bias, c, in_c), SOFTPLUS)
    b, r = _load_row(B, B_row, row, n, STATES), _load_row(C, C_row, row, n, STATES)
    h = tl.exp2(decay * step[:, None]) * h + b[None, :] * (step * x)[:, None]
    out = tl.sum(h * r[None, :], 1) + _load_channels(D, c, in_c) * x
    if z is not None:
        gate = _load_row(z, z_row, row, c, channels)
        out *= gate * sigmoid(gate)
    tl.store(state + place, h, mask=inside)
    tl.store(y + tl.cast(row, tl.int64) * channels + c, out.to(y.dtype.element_ty), mask=in_c)
