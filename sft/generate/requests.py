"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sft.generate.sampling import Sampling, request_randoms
from sft.utils.errors import UsageError


@dataclass(frozen=True)
class Generation:
    """One completion: its token ids without the end token, and whether the model ended it (else it was cut)."""

    ids: list[int]
    finished: bool


@dataclass
class Request:
    """One prompt on its way: what it has so far, and where its states are (`start`: in a padded batch; `slot`)."""

    index: int
    number: int
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    randoms: Tensor | None = None
    start: int = 0
    slot: int = -1
    done: bool = False

    @property
    def tokens(self) -> list[int]:
        """All tokens that the model has to have read before the next one."""
        return self.prompt + self.ids


@dataclass(frozen=True)
class Job:
    """What holds for all requests of one call."""

    sampling: Sampling
    max_new_tokens: int
    ends: frozenset[int]
    seed: int
    batch_size: int
    prefill_chunk: int | None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise UsageError(
                f"max_new_tokens ({self.max_new_tokens}) and batch_size ({self.batch_size}) must be at least 1."
            )

    def queue(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> deque[Request]:
        """The requests, longest prompt first: memory peaks at the start, and neighbours need little padding."""
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise UsageError(f"Prompt {index} has no tokens; there is nothing to continue.")
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        return deque(Request(index, numbers[index], list(prompts[index])) for index in order)

    def give_randoms(self, request: Request) -> None:
        """Its random numbers, one a token, when it begins: thousands of waiting requests need none."""
        if self.sampling.temperature and request.randoms is None:
            request.randoms = request_randoms(self.seed, request.number, self.max_new_tokens)

    def take(self, request: Request, token: int) -> bool:
        """Append a token; whether the request is done with it."""
        request.ids.append(token)
        request.done = token in self.ends or len(request.ids) == self.max_new_tokens
        return request.done

    def generation(self, request: Request) -> Generation:
        """What a request that is done comes to."""
        finished = request.ids[-1] in self.ends
        return Generation(request.ids[:-1] if finished else request.ids, finished)
