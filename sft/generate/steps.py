"""Tokens of the sequences under way: one at a time, or several without a word between GPU and host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from sambay_kernels import DecoderStep, choose_token
from torch import Tensor

from sft.generate.chooser import Chosen, choose
from sft.generate.requests import Request
from sft.generate.sampling import check_finite, choice_of
from sft.generate.states import States

STRIDE = 16
"""Tokens that a GPU makes before the host looks: a sequence that ends runs on for 7 of them on average."""


class Steps(Protocol):
    """How a batch decodes.

    Attributes:
        stride: tokens of every sequence that a call may make.
    """

    stride: int

    def __call__(self, rows: Sequence[Request]) -> list[list[Chosen]]:
        """The next tokens of each sequence, up to `stride` of them; what lies behind a sequence's end is of no use.

        None for one that still reads: each reads its `unread` tokens, which are one where a step takes no runs.
        """
        ...


class EagerSteps:
    """A step, a choice, a look."""

    stride = 1

    def __init__(self, step: DecoderStep, states: States) -> None:
        self.step, self.states = step, states

    def __call__(self, rows: Sequence[Request]) -> list[list[Chosen]]:
        """See `Steps`."""
        device = self.states.device
        tokens = torch.tensor([token for row in rows for token in row.unread], device=device)
        slots = torch.tensor([row.slot for row in rows for _ in range(row.due)], device=device)
        for row in rows:
            row.read += row.due
        choosing = [row for row in rows if row.read == row.length]
        wanted = None if len(choosing) == len(tokens) else self._wanted(rows)
        logits = self.step(self.states.tensors, tokens, slots, wanted)
        chosen = iter(choose(choosing, logits) if choosing else [])
        return [[next(chosen)] if row.read == row.length else [] for row in rows]

    @staticmethod
    def _wanted(rows: Sequence[Request]) -> Tensor:
        """Of all tokens that are read the last ones of sequences that go on."""
        wanted = [place == row.due - 1 and row.read == row.length for row in rows for place in range(row.due)]
        return torch.tensor(wanted)


class GraphSteps:
    """Steps by CUDA graphs, one for each power of two of sequences; places that no sequence has belong to nobody."""

    stride = STRIDE

    def __init__(self, step: DecoderStep, states: States) -> None:
        self.step, self.states = step, states
        self._graphs: dict[int, _Graph] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, rows: Sequence[Request]) -> list[list[Chosen]]:
        """See `Steps`. What each choice depends on is sent ahead; where it is what was said, the host chooses."""
        count = len(rows)
        graph = self._graph(1 << (count - 1).bit_length())
        graph.begin([row.unread[0] for row in rows], [row.slot for row in rows])
        if any(row.params.penalises or row.params.logprobs is not None for row in rows):
            return [[one] for one in choose(rows, graph.run()[:count])]
        randoms = torch.tensor([row.randoms(self.stride) for row in rows]).T.contiguous().to(self.states.device)
        choice = choice_of([row.params for row in rows], randoms[0], self.states.device)
        chosen, largest = [], []
        for numbers in randoms:
            tokens, best = choose_token(graph.run()[:count], choice._replace(randoms=numbers))
            graph.tokens[:count] = tokens
            chosen.append(tokens)
            largest.append(best)
        check_finite(torch.stack(largest))
        return [[(token, None) for token in mine] for mine in torch.stack(chosen, dim=1).tolist()]

    def _graph(self, places: int) -> _Graph:
        if places not in self._graphs:
            self._graphs[places] = _Graph(self.step, self.states, places, self._pool)
        return self._graphs[places]


class _Graph:
    """A recorded step of so many places."""

    def __init__(self, step: DecoderStep, states: States, places: int, pool: Any) -> None:
        self.states = states
        self.tokens = torch.zeros(places, dtype=torch.long, device=states.device)
        self.slots = torch.full((places,), states.nobody, dtype=torch.long, device=states.device)
        self.graph = torch.cuda.CUDAGraph()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            # Once outside of a graph: kernels are compiled, and libraries make their workspaces.
            step(states.tensors, self.tokens, self.slots)
        torch.cuda.current_stream().wait_stream(beside)
        # Of this thread alone: those of a process group look at the GPU while a training goes on around this.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            states.tensors.lengths[states.nobody].zero_()
            self.logits = step(states.tensors, self.tokens, self.slots)

    def begin(self, tokens: list[int], slots: list[int]) -> None:
        """Put these sequences into the first places."""
        self.slots.fill_(self.states.nobody)
        self.slots[: len(slots)] = torch.tensor(slots, device=self.slots.device)
        self.tokens[: len(tokens)] = torch.tensor(tokens, device=self.tokens.device)

    def run(self) -> Tensor:
        """Logits (places, V), which the next run writes over."""
        self.graph.replay()
        return self.logits


def steps_for(step: DecoderStep, states: States) -> Steps:
    """Graphs on a GPU, else step by step."""
    graphs = step.backend == "triton" and states.device.type == "cuda"
    return GraphSteps(step, states) if graphs else EagerSteps(step, states)
