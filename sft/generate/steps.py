"""Tokens of the sequences under way: one at a time, or several without a word between GPU and host."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from sambay_kernels import DecoderStep
from torch import Tensor

from sft.generate.sampling import Sampling, check_finite, next_tokens
from sft.generate.states import States

STRIDE = 16
"""Tokens that a GPU makes before the host looks: a sequence that ends runs on for 7 of them on average."""


class Steps(Protocol):
    """How a batch decodes.

    Attributes:
        stride: tokens of every sequence that a call makes.
    """

    stride: int

    def __call__(self, tokens: list[int], slots: list[int], randoms: Tensor | None) -> list[list[int]]:
        """The next `stride` tokens of each of R sequences, from its last token, its slot and its random numbers
        (R, stride), None for greedy."""
        ...


class EagerSteps:
    """A step, a choice, a look."""

    stride = 1

    def __init__(self, step: DecoderStep, states: States, sampling: Sampling) -> None:
        self.step, self.states, self.sampling = step, states, sampling

    def __call__(self, tokens: list[int], slots: list[int], randoms: Tensor | None) -> list[list[int]]:
        """See `Steps`."""
        logits = self.step(self.states.tensors, torch.tensor(tokens), torch.tensor(slots))
        return next_tokens(logits, self.sampling, None if randoms is None else randoms[:, 0])[:, None].tolist()


class GraphSteps:
    """Steps by CUDA graphs, one for each power of two of sequences; places that no sequence has belong to nobody."""

    def __init__(self, step: DecoderStep, states: States, sampling: Sampling) -> None:
        self.step, self.states, self.sampling = step, states, sampling
        self.stride = 1 if sampling.temperature else STRIDE
        self._graphs: dict[int, _Graph] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, tokens: list[int], slots: list[int], randoms: Tensor | None) -> list[list[int]]:
        """See `Steps`."""
        count = len(tokens)
        graph = self._graph(1 << (count - 1).bit_length())
        graph.begin(tokens, slots)
        if randoms is not None:
            randoms = randoms.to(self.states.device)
        chosen = []
        finite = None
        for index in range(self.stride):
            logits = graph.run()[:count]
            if randoms is not None:
                chosen.append(next_tokens(logits, self.sampling, randoms[:, index]))
            else:
                best, token = logits.max(dim=-1)
                sound = torch.isfinite(best).all()
                finite = sound if finite is None else finite & sound
                chosen.append(token)
            graph.tokens[:count] = chosen[-1]
        if finite is not None:
            check_finite(finite)
        return torch.stack(chosen, dim=1).tolist()

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
        with torch.cuda.graph(self.graph, pool=pool):
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


def steps_for(step: DecoderStep, states: States, sampling: Sampling) -> Steps:
    """Graphs on a GPU, else step by step."""
    graphs = step.backend == "triton" and states.device.type == "cuda"
    return GraphSteps(step, states, sampling) if graphs else EagerSteps(step, states, sampling)
