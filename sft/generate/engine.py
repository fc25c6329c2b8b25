"""Continuous batched decoding: prompts enter in batches, finished rows leave, waiting ones take their place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sft.generate.cache import cache_keyword, can_join, join_rows, new_cache, select_rows, trim_left
from sft.generate.sampling import Sampling, next_tokens, request_randoms
from sft.models.end_tokens import end_token_ids
from sft.tokenizers.vocabulary import check_vocabulary
from sft.utils.errors import UsageError

# Rows leave the batch (and others join) when at least this fraction of it has finished: each change copies the cache.
_RENEW_FRACTION = 0.125


@dataclass(frozen=True)
class Generation:
    """One completion: its token ids without the end token, and whether the model ended it (else it was cut)."""

    ids: list[int]
    finished: bool


@dataclass
class _Request:
    """One prompt on its way: `start` is where its first token stands in the batch's cache."""

    index: int
    prompt: list[int]
    randoms: Tensor | None
    ids: list[int]
    most: int
    start: int = 0
    done: bool = False


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    max_length: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    eos_ids: Iterable[int] | None = None,
    requests: Sequence[int] | None = None,
    prefill_chunk: int | None = 4096,
    on_done: Callable[[int, Generation], None] | None = None,
    more: Callable[[int], Sequence[tuple[Sequence[int], int]]] | None = None,
) -> list[Generation]:
    """Complete every prompt (token ids); returns the completions in the prompts' order.

    Args:
        max_length: most tokens of a prompt and its completion; one whose prompt leaves none is empty, and not finished.
        eos_ids: what ends a completion; None: `end_token_ids(tokenizer, model)`.
        requests: the number under which each prompt draws its random numbers (default: its position), so that a part
            of a larger job samples what the whole job would have sampled.
        prefill_chunk: longest piece of a prompt that is run at once, in tokens; None: whole prompts.
        on_done: called with (position of the prompt, completion) as soon as each is done.
        more: called before every step with the number of places for which no prompt waits; the (prompt, request number)
            pairs that it returns take the next positions. The end is when all are done and it returns none.

    The result of a request doesn't depend on its batch beyond floating-point rounding. The model is in eval mode
    meanwhile and returns to the mode it was in. Raises UsageError for an empty prompt, UserError for tokens
    outside the model's vocabulary and for logits that aren't finite.
    """
    sampling = Sampling(temperature, top_p)
    if max_new_tokens < 1 or batch_size < 1:
        raise UsageError(f"max_new_tokens ({max_new_tokens}) and batch_size ({batch_size}) must be at least 1.")
    numbers = list(range(len(prompts))) if requests is None else list(requests)
    if len(numbers) != len(prompts):
        raise ValueError(f"{len(numbers)} request numbers for {len(prompts)} prompts")
    ends = frozenset(end_token_ids(tokenizer, model) if eos_ids is None else eos_ids)
    waiting = _Queue(model, sampling, seed, max_new_tokens, max_length)
    waiting.add(list(zip(prompts, numbers, strict=True)))
    results: dict[int, Generation] = {}
    with _evaluating(model):
        batch = _Batch(model, sampling, max_new_tokens, ends, prefill_chunk)
        while True:
            if more is not None:
                waiting.add(more(max(0, batch_size - batch.live - len(waiting.requests))))
            done = waiting.without_room()
            if not (done or waiting.requests or batch.rows):
                return [results[index] for index in range(waiting.positions)]
            for request in [*done, *batch.step(waiting.requests, batch_size)]:
                finished = bool(request.ids) and request.ids[-1] in ends
                generation = Generation(request.ids[:-1] if finished else request.ids, finished)
                results[request.index] = generation
                if on_done is not None:
                    on_done(request.index, generation)


