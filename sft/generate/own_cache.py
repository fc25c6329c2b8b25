"""Continuous batched decoding of any causal language model through its own transformers cache.

Prompts enter in batches, aligned on the right; finished rows leave and waiting ones take their place, which copies the
cache, so it is done for several at once.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sft.generate.cache import cache_keyword, can_join, join_rows, new_cache, select_rows, trim_left
from sft.generate.chooser import choose
from sft.generate.requests import Request

# Rows leave the batch (and others join) when at least this fraction of it has finished: each change copies the cache.
_RENEW_FRACTION = 0.125


class CacheBatch:
    """The rows being decoded, their cache, and a mask (B, room) of which cache positions each row may see."""

    def __init__(self, model: Any, batch_size: int, prefill_chunk: int | None) -> None:
        self.model, self.batch_size, self.prefill_chunk = model, batch_size, prefill_chunk
        self.cache_keyword = cache_keyword(model)
        self.device = model.device
        self.rows: list[Request] = []
        self.live = 0
        self.length = 0
        self.cache: Any = None
        self.mask = torch.zeros((0, 0), dtype=torch.long, device=self.device)
        self.positions = torch.zeros((0, 1), dtype=torch.long, device=self.device)
        self.tokens = torch.zeros((0, 1), dtype=torch.long, device=self.device)

    def step(self, queue: deque[Request]) -> list[Request]:
        """Admit waiting requests if there is room, or else decode one token; returns the requests that are done."""
        leaving = len(self.rows) - self.live
        if self.rows and leaving and (self.live == 0 or leaving >= _RENEW_FRACTION * len(self.rows)):
            self._remove_done()
        free = self.batch_size - len(self.rows)
        if queue and (not self.rows or (free >= _RENEW_FRACTION * self.batch_size and can_join(self.cache))):
            return self._admit([queue.popleft() for _ in range(min(free, len(queue)))])
        return self._decode() if self.rows else []

    def drop(self, request: Request) -> None:
        """Forget a row that is under way; it leaves the cache with the next ones that are done."""
        request.done = True
        self.live -= 1

    @property
    def pages(self) -> tuple[int, int]:
        """None: the cache has no pages."""
        return 0, 0

    def _admit(self, requests: list[Request]) -> list[Request]:
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

    def _join(self, requests: list[Request], cache: Any, mask: Tensor, width: int) -> None:
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
        self.mask = pad(mask, (0, max(row.params.max_new_tokens for row in self.rows)), value=1)
        self.positions = torch.cat([self.positions, lengths - 1])

    @property
    def padded(self) -> bool:
        """Whether some row has padding in front."""
        return any(row.start for row in self.rows)

    def _visible(self, length: int, grown: int) -> Tensor:
        """The mask of the present rows over `length` positions, `grown` of them new ones on the left."""
        return pad(self.mask[:, : length - grown], (grown, 0))

    def _decode(self) -> list[Request]:
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

    def _accept(self, rows: list[Request], logits: Tensor) -> list[Request]:
        """Choose a token for `rows`, the last ones of the batch, from logits (len(rows), V); returns who is done."""
        chosen = choose(rows, logits)
        tokens = torch.tensor([token for token, _ in chosen], device=self.device)
        kept = self.tokens[: len(self.rows) - len(rows)]
        self.tokens = torch.cat([kept, tokens[:, None]])
        done = []
        for row, (token, logprobs) in zip(rows, chosen, strict=True):
            if not row.done and row.take(token, logprobs):
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
