"""SambaY written down once more, as plainly as possible, in float64: the oracle that the model is held against.

One document at a time, one time step at a time, attention as whole softmax matrices. It shares no code with the model:
it reads a state dict by the published names and follows the published equations (arXiv 2507.06607, 2312.00752,
2410.05258).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight + bias


def mamba(u: Tensor, w: Weights, prefix: str, rank: int, state: int) -> tuple[Tensor, Tensor]:
    """Output and memory of one Mamba layer for one document, `(T, hidden)` -> `(T, hidden)`, `(T, inner)`."""
    x, z = (u @ w[prefix + "in_proj.weight"].T).chunk(2, -1)
    kernel, bias = w[prefix + "conv1d.weight"][:, 0], w[prefix + "conv1d.bias"]
    width = kernel.shape[1]
    padded = torch.cat([x.new_zeros(width - 1, x.shape[1]), x])
    x = silu(torch.stack([(padded[t : t + width].T * kernel).sum(1) + bias for t in range(u.shape[0])]))
    dt, b, c = (x @ w[prefix + "x_proj.weight"].T).split([rank, state, state], -1)
    delta = dt @ w[prefix + "dt_proj.weight"].T + w[prefix + "dt_proj.bias"]
    delta = torch.log1p(torch.exp(delta))
    a = -torch.exp(w[prefix + "A_log"])
    h = x.new_zeros(x.shape[1], state)
    ys = []
    for t in range(u.shape[0]):
        h = torch.exp(delta[t][:, None] * a) * h + delta[t][:, None] * b[t][None] * x[t][:, None]
        ys.append(h @ c[t] + w[prefix + "D"] * x[t])
    memory = torch.stack(ys)
    return (memory * silu(z)) @ w[prefix + "out_proj.weight"].T, memory


def attention(
    u: Tensor, w: Weights, prefix: str, layer: int, heads: int, kv: tuple[Tensor, Tensor] | int, window: int | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Differential attention of one document. `kv`: the shared (keys, values), or how many key heads to project."""
    length, hidden = u.shape
    d = hidden // heads
    projected = u @ w[prefix + "Wqkv.weight"].T + w[prefix + "Wqkv.bias"]
    q = projected[:, :hidden].reshape(length, heads, d)
    if isinstance(kv, int):
        k = projected[:, hidden : hidden + kv * d].reshape(length, kv, d)
        v = projected[:, hidden + kv * d :].reshape(length, kv, d)
    else:
        k, v = kv
    group = heads // k.shape[1]
    t = torch.arange(length)
    seen = t[:, None] >= t[None]
    if window is not None:
        seen &= t[:, None] - t[None] < window
    inner = prefix + "inner_cross_attn."
    init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    lam = (
        torch.exp((w[inner + "lambda_q1"] * w[inner + "lambda_k1"]).sum())
        - torch.exp((w[inner + "lambda_q2"] * w[inner + "lambda_k2"]).sum())
        + init
    )
    out = u.new_zeros(length, heads, d)
    for j in range(heads // 2):
        stripe = j // group
        value = torch.cat([v[:, 2 * stripe], v[:, 2 * stripe + 1]], -1)
        maps = []
        for s in (0, 1):
            scores = q[:, 2 * j + s] @ k[:, 2 * stripe + s].T / math.sqrt(d)
            maps.append(torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ value)
        o = maps[0] - lam * maps[1]
        o = o / torch.sqrt((o**2).mean(-1, keepdim=True) + 1e-5) * w[inner + "subln.weight"] * (1 - init)
        out[:, 2 * j], out[:, 2 * j + 1] = o[:, :d], o[:, d:]
    return out.reshape(length, hidden) @ w[prefix + "out_proj.weight"].T + w[prefix + "out_proj.bias"], (k, v)


def document_hidden(config, w: Weights, ids: Tensor) -> Tensor:
    """Final hidden states `(T, hidden)` of one document."""
    h = w["model.embed_tokens.weight"][ids]
    layers = config.num_hidden_layers
    memory = shared = None
    for i in range(layers):
        p = f"model.layers.{i}."
        u = layer_norm(h, w[p + "input_layernorm.weight"], w[p + "input_layernorm.bias"], config.layer_norm_eps)
        if i % 2 == 0 and i <= layers // 2:
            a, memory = mamba(u, w, p + "attn.", config.mamba_dt_rank, config.mamba_d_state)
        elif i % 2 == 0:
            a = (silu(u @ w[p + "attn.in_proj.weight"].T) * memory) @ w[p + "attn.out_proj.weight"].T
        else:
            own = i <= layers // 2 + 1
            window = config.sliding_window if i < layers // 2 else None
            kv = config.num_key_value_heads if own else shared
            a, made = attention(u, w, p + "attn.", i, config.num_attention_heads, kv, window)
            shared = made if own else shared
        h = h + a
        u = layer_norm(
            h, w[p + "post_attention_layernorm.weight"], w[p + "post_attention_layernorm.bias"], config.layer_norm_eps
        )
        gate, value = (u @ w[p + "mlp.fc1.weight"].T).chunk(2, -1)
        h = h + (silu(gate) * value) @ w[p + "mlp.fc2.weight"].T
    return layer_norm(h, w["model.final_layernorm.weight"], w["model.final_layernorm.bias"], config.layer_norm_eps)


def document_logits(config, w: Weights, ids: Tensor) -> Tensor:
    """Logits `(T, vocab)` of one document."""
    return document_hidden(config, w, ids) @ w["model.embed_tokens.weight"].T


def documents_loss(config, w: Weights, documents: list[Tensor], labels: list[Tensor]) -> Tensor:
    """Mean cross entropy over the supervised tokens of all documents, each run alone."""
    total, count = 0.0, 0
    for ids, wanted in zip(documents, labels, strict=True):
        log_probabilities = torch.log_softmax(document_logits(config, w, ids)[:-1], -1)
        for t, label in enumerate(wanted[1:].tolist()):
            if label != -100:
                total = total - log_probabilities[t, label]
                count += 1
    return total / count


def float64_weights(model) -> Weights:
    """The model's parameters by published name, in float64, as leaves that take gradients."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
