"""The token that is chosen is that of the definition, which sorts everything; the op doesn't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from choice_toys import ROWS, SETTINGS, by_definition, cases, choice
from sambay_kernels import Choice, choose_token
from sambay_kernels.ops.choose_token import torch as torch_backend
from torch import Tensor


def randoms(seed: int = 0) -> Tensor:
    return torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", list(cases()))
def test_the_token_is_that_of_the_definition(name: str, settings: dict[str, Any]) -> None:
    logits = cases()[name].double()
    for seed in range(4):
        asked = choice(randoms(seed), **settings)
        found, largest = choose_token(logits, asked)
        assert found.tolist() == [token for token, _ in by_definition(logits, asked)]
        assert torch.equal(largest, logits.amax(-1))


def test_ends_of_the_distribution() -> None:
    for edge in (0.0, 1 - 1e-16):
        found, _ = choose_token(cases()["barred"], choice(torch.full((ROWS,), edge, dtype=torch.float64), top_p=0.9))
        assert cases()["barred"].gather(1, found[:, None]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_temperature_near_nothing_is_greedy(dtype: torch.dtype) -> None:
    logits = cases()["peaked"].to(dtype)
    cold = torch.full((ROWS,), 1e-300, dtype=torch.float64)
    for settings in SETTINGS:
        found, _ = choose_token(logits, choice(randoms(), **settings)._replace(temperature=cold))
        assert torch.equal(logits.gather(1, found[:, None])[:, 0], logits.amax(-1))


def test_the_vocabulary_is_sorted_only_for_rows_whose_nucleus_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_rows: list[int] = []
    largest = torch_backend._largest

    def counted(probabilities: Tensor, count: int | None) -> Tensor:
        sorted_rows.append(len(probabilities) if count is None else 0)
        return largest(probabilities, count)

    monkeypatch.setattr(torch_backend, "_largest", counted)
    some = choice(randoms(), top_p=0.95)
    choose_token(cases()["peaked"], some)
    assert sorted_rows == [0]
    mixed = torch.cat([cases()["peaked"][:6], cases()["flat"][6:]])
    choose_token(mixed, some)
    assert sorted_rows == [0, 0, 2]


def test_bad_input_is_refused() -> None:
    asked = choice(randoms())
    with pytest.raises(ValueError, match="top_p"):
        choose_token(torch.zeros(ROWS, 9), asked._replace(top_p=torch.ones(3)))
    with pytest.raises(TypeError, match="min_p"):
        choose_token(torch.zeros(ROWS, 9), Choice(*asked[:3], 0.0, asked.randoms))  # type: ignore[arg-type]
