"""Complete prompts in batches: over slots of states where the model's family has a decoding step, else by its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sft.generate.own_cache import CacheBatch
from sft.generate.requests import Generation, Job
from sft.generate.sampling import Sampling
from sft.generate.slot_batch import SlotBatch
from sft.models.end_tokens import end_token_ids
from sft.models.sambay_decoding import decoder_weights
from sft.tokenizers.vocabulary import check_vocabulary


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    eos_ids: Iterable[int] | None = None,
    requests: Sequence[int] | None = None,
    prefill_chunk: int | None = 4096,
    on_done: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Complete every prompt (token ids); returns the completions in the prompts' order.

    Args:
        eos_ids: what ends a completion; None: `end_token_ids(tokenizer, model)`.
        batch_size: sequences that are decoded at once.
        requests: the number under which each prompt draws its random numbers (default: its position), so that a part
            of a larger job samples what the whole job would have sampled.
        prefill_chunk: longest piece of a prompt that is run at once, in tokens; None: whole prompts.
        on_done: called with (position of the prompt, completion) as soon as each is done.

    The result of a request doesn't depend on its batch: not at all where a decoding step in C++ runs (SambaY on a CPU),
    else not beyond floating-point rounding. The model is in eval mode meanwhile and returns to the mode it was in.
    Raises UsageError for an empty prompt, UserError for tokens outside the model's vocabulary and for logits that
    aren't finite.
    """
    ends = frozenset(end_token_ids(tokenizer, model) if eos_ids is None else eos_ids)
    job = Job(Sampling(temperature, top_p), max_new_tokens, ends, seed, batch_size, prefill_chunk)
    numbers = list(range(len(prompts))) if requests is None else list(requests)
    if len(numbers) != len(prompts):
        raise ValueError(f"{len(numbers)} request numbers for {len(prompts)} prompts")
    queue = job.queue(prompts, numbers)
    check_vocabulary(model, max((max(prompt) for prompt in prompts), default=0))
    results: list[Generation | None] = [None] * len(prompts)
    with _evaluating(model):
        batch = _batch(model, job, max(map(len, prompts), default=0))
        while queue or batch.rows:
            for request in batch.step(queue):
                generation = job.generation(request)
                results[request.index] = generation
                if on_done is not None:
                    on_done(request.index, generation)
    return [result for result in results if result is not None]


def _batch(model: Any, job: Job, longest_prompt: int) -> CacheBatch | SlotBatch:
    weights = decoder_weights(model)
    if weights is None:
        return CacheBatch(model, job)
    return SlotBatch(model, weights, job, longest_prompt + job.max_new_tokens)


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
