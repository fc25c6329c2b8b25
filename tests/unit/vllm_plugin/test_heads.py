"""Differential attention as grouped-query attention, in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from sambay_kernels.ops.differential_attention.inputs import DiffInputs
from sambay_kernels.ops.differential_attention.reference import differential_attention_reference
from torch import Tensor

Plugin = Callable[[str], ModuleType]


def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Plain causal attention of one document; query head h attends key head h // (H / G). (T, H, d) -> (T, H, d)."""
    group, tokens = q.shape[1] // k.shape[1], q.shape[0]
    behind = torch.arange(tokens)[:, None] - torch.arange(tokens)
    hidden = (behind < 0) | (behind >= (window or tokens))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "width"),
    [(40, 20, 64, 128), (4, 4, 8, 16), (8, 2, 16, 32), (12, 4, 6, 32), (4, 2, 8, 64)],
)
def test_it_is_the_definition(
    plugin: Plugin, heads: int, kv_heads: int, head_dim: int, width: int, window: int | None
) -> None:
    module, tokens = plugin("heads"), 19
    generator = torch.Generator().manual_seed(heads + head_dim)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = draw(tokens, heads, head_dim), draw(tokens, kv_heads, head_dim), draw(tokens, kv_heads, head_dim)
    lambda_full, weight, lambda_init = draw(1)[0], draw(2 * head_dim), 0.7
    maps = grouped_query_attention(
        module.grouped_queries(q, kv_heads, width),
        module.grouped_keys(k, width),
        module.grouped_values(v, width),
        head_dim**-0.5,
        window,
    )
    found = module.combine(maps, lambda_full, weight, lambda_init, kv_heads)
    borders = torch.tensor([0, tokens], dtype=torch.int32)
    inputs = DiffInputs(q, k, v, borders, borders, window or 0, head_dim**-0.5)
    wanted = differential_attention_reference(inputs, lambda_full, weight, lambda_init, 1e-5)
    assert found.dtype == torch.float64
    assert (found - wanted).abs().max() < 1e-12


def test_each_four_queries_are_in_the_order_0_2_1_3(plugin: Plugin) -> None:
    queries = torch.arange(8.0)[None, :, None].expand(1, 8, 2)
    assert plugin("heads").grouped_queries(queries, 4, 2)[0, :, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_half_precision_is_rounded_once(plugin: Plugin) -> None:
    maps = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, full = torch.linspace(0.5, 1.5, 16).bfloat16(), torch.tensor(0.4).bfloat16()
    found = plugin("heads").combine(maps, full, weight, 0.5, 4)
    wanted = plugin("heads").combine(maps.double(), full.double(), weight.double(), 0.5, 4)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), wanted, rtol=2**-8, atol=1e-6)
