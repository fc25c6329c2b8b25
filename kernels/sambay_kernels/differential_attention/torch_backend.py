"""Plain-torch differential attention for packed documents (flat: imports torch alone, so it can travel with a checkpoint)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def diff_stack_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn striped heads into ordinary attention heads of width 2d.

    Stripe a of query pair j is head 2j+a and attends stripe a of its key pair; both stripes read both value stripes.
    Stacking the stripes (all even heads, then all odd ones) makes the key head of query head h simply h // group. Queries
    and keys are padded with zeros to the width of the values: one softmax serves both value halves, and the score GEMM
    costs what two calls of width d would.

    Args:
        q: (T, Hq, d); k, v: (Tk, Hkv, d).

    Returns:
        q (T, Hq, 2d), k (Tk, Hkv, 2d), v (Tk, Hkv, 2d), heads stripe-major.
    """
    d = q.shape[-1]
    q = torch.cat((q[:, 0::2], q[:, 1::2]), dim=1)
    k = torch.cat((k[:, 0::2], k[:, 1::2]), dim=1)
    v = v.reshape(v.shape[0], v.shape[1] // 2, 2 * d)
    return F.pad(q, (0, d)), F.pad(k, (0, d)), torch.cat((v, v), dim=1)


def diff_combine(maps: Tensor, lambda_full: Tensor, subln_weight: Tensor, lambda_init: float, eps: float) -> Tensor:
    """Subtract the two maps, normalise each pair of heads over its 2d outputs and scale: (..., Hq, 2d) -> (..., Hq*d)."""
    first, second = maps.chunk(2, dim=-2)
    wide = torch.promote_types(maps.dtype, torch.float32)
    out = first.to(wide) - lambda_full.to(wide) * second.to(wide)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps) * (subln_weight.to(wide) * (1.0 - lambda_init))
    return out.to(maps.dtype).flatten(-2)


def diff_attend_document(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Causal attention of one document, bottom-right aligned: q (Hq, n, D), k, v (Hkv, m, D), n <= m -> (Hq, n, D)."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    n, m = q.shape[1], k.shape[1]
    if n == m and (window is None or window >= m):
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0]
    blocks = []
    size = 128 if window is None else max(128, window)
    for start in range(0, n, size):
        stop = min(start + size, n)
        high = m - n + stop
        low = 0 if window is None else max(0, m - n + start - window + 1)
        rows = torch.arange(m - n + start, high, device=q.device)[:, None]
        columns = torch.arange(low, high, device=q.device)[None, :]
        mask = columns <= rows
        if window is not None:
            mask &= columns > rows - window
        blocks.append(
            F.scaled_dot_product_attention(
                q[None, :, start:stop], k[None, :, low:high], v[None, :, low:high], attn_mask=mask, scale=scale
            )[0]
        )
    return torch.cat(blocks, dim=1)


def diff_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_full: Tensor,
    subln_weight: Tensor,
    lambda_init: float,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int | None,
    scale: float,
    eps: float,
) -> Tensor:
    """Differential attention of packed documents; see :func:`sambay_kernels.differential_attention`."""
    q, k, v = (x.transpose(0, 1) for x in diff_stack_heads(q, k, v))
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outputs = [
        diff_attend_document(q[:, a:b], k[:, c:e], v[:, c:e], window, scale)
        for a, b, c, e in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
        if b > a
    ]
    maps = torch.cat(outputs, dim=1) if outputs else q
    return diff_combine(maps.transpose(0, 1), lambda_full, subln_weight, lambda_init, eps)


def diff_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_full: Tensor,
    subln_weight: Tensor,
    lambda_init: float,
    key_mask: Tensor | None,
    scale: float,
    eps: float,
) -> Tensor:
    """One decoded token of each sequence: q (B, Hq, d), k, v (B, Hkv, Tk, d), key_mask (B, Tk) -> (B, Hq*d)."""
    batch, heads_q, d = q.shape
    pairs, keys = k.shape[1] // 2, k.shape[2]
    group = heads_q // k.shape[1]
    # (B, pairs, stripe, group, d): queries of one key head side by side, so that no key is repeated in memory.
    q = q.reshape(batch, pairs, group, 2, d).transpose(2, 3)
    scores = torch.matmul(q * scale, k.view(batch, pairs, 2, keys, d).transpose(-1, -2)).to(
        torch.promote_types(q.dtype, torch.float32)
    )
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, None, :], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).to(v.dtype).reshape(batch, pairs, 1, 2 * group, keys)
    maps = torch.matmul(weights, v.reshape(batch, pairs, 2, keys, d))
    # (B, pairs, value half, stripe, group, d) -> (B, stripe, pairs*group, 2d)
    maps = maps.view(batch, pairs, 2, 2, group, d).permute(0, 3, 1, 4, 2, 5).reshape(batch, heads_q, 2 * d)
    return diff_combine(maps, lambda_full, subln_weight, lambda_init, eps)