class _Queue:
    """The requests that wait, and how many prompts there have been."""

    def __init__(self, model: Any, sampling: Sampling, seed: int, max_new_tokens: int, max_length: int | None) -> None:
        self.model, self.sampling, self.seed = model, sampling, seed
        self.max_new_tokens, self.max_length = max_new_tokens, max_length
        self.requests: deque[_Request] = deque()
        self.positions = 0

    def add(self, new: Sequence[tuple[Sequence[int], int]]) -> None:
        """Queue (prompt, number) pairs, longest prompt first: neighbours need little padding, and memory peaks at the
        start."""
        for index, (prompt, number) in sorted(enumerate(new, self.positions), key=lambda pair: -len(pair[1][0])):
            if not prompt:
                raise UsageError(f"Prompt {index} has no tokens; there is nothing to continue.")
            randoms = request_randoms(self.seed, number, self.max_new_tokens) if self.sampling.temperature else None
            room = self.max_new_tokens if self.max_length is None else self.max_length - len(prompt)
            most = max(0, min(self.max_new_tokens, room))
            self.requests.append(_Request(index, list(prompt), randoms, [], most))
        check_vocabulary(self.model, max((max(prompt) for prompt, _ in new), default=0))
        self.positions += len(new)

    def without_room(self) -> list[_Request]:
        """Take out the requests whose prompts leave no token for a completion."""
        found = [request for request in self.requests if not request.most]
        for request in found:
            self.requests.remove(request)
        return found


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode without gradients; the mode of every module is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: buffers that a module creates on the way could then never take part in training.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Batch:
    """The rows being decoded, their cache, and a mask (B, room) of which cache positions each row may see."""

    def __init__(
        self, model: Any, sampling: Sampling, max_new_tokens: int, ends: frozenset[int], prefill_chunk: int | None
    ) -> None:
        self.model, self.sampling, self.max_new_tokens, self.ends = model, sampling, max_new_tokens, ends
        self.prefill_chunk = prefill_chunk
        self.cache_keyword = cache_keyword(model)
        self.device = model.device
        self.rows: list[_Request] = []
        self.live = 0
        self.length = 0
        self.cache: Any = None
        self.mask = torch.zeros((0, 0), dtype=torch.long, device=self.device)
        self.positions = torch.zeros((0, 1), dtype=torch.long, device=self.device)
        self.tokens = torch.zeros((0, 1), dtype=torch.long, device=self.device)
        self.randoms: Tensor | None = None

    def step(self, queue: deque[_Request], batch_size: int) -> list[_Request]:
        """Admit waiting requests if there is room, or else decode one token; returns the requests that are done."""
        leaving = len(self.rows) - self.live
        if self.rows and leaving and (self.live == 0 or leaving >= _RENEW_FRACTION * len(self.rows)):
            self._remove_done()
        free = batch_size - len(self.rows)
        if queue and (not self.rows or (free >= _RENEW_FRACTION * batch_size and can_join(self.cache))):
            return self._admit([queue.popleft() for _ in range(min(free, len(queue)))])
        return self._decode() if self.rows else []

    def _admit(self, requests: list[_Request]) -> list[_Request]:
        """Prefill the requests and put them behind the rows; each gets its first token."""
        width = max(len(request.prompt) for request in requests)
        ids = torch.zeros((len(requests), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        cache = new_cache(self.model.config.get_text_config())
        logits = self._prefill(ids, mask, cache)
        self._join(requests, cache, mask, width)
        return self._accept(requests, logits)

    def _prefill(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Run the prompts (B, T) into `cache`, in pieces; returns the logits (B, V) after the last token."""
        width = ids.shape[1]
        chunk = self.prefill_chunk or width
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for start in range(0, width, chunk):
            end = min(start + chunk, width)
            output = self.model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                use_cache=True,
                logits_to_keep=1,
                **{self.cache_keyword: cache},
            )
        return output.logits[:, -1]

    def _join(self, requests: list[_Request], cache: Any, mask: Tensor, width: int) -> None:
        """Put freshly prefilled rows behind those of the batch; the shorter side is padded on the left."""
        length = max(width, self.length) if self.rows else width
        grown = length - self.length
        if self.rows:
            join_rows(self.cache, cache)
            for request in self.rows:
                request.start += grown
            mask = torch.cat([self._visible(length, grown), pad(mask, (length - width, 0))])
        else:
            self.cache = cache
        for request in requests:
            request.start = length - len(request.prompt)
        lengths = torch.tensor([[len(request.prompt)] for request in requests], device=self.device)
        self.rows = self.rows + requests
        self.live += len(requests)
        self.length = length
        # Rows are aligned at their last token, so every position still to come is visible to all of them.
        self.mask = pad(mask, (0, self.max_new_tokens), value=1)
        self.positions = torch.cat([self.positions, lengths - 1])
        self.randoms = self._stack_randoms()

    @property
    def padded(self) -> bool:
        """Whether some row has padding in front."""
        return any(row.start for row in self.rows)

    def _visible(self, length: int, grown: int) -> Tensor:
        """The mask of the present rows over `length` positions, `grown` of them new ones on the left."""
        return pad(self.mask[:, : length - grown], (grown, 0))

    def _stack_randoms(self) -> Tensor | None:
        """The rows' random numbers, (B, max_new_tokens)."""
        randoms = [request.randoms for request in self.rows if request.randoms is not None]
        return torch.stack(randoms).to(self.device) if randoms else None

    def _decode(self) -> list[_Request]:
        """One token for every row."""
        self.length += 1
        self.positions += 1
        output = self.model(
            input_ids=self.tokens,
            attention_mask=self.mask[:, : self.length] if self.padded else None,
            position_ids=self.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_keyword: self.cache},
        )
        return self._accept(self.rows, output.logits[:, -1])

    def _accept(self, rows: list[_Request], logits: Tensor) -> list[_Request]:
        """Choose a token for `rows`, the last ones of the batch, from logits (len(rows), V); returns who is done."""
        randoms = None
        if self.randoms is not None:
            counts = torch.tensor([min(len(row.ids), self.max_new_tokens - 1) for row in rows], device=self.device)
            randoms = self.randoms[-len(rows) :].gather(1, counts[:, None])[:, 0]
        tokens = next_tokens(logits, self.sampling, randoms)
        kept = self.tokens[: len(self.rows) - len(rows)]
        self.tokens = torch.cat([kept, tokens[:, None]])
        done = []
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row.done:
                continue
            row.ids.append(token)
            if token in self.ends or len(row.ids) == row.most:
                row.done = True
                done.append(row)
        self.live -= len(done)
        return done

    def _remove_done(self) -> None:
        """Take the finished rows out of the cache, and the positions that only they used."""
        keep = [index for index, row in enumerate(self.rows) if not row.done]
        self.rows = [self.rows[index] for index in keep]
        if not keep:
            self.cache, self.length = None, 0
        index = torch.tensor(keep, dtype=torch.long, device=self.device)
        self.mask, self.tokens, self.positions = self.mask[index], self.tokens[index], self.positions[index]
        self.randoms = self._stack_randoms()
        if keep:
            select_rows(self.cache, index)
            self._trim()

    def _trim(self) -> None:
        """Drop the positions on the left that no row uses."""
        unused = min(row.start for row in self.rows)
        if unused and can_join(self.cache):
            trim_left(self.cache, unused)
            self.mask = self.mask[:, unused:]
            self.length -= unused
            for row in self.rows:
                row.start -= unused
