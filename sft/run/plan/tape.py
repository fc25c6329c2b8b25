"""Tensors without torch: sizes that live as long as they are referred to, and the graph that a backward pass walks.

Python frees an object with its last reference, as torch frees a tensor. So a forward pass that is written down op by op
(sft.run.plan.passes) holds what the real one holds, when it does, and the peak needs no formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

KINDS = ("gradients", "activations", "temporaries")
"""Of parameters; of the forward pass; recomputed ones, gradients that pass through, and what ops use inside."""


class Memory:
    """Bytes that live, by kind, and what they were when they were most. `inside`: what ops use inside counts."""

    def __init__(self, *, inside: bool = True) -> None:
        self.inside = inside
        self.live = dict.fromkeys(KINDS, 0)
        self.at_peak = dict(self.live)
        self.kind = "activations"

    @property
    def total(self) -> int:
        """All that lives."""
        return sum(self.live.values())

    @property
    def peak(self) -> int:
        """The most that lived at once."""
        return sum(self.at_peak.values())

    def note(self, more: int = 0) -> None:
        """Compare with the peak; `more` bytes live inside an op alone, and are temporary."""
        more = more if self.inside else 0
        if self.total + more > self.peak:
            self.at_peak = dict(self.live)
            self.at_peak["temporaries"] += more

    def hold(self, size: int, kind: str | None = None) -> Held:
        """New bytes, which live as long as what is returned."""
        return Held(self, int(size), kind or self.kind)


class Held:
    """Bytes of a tensor; views of it share this."""

    __slots__ = ("kind", "memory", "size")

    def __init__(self, memory: Memory, size: int, kind: str) -> None:
        self.memory, self.size, self.kind = memory, size, kind
        memory.live[kind] += size
        memory.note()

    def become(self, kind: str) -> None:
        """Count as another kind from now on."""
        self.memory.live[self.kind] -= self.size
        self.memory.live[kind] += self.size
        self.kind = kind

    def __del__(self) -> None:
        self.memory.live[self.kind] -= self.size


Gradients = list[Held | None]


@dataclass(eq=False)
class Node:
    """An op that was recorded: where its inputs come from, what it saved, and from its outputs' gradients to theirs."""

    number: int
    inputs: list[tuple[Node, int] | None]
    backward: Callable[[Gradients], Gradients]
    saved: list[Held] = field(default_factory=list)


@dataclass(eq=False)
class Value:
    """A tensor `(rows, columns)`; `node`: the op that made it and which output it is, None where no gradient goes."""

    data: Held
    rows: int
    columns: int
    node: tuple[Node, int] | None = None


class Tape:
    """Ops in their order, as long as `recording`; each is given as sizes."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.recording = True
        self._count = 0

    def leaf(self, value: Value) -> tuple[Value, Node]:
        """The same tensor as the beginning of a graph, and the node at which its gradient arrives."""
        node = self._node([], lambda _: [])
        return Value(value.data, value.rows, value.columns, (node, 0)), node

    def op(
        self,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        backward: Callable[[Gradients], Gradients],
        saved: Sequence[Held] = (),
        *,
        trains: bool = False,
    ) -> None:
        """Record what made `outputs`. `backward` must hold no tensor but those in `saved`; `trains`: it has parameters
        of its own that get a gradient, whatever its inputs."""
        if not self.recording or not (trains or any(value.node for value in inputs)):
            return
        node = self._node([value.node for value in inputs], backward)
        node.saved = list(saved)
        for place, value in enumerate(outputs):
            value.node = (node, place)

    def _node(self, inputs: list[tuple[Node, int] | None], backward: Callable[[Gradients], Gradients]) -> Node:
        self._count += 1
        return Node(self._count, inputs, backward)


def run_backward(ends: list[tuple[Node, int]], gradients: Gradients, leaves: Sequence[Node] = ()) -> list[Held | None]:
    """Walk from `ends`, the newest op first; what arrives at `leaves`. Both lists are emptied: nothing else may hold
    on to a gradient that has been used."""
    waiting: dict[Node, dict[int, Held]] = {}
    for (node, place), gradient in zip(ends, gradients, strict=True):
        if gradient is not None:
            waiting.setdefault(node, {})[place] = gradient
        del gradient
    ends.clear()
    gradients.clear()
    arrived: dict[Node, Held] = {}
    while waiting:
        node = max(waiting, key=lambda node: node.number)
        slots = waiting.pop(node)
        if node in leaves:
            arrived[node] = slots[0]
            continue
        given: Gradients = [slots.pop(place, None) for place in range(max(slots) + 1)]
        inputs = node.inputs
        passed = node.backward(given)
        given.clear()
        node.saved = []
        for target, gradient in zip(inputs, passed, strict=True):
            if target is not None and gradient is not None:
                # A second gradient of the same tensor is added to the first in place.
                waiting.setdefault(target[0], {}).setdefault(target[1], gradient)
            del gradient
        del passed, node
    return [arrived.get(leaf) for leaf in leaves]
