"""Choosing a token by its definition, and logits that make it hard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from sambay_kernels import Choice, choose_token
from torch import Tensor

SETTINGS = [
    {"top_p": 0.95},
    {},
    {"top_k": 5, "top_p": 0.9},
    {"top_k": 50, "min_p": 0.1},
    {"top_p": 0.47, "min_p": 0.05},
    {"top_k": 1},
    {"top_p": 0.01},
    {"top_k": 1200, "top_p": 0.99},
]
TEMPERATURES = [0.0, 0.6, 1.0, 1.0, 0.6, 2.0, 1.0, 0.3]
ROWS = len(TEMPERATURES)


def cases(vocabulary: int = 1500) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(ROWS, vocabulary, generator=generator)
    ends = torch.zeros(ROWS, vocabulary)
    ends[:, 100:150] = 8.0  # fifty equals hold nearly everything
    barred = noise.clone()
    barred[:, ::3] = float("-inf")
    tied = (noise * 2).round()
    return {"peaked": noise * 4, "flat": noise * 0.01, "few equals": ends, "tied": tied, "barred": barred}


def choice(randoms: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Choice:
    def all_rows(value: float) -> Tensor:
        return torch.full((ROWS,), value, dtype=torch.float64)

    temperature = torch.tensor(TEMPERATURES, dtype=torch.float64)
    return Choice(temperature, all_rows(top_k).int(), all_rows(top_p), all_rows(min_p), randoms)


def by_definition(logits: Tensor, asked: Choice) -> Iterator[tuple[int, float]]:
    """Each row's token, and how near its random number is to where another would be chosen; float64."""
    for row, heat, k, p, least, random in zip(logits.double(), *(x.tolist() for x in asked), strict=True):
        if heat == 0:
            yield int(row.argmax()), 1.0
            continue
        weights = torch.softmax(row / heat, -1).tolist()
        order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[: k or None]
        order = [i for i in order if weights[i] >= least * weights[order[0]] and weights[i] > 0]
        whole, kept, held = sum(weights[i] for i in order), [], 0.0
        for token in order:
            if kept and held >= p * whole:
                break
            kept.append(token)
            held += weights[token]
        reached, nearest, chosen = 0.0, 1.0, -1
        for token in sorted(kept):
            reached += weights[token]
            nearest = min(nearest, abs(reached / held - random))
            if chosen < 0 and reached > random * held:
                chosen = token
        yield chosen if chosen >= 0 else max(kept), nearest


def assert_as_defined(
    name: str, dtype: torch.dtype, device: str, vocabulary: int = 1500, numbers: Iterable[int] = range(len(SETTINGS))
) -> None:
    """By a kernel that sums in float32: another token only where the random number is at the border of one.

    `numbers`: which of the SETTINGS are tried.
    """
    logits = cases(vocabulary)[name].to(dtype)
    for seed in numbers:
        settings = SETTINGS[seed]
        randoms = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        asked = choice(randoms, **settings)  # type: ignore[arg-type]
        on_device = Choice(*(x.to(device, torch.float32 if x.is_floating_point() else x.dtype) for x in asked))
        found, largest = choose_token(logits.to(device), on_device)
        assert torch.equal(largest.cpu(), logits.amax(-1))
        for token, (want, nearest) in zip(found.tolist(), by_definition(logits, asked), strict=True):
            assert token == want or nearest < 3e-4, (settings, token, want, nearest)
