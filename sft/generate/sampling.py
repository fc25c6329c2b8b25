"""How tokens are chosen and where an answer ends: what is asked, and its form for a batch of sequences."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from sambay_kernels import Choice
from torch import Tensor

from sft.utils.errors import UsageError, UserError, shown

_WHOLE = ("max_new_tokens", "max_length", "top_k", "logprobs", "seed")
_REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")
_MAY_BE_NONE = ("max_length", "logprobs")
_MOST_KEPT = (1 << 31) - 1


@dataclass(frozen=True)
class SamplingParams:
    """What is asked for one answer; names and meanings are those of vLLM and of the OpenAI API.

    Attributes:
        max_new_tokens: the answer is cut off after so many.
        max_length: most tokens of prompt and answer; None: only max_new_tokens counts.
        temperature: 0 is greedy.
        top_k: keep so many of the likeliest tokens; 0 keeps all, and so does -1.
        top_p: of those, keep the fewest that hold at least this probability.
        min_p: keep tokens that are at least this share as likely as the likeliest.
        repetition_penalty: above 1, logits of tokens in prompt or answer are divided by it (multiplied where negative)
            (arXiv 1909.05858); from 0.01 to 100.
        presence_penalty: subtracted from the logits of tokens that are in the answer.
        stop: texts that end the answer, which is cut off in front of them; a text by itself is one of them.
        stop_token_ids: tokens that end it, beside the model's end tokens; any collection, as that of `stop`.
        logprobs: log-probabilities of so many of the likeliest tokens, beside each token's own; None: none at all.
        seed: of the answer's random numbers, with the number of its request. There is no None that draws one: every
            answer can be had again.

    Raises:
        UsageError: a value of another type, or out of its range.
    """

    max_new_tokens: int = 512
    max_length: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        taken = {
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "stop": _texts(self.stop),
            "stop_token_ids": frozenset(_stop_ids(self.stop_token_ids)),
        }
        for name, value in taken.items():
            object.__setattr__(self, name, value)  # it is frozen
        for name, right, what in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("max_length", self.max_length is None or self.max_length >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("presence_penalty", abs(self.presence_penalty) < math.inf, "a number"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0"),
        ):
            if not right:
                raise _wrong(name, what, getattr(self, name))

    def _check_types(self) -> None:
        kinds = [(name, Integral, "a whole number") for name in _WHOLE]
        for name, kind, what in (*kinds, *((name, Real, "a number") for name in _REAL)):
            value = getattr(self, name)
            if not (_is(value, kind) or (value is None and name in _MAY_BE_NONE)):
                raise _wrong(name, what, value)

    def longest(self, prompt: int) -> int:
        """How many tokens a prompt of so many and its answer can come to."""
        most = prompt + self.max_new_tokens
        return most if self.max_length is None else max(prompt, min(most, self.max_length))

    @property
    def penalises(self) -> bool:
        """Whether logits depend on what has been said."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0


def token_ids(values: Any) -> list[int] | None:
    """Token ids in any form (list, set, tensor, row of numpy) as a list; None for what isn't token ids."""
    found = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(found, str | bytes) or not isinstance(found, Iterable):
        return None
    found = list(found)
    kinds = set(map(type, found))  # a prompt is long: its types are few
    return None if any(kind is bool or not issubclass(kind, Integral) for kind in kinds) else list(map(int, found))


def _stop_ids(values: Any) -> list[int]:
    found = [] if values is None else token_ids(values)
    if found is None:
        raise _wrong("stop_token_ids", "token ids", values)
    return found


def _texts(value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else () if value is None else value
    found = tuple(found) if isinstance(found, Iterable) else (found,)
    if not all(isinstance(text, str) and text for text in found):
        raise _wrong("stop", "texts that aren't empty", value)
    return found


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _wrong(name: str, what: str, value: Any) -> UsageError:
    return UsageError(f"{name} must be {what}, not {shown(repr(value)[:60])}")


def request_randoms(seed: int, request: int, count: int) -> Tensor:
    """`count` uniform float64 numbers in [0, 1) that belong to one request alone.

    A request draws all of its numbers from a generator of its own, so what it samples doesn't depend on which others
    share its batch. Seed and request are hashed: with their sum, seed 1 would repeat seed 0 one request later.
    """
    digest = hashlib.sha256(f"{seed}:{request}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def choice_of(params: Sequence[SamplingParams], randoms: Tensor, device: torch.device) -> Choice:
    """How the rows of a batch are chosen; randoms (R,)."""
    kind = torch.float64 if device.type == "cpu" else torch.float32

    def column(values: Iterable[float], dtype: torch.dtype = kind) -> Tensor:
        return torch.tensor(list(values), dtype=dtype).to(device, non_blocking=True)

    return Choice(
        temperature=column(p.temperature for p in params),
        top_k=column((min(p.top_k, _MOST_KEPT) for p in params), torch.int32),
        top_p=column(p.top_p for p in params),
        min_p=column(p.min_p for p in params),
        randoms=randoms.to(device, kind, non_blocking=True),
    )


def check_finite(largest: Tensor) -> None:
    """Raise UserError unless the largest logits of the rows are finite; a GPU's host waits for this."""
    if not bool(torch.isfinite(largest).all()):
        raise UserError(
            "The model's logits are not finite (NaN or infinity): its weights are broken or training diverged; "
            "evaluate an earlier checkpoint."
        )
