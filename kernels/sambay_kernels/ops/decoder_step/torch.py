"""A decoding step in torch: the definition, in whatever type the weights have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..add_layer_norm.reference import add_layer_norm_reference
from ..swiglu.torch import swiglu_torch
from .slots import Slots
from .weights import AttentionWeights, DecoderWeights, MambaWeights, MemoryUnitWeights


def decoder_step_torch(
    weights: DecoderWeights, slots: Slots, tokens: Tensor, rows: Tensor, wanted: Tensor | None = None
) -> Tensor:
    """Arguments and result as in `DecoderStep`: the first tokens of all runs, then the second ones, and so on."""
    slots_of_runs, counts = torch.unique_consecutive(rows, return_counts=True)
    if len(slots_of_runs) != len(slots_of_runs.unique()):
        raise ValueError("decoder_step: a slot is named twice: its tokens must follow each other")
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    logits = weights.embed.new_empty(len(rows), weights.embed.shape[0])
    for index in range(int(counts.max()) if len(rows) else 0):
        now = place == index
        logits[now] = _step(weights, slots, tokens[now], rows[now])
    return logits if wanted is None else logits[wanted]


def _step(weights: DecoderWeights, slots: Slots, tokens: Tensor, rows: Tensor) -> Tensor:
    """One token of each sequence."""
    run = _Run(weights, slots, rows)
    product = weights.embed.dtype
    wide = torch.promote_types(product, torch.float32)
    hidden = weights.embed[tokens].to(wide)
    for layer in weights.layers:
        mixed = run.mix(layer.mixer, run.norm(hidden, layer.norm_weight, layer.norm_bias))
        hidden = hidden + mixed.to(wide)
        gate, value = F.linear(run.norm(hidden, layer.mlp_norm_weight, layer.mlp_norm_bias), layer.fc1).chunk(2, -1)
        hidden = hidden + F.linear(swiglu_torch(gate, value), layer.fc2).to(wide)
    slots.lengths[rows] += 1
    return F.linear(run.norm(hidden, weights.norm_weight, weights.norm_bias), weights.head)


class _Run:
    """One step: where its sequences are, and what layers hand to each other."""

    def __init__(self, weights: DecoderWeights, slots: Slots, rows: Tensor) -> None:
        self.weights, self.slots, self.rows = weights, slots, rows.long()
        self.before = slots.lengths[self.rows].long()
        self.mambas = self.windows = self.full = 0
        self.memory: Tensor | None = None

    def norm(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """LayerNorm of the stream, in the type of the products."""
        return add_layer_norm_reference(hidden, None, weight, bias, self.weights.eps, self.weights.embed.dtype)[1]

    def mix(self, mixer: MambaWeights | MemoryUnitWeights | AttentionWeights, x: Tensor) -> Tensor:
        """(R, hidden) -> (R, hidden)."""
        if isinstance(mixer, MambaWeights):
            return self._mamba(mixer, x)
        if isinstance(mixer, MemoryUnitWeights):
            assert self.memory is not None
            return F.linear(swiglu_torch(F.linear(x, mixer.in_proj), self.memory), mixer.out_proj)
        return self._attention(mixer, x)

    def _mamba(self, mixer: MambaWeights, x: Tensor) -> Tensor:
        conv, scan = self.slots.conv[self.mambas], self.slots.scan[self.mambas]
        self.mambas += 1
        product, wide = x.dtype, mixer.A.dtype
        inner, gate = F.linear(x, mixer.in_proj).chunk(2, dim=-1)
        seen = torch.cat([conv[self.rows], inner[..., None]], dim=-1).to(wide)
        conv[self.rows] = seen[..., 1:].to(conv.dtype)
        inner = F.silu((seen * mixer.conv_weight.to(wide)).sum(-1) + mixer.conv_bias.to(wide)).to(product)
        rank, states = mixer.dt_proj.shape[1], mixer.A.shape[1]
        delta, b, c = F.linear(inner, mixer.x_proj).split([rank, states, states], dim=-1)
        step = F.softplus(F.linear(delta, mixer.dt_proj).to(wide) + mixer.dt_bias.to(wide))
        u = inner.to(wide)
        state = scan[self.rows] * torch.exp(step[..., None] * mixer.A) + (step * u)[..., None] * b.to(wide)[:, None]
        scan[self.rows] = state
        self.memory = ((state * c.to(wide)[:, None]).sum(-1) + mixer.D.to(wide) * u).to(product)
        return F.linear(swiglu_torch(gate, self.memory), mixer.out_proj)

    def _attention(self, mixer: AttentionWeights, x: Tensor) -> Tensor:
        w = self.weights
        widths = [w.heads * w.head_dim] + [w.key_heads * w.head_dim] * (2 if mixer.own_keys else 0)
        q, *new = (
            part.unflatten(-1, (-1, w.head_dim))
            for part in F.linear(x, mixer.qkv, mixer.qkv_bias.to(x.dtype)).split(widths, dim=-1)
        )
        if mixer.window is not None:
            keys, values, count = self._in_ring(mixer.window, *new)
        else:
            keys, values, count = self._in_pages(*new)
        attended = self._maps(q, keys, values, count)
        first, second = attended.unflatten(1, (-1, 2)).unbind(2)
        lam = mixer.lambda_full.to(attended.dtype)
        mixed = (first - lam * second).to(attended.dtype)
        scale = torch.rsqrt(mixed.square().mean(-1, keepdim=True) + 1e-5)
        mixed = mixed * scale * mixer.subln.to(mixed.dtype) * (1.0 - mixer.lambda_init)
        return F.linear(mixed.to(x.dtype).flatten(1), mixer.out_proj, mixer.out_bias.to(x.dtype))

    def _in_ring(self, window: int, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put a token into the rings; all of them (R, key heads, window, head_dim), and how many places are filled."""
        keys, values = self.slots.ring_keys[self.windows], self.slots.ring_values[self.windows]
        self.windows += 1
        place = self.before % window
        keys[self.rows, :, place], values[self.rows, :, place] = new_keys, new_values
        return keys[self.rows], values[self.rows], (self.before + 1).clamp(max=window)

    def _in_pages(self, *new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put a token, if there is one, into the pages; all of them in the tokens' order, and how many."""
        if new:
            self.full += 1
        keys, values = self.slots.page_keys[self.full - 1], self.slots.page_values[self.full - 1]
        table, size = self.slots.table[self.rows].long(), self.slots.page_size
        if new:
            page = table.gather(1, self.before[:, None] // size)[:, 0]
            keys[page, :, self.before % size], values[page, :, self.before % size] = new
        used = table[:, : int(self.before.max()) // size + 1]
        gathered = [x[used].transpose(1, 2).flatten(2, 3) for x in (keys, values)]
        return gathered[0], gathered[1], self.before + 1

    def _maps(self, q: Tensor, keys: Tensor, values: Tensor, count: Tensor) -> Tensor:
        """The maps of every head over the values of its pair: (R, heads, 2 * head_dim), in the type of sums."""
        wide = torch.promote_types(q.dtype, torch.float32)
        q, keys, values = q.to(wide), keys.to(wide), values.to(wide)
        group, pairs = self.weights.heads // self.weights.key_heads, self.weights.key_heads // 2
        # Head 2j + s attends with key head 2p + s, where p = j // group.
        q = q.unflatten(1, (pairs, group, 2)).transpose(2, 3)  # (R, pairs, 2, group, d)
        keys = keys.unflatten(1, (pairs, 2))  # (R, pairs, 2, T, d)
        values = torch.cat(values.unflatten(1, (pairs, 2)).unbind(2), dim=-1)  # (R, pairs, T, 2d)
        scores = q @ keys.transpose(-1, -2) / self.weights.head_dim**0.5
        hidden = torch.arange(keys.shape[-2], device=q.device) >= count[:, None]
        scores = scores.masked_fill(hidden[:, None, None, None], float("-inf"))
        maps = scores.softmax(-1) @ values[:, :, None]  # (R, pairs, 2, group, 2d)
        return maps.transpose(2, 3).flatten(1, 3)
