"""Continuous decoding over slots: a sequence enters and leaves without another one's states being touched.

A sequence reads what it hasn't read, and then says a token at each step. Where the step takes runs of tokens (on a
CPU), prompts are read by the very calls that decode the others; else the model reads them between the steps, one alone.
Either way what it comes to depends on nothing beside it. Of samples of one prompt, which follow each other, the first
reads it but for its last token, and the others begin with a copy of its states. Where pages run out, the sequence that
came last gives up its own and waits; it reads what it has written again.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from sambay_kernels import DecoderStep, DecoderWeights

from sft.generate.cache import cache_keyword, new_cache
from sft.generate.chooser import Chosen
from sft.generate.requests import Request
from sft.generate.states import PAGE, States, free_bytes, page_bytes, slot_bytes
from sft.generate.steps import STRIDE, steps_for
from sft.models.sambay_decoding import load_slot
from sft.utils.errors import UserError

READ_AT_ONCE = 256
"""Tokens of prompts that a step reads beside those that decode: more are no faster, and hold the others up. Nor is the
model faster at a whole prompt: of 44 tokens it reads 0.3 times as many a second, of 4,096 tokens 0.7 times as many with
10 M parameters, as many with 200 M."""

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
        self.prompt: list[int] | None = None  # whose states, but for its last token, the prompt's slot holds
        self.prefill: _Prefill | None = None
        self.states = _states(self.step_of.weights, self.batch_size, longest + STRIDE)
        self.decode = steps_for(self.step_of, self.states)

    @property
    def live(self) -> int:
        """How many sequences are under way."""
        return len(self.rows)

    def step(self, queue: deque[Request]) -> list[Request]:
        """Let in who can begin, read on, decode a token; returns the requests that are done."""
        self._enter(queue)
        self._prefill()
        self._share(queue)
        return self._decode(queue) if self.rows else []

    def drop(self, request: Request) -> None:
        """Forget a sequence that is under way: its slot and its pages are free."""
        self.rows.remove(request)
        self.states.free(request.slot)

    @property
    def pages(self) -> tuple[int, int]:
        """Pages that are in use, and all of them."""
        return self.states.pages

    def _enter(self, queue: deque[Request]) -> None:
        """Let in those that find a slot, and pages for what they have to read."""
        while queue and len(self.rows) < self.batch_size:
            request = queue[0]
            if request.longest > self.longest:
                if self.rows:
                    break  # slots for longer ones are made when nobody is in these
                self._begin(request.longest)
            slot = self.states.take_slot()
            if slot is None:
                break  # there was memory for fewer than places in the batch
            request.slot = slot
            if not self._start(request, self.rows[-1] if self.rows else None):
                self.states.free(slot)
                break
            self.rows.append(queue.popleft())
        if self.prompt is not None and not (queue and self._shares(self.prompt, queue[0])):
            self._forget_prompt()

    def _start(self, row: Request, before: Request | None) -> bool:
        """Begin a row's states, or let it wait for those of the row before it; False where there are no pages."""
        shared = len(row.prompt) - 1
        source = None
        if self.prompt is not None and self._shares(self.prompt, row):
            source = self.states.prompt
        elif before is not None and before.read <= shared and self._shares(before.prompt, row):
            if before.read < shared:
                return True
            source = before.slot
        if source is None:
            begun = self.states.start(row.slot, row.length)
        else:
            begun = self.states.copy(source, row.slot, shared)
        if begun:
            row.read = 0 if source is None else shared
        return begun

    def _shares(self, prompt: list[int], row: Request) -> bool:
        """Whether a row can begin with a prompt's states: a model reads all that it reads at once."""
        return row.prompt == prompt and (self.step_of.takes_runs or not row.ids)

    def _by_model(self, row: Request) -> int:
        """How many of a row's tokens the model reads."""
        return 0 if self.step_of.takes_runs else row.length - 1

    def _prefill(self) -> None:
        """Read prompts by the model, one after the other, up to the first that has a piece left."""
        for row in self.rows:
            if 0 <= row.read < (count := self._by_model(row)):
                if self.prefill is None or self.prefill.row is not row:
                    self.prefill = _Prefill(row, row.tokens[:count], new_cache(self.model.config.get_text_config()))
                if not self.prefill.read(self.model, self.prefill_chunk, self.states):
                    return
        self.prefill = None

    def _share(self, queue: deque[Request]) -> None:
        """Hand states of a prompt that is read to the rows that wait for it; keep a copy for those without a slot."""
        before: Request | None = None
        for row in list(self.rows):
            while row.read < 0 and row in self.rows and not self._start(row, before):
                self._send_back(queue)
            before = row
        if self.prompt is not None or not (self.rows and queue):
            return
        last = self.rows[-1]
        if last.read == len(last.prompt) - 1 and self._shares(last.prompt, queue[0]):
            copied = self.states.copy(last.slot, self.states.prompt, last.read)
            self.prompt = last.prompt if copied else None

    def _forget_prompt(self) -> None:
        self.prompt = None
        self.states.free(self.states.prompt)

    def _decode(self, queue: deque[Request]) -> list[Request]:
        """The next tokens of every sequence; who finds no page for them goes back to the queue."""
        ahead = self.decode.stride - 1
        for row in list(self.rows):
            while row.read >= self._by_model(row) and not self.states.room_for(row.slot, row.length + ahead):
                self._send_back(queue)
        rows = self._due(queue)
        return self._accept(rows, self.decode(rows)) if rows else []

    def _due(self, queue: deque[Request]) -> list[Request]:
        """The rows that take part in the next step; `due` is how many tokens of theirs it reads."""
        room, found = READ_AT_ONCE, []
        for row, behind in zip(self.rows, [*self.rows[1:], queue[0] if queue else None], strict=True):
            if row.read < self._by_model(row):
                continue
            shared = len(row.prompt) - 1
            waits = row.read < shared and behind is not None and behind.read < 0 and self._shares(row.prompt, behind)
            row.due = (shared if waits else row.length) - row.read
            if row.due > 1:
                row.due = min(row.due, room, self.prefill_chunk or room)
                room -= row.due
            if row.due:
                found.append(row)
        return found

    def _send_back(self, queue: deque[Request]) -> None:
        """The prompt whose samples wait gives up its pages; if there is none, the sequence that came last does."""
        if self.prompt is not None:
            self._forget_prompt()
            return
        last = self.rows.pop()
        self.states.free(last.slot)
        last.read = -1
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
    """Room for so many sequences, or for as many slots and pages as there is memory: at least one and a prompt."""
    each, device = -(-longest // PAGE), weights.embed.device
    wanted, least = (slots + 1) * each + 1, 2 * each + 1
    memory, of_slot, of_page = int(_SHARE_OF_MEMORY * free_bytes(device)), slot_bytes(weights), page_bytes(weights)
    slots = min(slots, (memory - least * of_page) // of_slot - States.BESIDE)
    if slots < 1:
        needed = least * of_page + (1 + States.BESIDE) * of_slot
        raise UserError(
            f"A sequence of up to {longest} tokens needs {needed / 1e9:.2f} GB for states, keys and values, more than "
            f"{_SHARE_OF_MEMORY:.0%} of the {free_bytes(device) / 1e9:.2f} GB that are free: lower max_new_tokens "
            "or max_length."
        )
    pages = min(wanted, (memory - (slots + States.BESIDE) * of_slot) // of_page)
    return States(weights, slots=slots, longest=longest, pages=pages)


class _Prefill:
    """The tokens of a row that the model is reading."""

    def __init__(self, row: Request, tokens: list[int], cache: Any) -> None:
        self.row, self.tokens, self.cache = row, tokens, cache
        self.read_so_far = 0

    def read(self, model: Any, chunk: int | None, states: States) -> bool:
        """One piece more; whether it was the last one: the states are in the row's slot then."""
        begin, count = self.read_so_far, len(self.tokens)
        self.read_so_far = end = min(begin + (chunk or count), count)
        ids = torch.tensor([self.tokens[begin:end]], device=states.device)
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): self.cache})
        if end < count:
            return False
        load_slot(self.cache, model.config, states.tensors, self.row.slot)
        self.row.read = count
        return True
