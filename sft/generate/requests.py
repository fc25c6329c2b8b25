"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sft.generate.sampling import SamplingParams, request_randoms
from sft.generate.stops import StopTexts


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (natural, of the model's own distribution) of a token and of the likeliest in its place."""

    token: float
    top: dict[int, float]


@dataclass(frozen=True)
class Generation:
    """One completion.

    Attributes:
        ids: its tokens, without an end token; with those of a stop text, should one have ended it.
        finished: whether the model ended it, or a stop text; else it was cut off.
        stop: the stop text that ended it.
        logprobs: one for each token, if they were asked for.
    """

    ids: list[int]
    finished: bool
    stop: str | None = None
    logprobs: list[TokenLogprobs] | None = None

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """As the OpenAI API names it."""
        return "stop" if self.finished else "length"


@dataclass(eq=False)
class Request:
    """One prompt on its way: what it has so far, and where its states are (`start`: in a padded batch; `slot`, which
    holds the first `read` tokens, or nothing of it where that is below zero; `due`: how many a step reads next).

    Attributes:
        index: which one of the call's.
        number: with the seed, what its random numbers are drawn by.
        ends: tokens that end it.
    """

    index: int
    number: int
    prompt: list[int]
    params: SamplingParams
    ends: frozenset[int]
    stops: StopTexts | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    start: int = 0
    slot: int = -1
    read: int = -1
    due: int = 1
    done: bool = False
    stop: str | None = None
    _randoms: Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        """All that the model has to have read before the next token."""
        return self.prompt + self.ids

    @property
    def length(self) -> int:
        """How many those are."""
        return len(self.prompt) + len(self.ids)

    @property
    def unread(self) -> list[int]:
        """The tokens that a step reads next."""
        said = self.read - len(self.prompt)
        return self.ids[said : said + self.due] if said >= 0 else self.tokens[self.read : self.read + self.due]

    @property
    def most(self) -> int:
        """Most tokens of its answer; 0 where the prompt leaves none."""
        return self.longest - len(self.prompt)

    @property
    def longest(self) -> int:
        """How many tokens it can come to."""
        return self.params.longest(len(self.prompt))

    def randoms(self, count: int) -> list[float]:
        """The random numbers of the next `count` tokens; drawn when it begins, since waiting requests need none."""
        if self.params.temperature == 0:
            return [0.0] * count
        if self._randoms is None:
            self._randoms = request_randoms(self.params.seed, self.number, self.params.max_new_tokens)
        mine: list[float] = self._randoms[len(self.ids) : len(self.ids) + count].tolist()
        return mine + [0.0] * (count - len(mine))

    def take(self, token: int, logprobs: TokenLogprobs | None = None) -> bool:
        """Append a token; whether the request is done with it."""
        self.read = self.length
        self.ids.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self.stops is not None and token not in self.ends:
            self.stop = self.stops.find(self.ids)
        at_end = token in self.ends or self.stop is not None
        self.done = at_end or len(self.ids) == self.most
        return self.done

    def generation(self) -> Generation:
        """What a request that is done comes to."""
        ended = bool(self.ids) and self.ids[-1] in self.ends
        ids = self.ids[:-1] if ended else self.ids
        logprobs = None if self.params.logprobs is None else self.logprobs[: len(ids)]
        return Generation(ids, ended or self.stop is not None, self.stop, logprobs)
