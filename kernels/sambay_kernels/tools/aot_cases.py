"""The calls whose kernels are compiled ahead of time: those of the published model, on tensors without data."""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS, DOCUMENTS = 32768, 8
HIDDEN, INNER, STATES, STEP_RANK = 2560, 5120, 16, 160
HEADS, KEY_HEADS, WIDTH, WINDOW = 40, 20, 64, 512


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _cu_seqlens() -> Tensor:
    return _tensor(DOCUMENTS + 1, dtype=torch.int32)


def _scan() -> None:
    from ..ops.selective_scan.inputs import ScanInputs
    from ..ops.selective_scan.triton import TRITON_KEPT_EVERY, selective_scan_triton, selective_scan_triton_backward

    u, delta, z = (_tensor(TOKENS, INNER) for _ in range(3))
    projected = _tensor(TOKENS, STEP_RANK + 2 * STATES)  # as x_proj makes them: views of one matrix
    B, C = projected[:, STEP_RANK : STEP_RANK + STATES], projected[:, STEP_RANK + STATES :]
    A, D, bias = (_tensor(*shape, dtype=torch.float32) for shape in ((INNER, STATES), (INNER,), (INNER,)))
    inputs = ScanInputs(u, delta, A, B, C, D, z, bias, True, _cu_seqlens())
    shape = (TOKENS // TRITON_KEPT_EVERY + DOCUMENTS, STATES, INNER)
    _, _, kept = selective_scan_triton(inputs, shape)
    selective_scan_triton_backward(_tensor(TOKENS, INNER), None, inputs, kept)


def _conv() -> None:
    from ..ops.causal_conv1d.inputs import ConvInputs
    from ..ops.causal_conv1d.triton import causal_conv1d_triton, causal_conv1d_triton_backward

    x = _tensor(TOKENS, 2 * INNER)[:, :INNER]  # as in_proj makes it: half of a matrix
    weight, bias = _tensor(INNER, 4, dtype=torch.float32), _tensor(INNER, dtype=torch.float32)
    inputs = ConvInputs(x, weight, bias, "silu", _cu_seqlens())
    causal_conv1d_triton(inputs)
    causal_conv1d_triton_backward(_tensor(TOKENS, INNER), None, inputs)


def _swiglu() -> None:
    from ..ops.swiglu.triton import swiglu_triton, swiglu_triton_backward

    fused, gradient = _tensor(TOKENS, 2 * INNER), _tensor(TOKENS, 2 * INNER)  # as fc1 makes it
    swiglu_triton(*fused.chunk(2, 1))
    swiglu_triton_backward(_tensor(TOKENS, INNER), *fused.chunk(2, 1), *gradient.chunk(2, 1))


def _norm(dtype: torch.dtype) -> None:
    from ..ops.add_layer_norm.triton import add_layer_norm_triton, add_layer_norm_triton_backward

    hidden, delta = _tensor(TOKENS, HIDDEN, dtype=torch.float32), _tensor(TOKENS, HIDDEN, dtype=dtype)
    weight, bias = (_tensor(HIDDEN, dtype=torch.float32) for _ in range(2))
    total, normed, stats = add_layer_norm_triton(hidden, delta, weight, bias, 1e-5, dtype)
    assert total is not None
    add_layer_norm_triton_backward(normed, total, total, stats, weight, hidden.dtype, dtype, True)


def _attention(dtype: torch.dtype) -> None:
    from ..ops.differential_attention import triton as backend
    from ..ops.differential_attention.inputs import DiffInputs

    fused = _tensor(TOKENS, (HEADS + 2 * KEY_HEADS) * WIDTH, dtype=dtype)  # as Wqkv makes it
    q, k, v = (x.unflatten(1, (-1, WIDTH)) for x in fused.split([HEADS * WIDTH, *[KEY_HEADS * WIDTH] * 2], 1))
    borders, scale = _cu_seqlens(), WIDTH**-0.5
    inputs = DiffInputs(q, k, v, borders, borders, WINDOW, scale)
    maps, lse = backend.diff_maps_triton(inputs)
    backend.diff_maps_triton_backward(_tensor(*maps.shape, dtype=dtype), inputs, maps, lse)
    small = (_tensor(dtype=torch.float32), _tensor(2 * WIDTH, dtype=torch.float32), 0.5, 1e-5)
    out = backend.diff_combine_triton(maps, *small)
    backend.diff_combine_triton_backward(_tensor(*out.shape, dtype=dtype), maps, *small)


def _loss() -> None:
    from ..ops.linear_cross_entropy.triton import give_named, gradient_of_block, take_block, take_named

    tokens, block = 6250, 8192
    logits, targets = _tensor(tokens, block, dtype=torch.float32), _tensor(tokens, dtype=torch.int64)
    running = [_tensor(tokens, dtype=torch.float32) for _ in range(5)]
    ids, named = _tensor(tokens, 64, dtype=torch.int64), _tensor(tokens, 64, dtype=torch.float32)
    take_named(logits, ids, named, 2 * block)
    take_block(logits, targets, tuple(running), 2 * block, 0.1, with_moment=True)
    terms = _tensor(5, tokens, dtype=torch.float32)
    out = _tensor(tokens, block)
    gradient_of_block(logits, targets, terms, 2 * block, out)
    give_named(out, ids, named, targets, terms, 2 * block)


def _steps() -> None:
    from ..ops.causal_conv1d.step import causal_conv1d_step_triton
    from ..ops.selective_scan.inputs import ScanInputs
    from ..ops.selective_scan.step import selective_scan_step_triton

    sequences, slots = 32, _tensor(32, dtype=torch.int64)
    u, delta, z = (_tensor(sequences, INNER) for _ in range(3))
    B, C = (_tensor(sequences, STATES) for _ in range(2))
    A, D, bias = (_tensor(*shape, dtype=torch.float32) for shape in ((INNER, STATES), (INNER,), (INNER,)))
    state = _tensor(64, INNER, STATES, dtype=torch.float32)
    selective_scan_step_triton(state, ScanInputs(u, delta, A, B, C, D, z, bias), slots)
    causal_conv1d_step_triton(_tensor(64, INNER, 3), u, _tensor(INNER, 4), D, "silu", slots)


def _decoding() -> None:
    from ..ops.choose_token.inputs import Choice
    from ..ops.choose_token.triton import choose_token_triton
    from ..ops.decoder_step import triton as backend
    from ..ops.decoder_step.slots import Attended

    sequences, longest, page = 16, 32768, 64
    keys, values = (_tensor(sequences * longest // page, KEY_HEADS, page, WIDTH) for _ in range(2))
    table, lengths = _tensor(64, longest // page, dtype=torch.int32), _tensor(64, dtype=torch.int32)
    held = Attended(keys, values, _tensor(sequences, dtype=torch.int64), lengths, table, 0)
    fused = _tensor(sequences, (HEADS + 2 * KEY_HEADS) * WIDTH)
    q, k, v = fused.split([HEADS * WIDTH, *[KEY_HEADS * WIDTH] * 2], 1)
    backend.append(k, v, held)
    backend.attend(q, held, HEADS, _tensor(), _tensor(2 * WIDTH), 0.5)
    numbers = [_tensor(sequences, dtype=torch.float32) for _ in range(4)]
    top_k = _tensor(sequences, dtype=torch.int32)
    choose_token_triton(_tensor(sequences, 200064), Choice(numbers[0], top_k, *numbers[1:]))


def run_cases() -> None:
    """Make every call once; to be recorded (triton.launch.recording), for there is nothing to compute."""
    _scan()
    _conv()
    _swiglu()
    _norm(torch.bfloat16)
    _norm(torch.float32)
    _attention(torch.bfloat16)
    _attention(torch.float32)
    _loss()
    _steps()
    _decoding()
