"""Continuous decoding over slots: a sequence enters and leaves without another one's states being touched.

A prompt is read alone, in pieces, between the steps of the sequences that are under way, so what it comes to depends on
nothing beside it; all its samples begin with the states that it left. Where pages run out, the sequence that came last
gives up its own and waits; it reads what it has written again.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from sambay_kernels import DecoderStep, DecoderWeights
from torch import Tensor

from sft.generate.cache import cache_keyword, new_cache
from sft.generate.chooser import Chosen, choose
from sft.generate.requests import Request
from sft.generate.states import PAGE, States, free_bytes, page_bytes
from sft.generate.steps import STRIDE, steps_for
from sft.models.sambay_decoding import load_slot
from sft.utils.errors import UserError

# The rest is for what a prompt's prefill needs beside the pages, and for whoever shares the machine.
_SHARE_OF_MEMORY = 0.6


class SlotBatch:
    """The sequences being decoded."""

    def __init__(
        self, model: Any, step: DecoderStep, *, batch_size: int, longest: int, prefill_chunk: int | None
    ) -> None:
        self.model, self.step_of, self.batch_size, self.prefill_chunk = model, step, batch_size, prefill_chunk
        self._begin(longest)

    def _begin(self, longest: int) -> None:
        """Empty slots for sequences of up to `longest` tokens."""
        self.longest = longest
        self.rows: list[Request] = []
        self.prompt: _Prompt | None = None
        self.states = _states(self.step_of.weights, self.batch_size, longest + STRIDE)
        self.decode = steps_for(self.step_of, self.states)

    @property
    def live(self) -> int:
        """How many sequences are under way."""
        return len(self.rows)

    def step(self, queue: deque[Request]) -> list[Request]:
        """Read a piece of the next prompt, let in who can begin, decode a token; returns the requests that are done."""
        done = self._enter(queue)
        return [*done, *self._decode(queue)] if self.rows else done

    def drop(self, request: Request) -> None:
        """Forget a sequence that is under way: its slot and its pages are free."""
        self.rows.remove(request)
        self.states.free(request.slot)

    @property
    def pages(self) -> tuple[int, int]:
        """Pages that are in use, and all of them."""
        return self.states.pages

    def _enter(self, queue: deque[Request]) -> list[Request]:
        """Let in those whose prompt is read and that find a slot and pages; read on where it isn't."""
        done = []
        while queue and len(self.rows) < self.batch_size:
            request = queue[0]
            if request.longest > self.longest:
                if self.rows:
                    break  # slots for longer ones are made when nobody is in these
                self._begin(request.longest)
            same = self.prompt is not None and self.prompt.tokens == request.tokens
            if not same and not self._begin_prompt(request.tokens):
                break
            assert self.prompt is not None
            if self.prompt.logits is None:
                self.prompt.read(self.model, self.prefill_chunk, self.states)
            if self.prompt.logits is None or not self._admit(request):
                break
            queue.popleft()
            done += self._accept([request], [choose([request], self.prompt.logits)])
        if self.prompt is not None and not (queue and self.prompt.tokens == queue[0].tokens):
            self._forget_prompt()
        return done

    def _begin_prompt(self, tokens: list[int]) -> bool:
        self._forget_prompt()
        if not self.states.room_for(self.states.prompt, len(tokens)):
            return False
        self.prompt = _Prompt(tokens, new_cache(self.model.config.get_text_config()))
        return True

    def _forget_prompt(self) -> None:
        if self.prompt is not None:
            self.prompt = None
            self.states.free(self.states.prompt)

    def _admit(self, request: Request) -> bool:
        """Give the request a slot that begins with its prompt."""
        slot = self.states.take_slot()
        assert slot is not None  # there are as many as places in the batch
        if not self.states.copy_prompt(slot, request.length):
            self.states.free(slot)
            return False
        request.slot = slot
        self.rows.append(request)
        return True

    def _decode(self, queue: deque[Request]) -> list[Request]:
        """The next tokens of every sequence; who finds no page for them goes back to the queue."""
        ahead = self.decode.stride - 1
        for request in list(self.rows):
            while request in self.rows and not self.states.room_for(request.slot, request.length + ahead):
                self._send_back(queue)
        return self._accept(self.rows, self.decode(self.rows))

    def _send_back(self, queue: deque[Request]) -> None:
        """The prompt whose samples wait gives up its pages; if there is none, the sequence that came last does."""
        if self.prompt is not None:
            self._forget_prompt()
            return
        last = self.rows.pop()
        self.states.free(last.slot)
        queue.appendleft(last)

    def _accept(self, rows: list[Request], chosen: list[list[Chosen]]) -> list[Request]:
        """Append each row's tokens up to its last one; those that are done with it leave."""
        done = [row for row, mine in zip(rows, chosen, strict=True) if any(row.take(*one) for one in mine)]
        for row in done:
            self.states.free(row.slot)
        if done:
            self.rows = [row for row in self.rows if not row.done]
        return done


def _states(weights: DecoderWeights, slots: int, longest: int) -> States:
    """Room for so many sequences, or for as many pages as there is memory: at least a prompt and one sequence."""
    each, device = -(-longest // PAGE), weights.embed.device
    wanted, least = (slots + 1) * each + 1, 2 * each + 1
    affordable = int(_SHARE_OF_MEMORY * free_bytes(device)) // page_bytes(weights)
    if affordable < least:
        raise UserError(
            f"Sequences of up to {longest} tokens need {least * page_bytes(weights) / 1e9:.2f} GB for keys and values, "
            f"more than {_SHARE_OF_MEMORY:.0%} of the {free_bytes(device) / 1e9:.2f} GB that are free: lower "
            "max_new_tokens or max_length."
        )
    return States(weights, slots=slots, longest=longest, pages=min(wanted, affordable))


class _Prompt:
    """The prompt that is being read, or has been: its samples begin with its states and logits (1, V)."""

    def __init__(self, tokens: list[int], cache: Any) -> None:
        self.tokens, self.cache = tokens, cache
        self.read_so_far = 0
        self.logits: Tensor | None = None

    def read(self, model: Any, chunk: int | None, states: States) -> None:
        """One piece more; after the last one the states are in the prompt's slot."""
        begin, count = self.read_so_far, len(self.tokens)
        end = min(begin + (chunk or count), count)
        ids = torch.tensor([self.tokens[begin:end]], device=states.device)
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): self.cache})
        self.read_so_far = end
        if end == count:
            self.logits = output.logits[:, -1]
            load_slot(self.cache, model.config, states.tensors, states.prompt)
            self.cache = None
