"""The nucleus is that of the whole sorted vocabulary, found without sorting it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sft.generate import sampling
from sft.generate.sampling import Sampling, next_tokens


def by_sorting_all(logits: Tensor, top_p: float, randoms: Tensor) -> list[int]:
    """The definition, a row at a time: float64, likeliest first, equals by id."""
    chosen = []
    for row, random in zip(torch.softmax(logits.float(), -1).double().tolist(), randoms.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        kept, held = [], 0.0
        for token in order:
            if held >= top_p:
                break
            kept.append(token)
            held += row[token]
        reached, target = 0.0, random * held
        for token in kept:
            reached += row[token]
            if reached > target:
                break
        chosen.append(token)
    return chosen


def cases() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 5000, generator=generator)
    ends = torch.zeros(6, 5000)
    ends[:, 1000:1050] = 8.0  # fifty equals hold nearly everything
    tied = (noise * 2).round()
    return {"peaked": noise * 4, "flat": noise * 0.01, "equal": torch.zeros(6, 5000), "few equals": ends, "tied": tied}


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("name", list(cases()))
def test_the_token_is_that_of_the_sorted_vocabulary(name: str, top_p: float) -> None:
    logits = cases()[name]
    randoms = torch.tensor([0.0, 0.3, 0.5, 0.77, 0.99, 1 - 1e-12], dtype=torch.float64)
    found = next_tokens(logits, Sampling(1.0, top_p), randoms)
    assert found.tolist() == by_sorting_all(logits, top_p, randoms)


def test_the_vocabulary_is_sorted_only_for_rows_whose_nucleus_is_wide(monkeypatch: Any) -> None:
    sorted_rows = []
    largest = sampling._largest

    def counted(probabilities: Tensor, count: int | None) -> Tensor:
        sorted_rows.append(len(probabilities) if count is None else 0)
        return largest(probabilities, count)

    monkeypatch.setattr(sampling, "_largest", counted)
    logits = torch.cat([cases()["peaked"], cases()["flat"][:2]])
    next_tokens(logits[:6], Sampling(0.6, 0.95), torch.full((6,), 0.4, dtype=torch.float64))
    assert sorted_rows == [0]
    next_tokens(logits, Sampling(0.6, 0.95), torch.full((8,), 0.4, dtype=torch.float64))
    assert sorted_rows == [0, 0, 2]
