"""Complete prompts in batches: over slots of states where the model's family has a decoding step, else by its cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from sambay_kernels import DecoderStep

from sft.generate.own_cache import CacheBatch
from sft.generate.requests import Generation, Request
from sft.generate.sampling import SamplingParams, token_ids
from sft.generate.slot_batch import SlotBatch
from sft.generate.stops import StopTexts
from sft.models.end_tokens import end_token_ids
from sft.models.sambay_decoding import decoder_weights
from sft.tokenizers.vocabulary import outside
from sft.utils.errors import UsageError, UserError, shown

OnDone = Callable[[int, Generation], None]
More = Callable[[int], Sequence[tuple[Sequence[int], int]]]


class Engine:
    """Completes prompts of one model, up to `batch_size` at once.

    A request's answer doesn't depend on what else is under way: not at all where a decoding step in C++ runs (SambaY on
    a CPU), else not beyond floating-point rounding. The model's weights are read as they are at each call of `generate`
    unless a step packs them, which is done when the engine is made.

    Args:
        tokenizer: tells the end tokens with the model, and reads answers for stop texts.
        batch_size: sequences that are decoded at once.
        prefill_chunk: longest piece of a prompt that is run at once, in tokens; None: whole prompts. Where a decoding
            step in C++ runs it reads them, of all prompts together up to `READ_AT_ONCE` tokens at once.
        eos_ids: what ends an answer; None: `end_token_ids(tokenizer, model)`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 64,
        prefill_chunk: int | None = 4096,
        eos_ids: Iterable[int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.prefill_chunk = batch_size, prefill_chunk
        self.ends = frozenset(end_token_ids(tokenizer, model) if eos_ids is None else eos_ids)
        weights = decoder_weights(model)
        self._step = None if weights is None else DecoderStep(weights)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        numbers: Sequence[int] | None = None,
        on_done: OnDone | None = None,
        more: More | None = None,
        longest: int = 0,
    ) -> list[Generation]:
        """Complete every prompt (token ids); returns the completions in the prompts' order.

        Equal prompts that follow each other are read once. The model is in eval mode meanwhile and returns to the mode
        it was in.

        Args:
            params: of all, or one for each prompt; with `more`, of all.
            numbers: by which each prompt draws its random numbers (default: its position), so that a part of a larger
                job samples what the whole job would have sampled.
            on_done: called with (position of the prompt, completion) as soon as each is done.
            more: called before every step with the number of places for which no prompt waits; the (prompt, number)
                pairs that it returns take the next positions. The end is when all are done and it returns none.
            longest: tokens of the longest prompt that `more` will bring.

        Raises:
            UsageError: a prompt that is empty, or no row of token ids. UserError: tokens that the model doesn't know,
                logits that aren't finite.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        numbered = range(len(prompts)) if numbers is None else numbers
        if not len(prompts) == len(each) == len(numbered):
            raise ValueError(f"{len(each)} params and {len(numbered)} numbers for {len(prompts)} prompts")
        requests = self._requests(0, prompts, numbered, each)
        most = params.longest(longest) if isinstance(params, SamplingParams) else 1
        batch = self.batch(max([most, *(request.longest for request in requests)]))
        # The longest first: memory peaks at the start, and neighbours need little padding.
        queue = deque(sorted(requests, key=lambda request: -len(request.prompt)))
        with evaluating(self.model):
            while True:
                if more is not None and (new := more(max(0, self.batch_size - batch.live - len(queue)))):
                    assert isinstance(params, SamplingParams)
                    found, numbered = zip(*new, strict=True)
                    added = self._requests(len(requests), found, numbered, [params] * len(new))
                    requests += added
                    queue.extend(sorted(added, key=lambda request: -len(request.prompt)))
                without_room = [request for request in queue if not request.most]
                for request in without_room:
                    queue.remove(request)
                if not (without_room or queue or batch.rows):
                    return [request.generation() for request in requests]
                for request in [*without_room, *batch.step(queue)]:
                    if on_done is not None:
                        on_done(request.index, request.generation())

    def _requests(
        self,
        first: int,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        params: Sequence[SamplingParams],
    ) -> list[Request]:
        """Requests of the positions from `first` on."""
        return [self.request(*one) for one in zip(count(first), numbers, prompts, params, strict=False)]

    def request(self, index: int, number: int, prompt: Sequence[int], params: SamplingParams) -> Request:
        """One prompt (a row of ids of any kind) as a batch takes it.

        Raises:
            UsageError: a prompt that is empty, or no row of token ids. UserError: tokens that the model doesn't know.
        """
        ids = token_ids(prompt)
        if ids is None:
            found = shown(repr(prompt)[:60])
            raise UsageError(f"Prompt {index} must be a row of token ids, as a tokenizer makes it of text, not {found}")
        if not ids:
            raise UsageError(f"Prompt {index} has no tokens; there is nothing to continue.")
        if wrong := outside(self.model, ids):
            # Who has given ids has no tokenizer here, but whoever had text in its place has another model's.
            raise UserError(f"Prompt {index}: {wrong} of the model; a tokenizer that makes it belongs to another one")
        stops = StopTexts(self.tokenizer, params.stop) if params.stop else None
        return Request(index, number, ids, params, self.ends | params.stop_token_ids, stops)

    def batch(self, longest: int) -> CacheBatch | SlotBatch:
        """An empty batch for sequences of up to `longest` tokens."""
        if self._step is None:
            return CacheBatch(self.model, self.batch_size, self.prefill_chunk)
        return SlotBatch(
            self.model, self._step, batch_size=self.batch_size, longest=longest, prefill_chunk=self.prefill_chunk
        )


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
    on_done: OnDone | None = None,
    more: More | None = None,
    longest: int = 0,
) -> list[Generation]:
    """`Engine(model, tokenizer).generate(prompts)` with the same parameters for all; `requests`: its `numbers`."""
    params = SamplingParams(
        max_new_tokens=max_new_tokens, max_length=max_length, temperature=temperature, top_p=top_p, seed=seed
    )
    engine = Engine(model, tokenizer, batch_size=batch_size, prefill_chunk=prefill_chunk, eos_ids=eos_ids)
    return engine.generate(prompts, params, numbers=requests, on_done=on_done, more=more, longest=longest)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
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
