"""A decoding step by Triton kernels and torch's products. It never asks the host, so a CUDA graph can hold it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.segments import power_of_two
from ...triton.launch import launch
from ..add_layer_norm.triton import add_layer_norm_triton
from ..causal_conv1d.step import causal_conv1d_step_triton
from ..differential_attention.triton import LOG2E
from ..selective_scan.inputs import ScanInputs
from ..selective_scan.step import selective_scan_step_triton
from ..swiglu.triton import swiglu_triton
from .slots import Attended, Slots
from .weights import AttentionWeights, DecoderWeights, MambaWeights, MemoryUnitWeights

CHUNK = 256  # keys of a program: at 2,048 keys one sequence fills an H100's multiprocessors
BLOCK = 64  # keys at once
SUBLN_EPS = 1e-5


def decoder_step_triton(weights: DecoderWeights, slots: Slots, tokens: Tensor, rows: Tensor) -> Tensor:
    """Arguments and result as in `DecoderStep`."""
    run = _Run(weights, slots, rows)
    hidden, delta = F.embedding(tokens, weights.embed).float(), None
    for layer in weights.layers:
        hidden, x = run.norm(hidden, delta, layer.norm_weight, layer.norm_bias)
        hidden, x = run.norm(hidden, run.mix(layer.mixer, x), layer.mlp_norm_weight, layer.mlp_norm_bias)
        gate, value = F.linear(x, layer.fc1).chunk(2, dim=-1)
        delta = F.linear(swiglu_triton(gate, value), layer.fc2)
    _, x = run.norm(hidden, delta, weights.norm_weight, weights.norm_bias)
    slots.lengths.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
    return F.linear(x, weights.head)


class _Run:
    """One step: where its sequences are, and what layers hand to each other."""

    def __init__(self, weights: DecoderWeights, slots: Slots, rows: Tensor) -> None:
        self.weights, self.slots, self.rows = weights, slots, rows
        self.mambas = self.windows = self.full = 0
        self.memory: Tensor | None = None

    def norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The stream with what the last branch adds, and its LayerNorm in the type of the products."""
        total, normed, _ = add_layer_norm_triton(
            hidden, delta, weight, bias, self.weights.eps, self.weights.embed.dtype
        )
        return hidden if total is None else total, normed

    def mix(self, mixer: MambaWeights | MemoryUnitWeights | AttentionWeights, x: Tensor) -> Tensor:
        """(R, hidden) -> (R, hidden)."""
        if isinstance(mixer, MambaWeights):
            return self._mamba(mixer, x)
        if isinstance(mixer, MemoryUnitWeights):
            assert self.memory is not None
            return F.linear(swiglu_triton(F.linear(x, mixer.in_proj), self.memory), mixer.out_proj)
        return self._attention(mixer, x)

    def _mamba(self, mixer: MambaWeights, x: Tensor) -> Tensor:
        conv, scan = self.slots.conv[self.mambas], self.slots.scan[self.mambas]
        self.mambas += 1
        inner, gate = F.linear(x, mixer.in_proj).chunk(2, dim=-1)
        inner = causal_conv1d_step_triton(conv, inner, mixer.conv_weight, mixer.conv_bias, "silu", self.rows)
        rank, states = mixer.dt_proj.shape[1], mixer.A.shape[1]
        delta, b, c = F.linear(inner, mixer.x_proj).split([rank, states, states], dim=-1)
        inputs = ScanInputs(inner, F.linear(delta, mixer.dt_proj), mixer.A, b, c, mixer.D, None, mixer.dt_bias, True)
        self.memory = selective_scan_step_triton(scan, inputs, self.rows)
        return F.linear(swiglu_triton(gate, self.memory), mixer.out_proj)

    def _attention(self, mixer: AttentionWeights, x: Tensor) -> Tensor:
        w, slots = self.weights, self.slots
        widths = [w.heads * w.head_dim] + [w.key_heads * w.head_dim] * (2 if mixer.own_keys else 0)
        q, *new = F.linear(x, mixer.qkv, mixer.qkv_bias).split(widths, dim=-1)
        if mixer.window is not None:
            keys, values = slots.ring_keys[self.windows], slots.ring_values[self.windows]
            self.windows += 1
        else:
            self.full += bool(new)
            keys, values = slots.page_keys[self.full - 1], slots.page_values[self.full - 1]
        held = Attended(keys, values, self.rows, slots.lengths, slots.table, mixer.window or 0)
        if new:
            append(new[0], new[1], held)
        out = attend(q, held, w.heads, mixer.lambda_full, mixer.subln, mixer.lambda_init)
        return F.linear(out, mixer.out_proj, mixer.out_bias)


def append(k: Tensor, v: Tensor, held: Attended) -> None:
    """Put each sequence's new keys and values (R, key heads * head_dim) behind its last ones."""
    from .triton_kernels import append_kernel

    _, heads, page, d = held.keys.shape
    launch(
        append_kernel, (k.shape[0],), k, v, *held[:-1], k.stride(0), held.table.stride(0), HEADS=heads, D=d,
        PADDED=power_of_two(heads * d), PAGE=page, WINDOW=held.window,
    )  # fmt: skip


def attend(q: Tensor, held: Attended, heads: int, lambda_full: Tensor, subln: Tensor, lambda_init: float) -> Tensor:
    """Differential attention of each sequence's new queries (R, heads * head_dim) to its keys; the same shape."""
    from .triton_kernels import attend_kernel, merge_chunks_kernel

    (_, key_heads, page, d), count, window = held.keys.shape, q.shape[0], held.window
    chunks, group = -(-(window or held.table.shape[1] * page) // CHUNK), heads // key_heads
    sums = torch.empty(count, chunks, heads, 2 * d, dtype=torch.float32, device=q.device)
    norms = torch.empty(count, chunks, heads, 2, dtype=torch.float32, device=q.device)
    launch(
        attend_kernel, (count, key_heads // 2, chunks), q, *held[:-1], sums, norms, q.stride(0), held.table.stride(0),
        d**-0.5 * LOG2E, KEY_HEADS=key_heads, GROUP=group, D=d, PAD_V=max(16, power_of_two(2 * d)), PAGE=page,
        WINDOW=window, QUERIES=max(16, power_of_two(2 * group)), CHUNK=CHUNK, BLOCK=BLOCK,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    out = q.new_empty(count, heads * d)
    launch(
        merge_chunks_kernel, (count, heads // 2), sums, norms, held.rows, held.lengths, lambda_full, subln, out,
        chunks, 1.0 - lambda_init, SUBLN_EPS, HEADS=heads, WIDTH=2 * d, PAD_V=power_of_two(2 * d), WINDOW=window,
        CHUNK=CHUNK, CHUNKS=16, PAD_C=power_of_two(chunks),
    )  # fmt: skip
    return out
