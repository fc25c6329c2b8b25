"""Neighbouring row steps run in one pass over a shard: its rows are read and written once, whatever they go through.

A pass begins where a source is read, where all rows had to be seen before one could be decided on (a TableStep, whose
verdicts it carries out first), and around a step that one process alone works on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft.data.engine.plan import READ, Node, every_node
from sft.data.steps import FIT, TableStep, step_class


@dataclass(frozen=True)
class Pass:
    """Nodes that run one after the other on the same shards."""

    nodes: tuple[Node, ...]

    @property
    def key(self) -> str:
        """What its rows are known by: the key of its last node."""
        return self.nodes[-1].key

    @property
    def first(self) -> Node:
        """The node whose input is the pass's."""
        return self.nodes[0]

    @property
    def reads(self) -> bool:
        """Whether its input is a source."""
        return self.first.step == READ

    @property
    def decides(self) -> bool:
        """Whether its first node decides on all rows at once."""
        return not self.reads and issubclass(step_class(self.first.step), TableStep)

    @property
    def parallel(self) -> bool:
        """Whether several processes may work on it."""
        return all(_parallel(node) for node in self.nodes)

    @property
    def only_judges(self) -> bool:
        """Whether all its steps do: then its shards only say which rows of earlier files go on."""
        return not self.reads and all(step_class(node.step).only_judges for node in self.nodes)

    @property
    def makes_documents(self) -> bool:
        """Whether it is a chain's last."""
        return self.nodes[-1].step == FIT


def make_passes(ends: Sequence[Node]) -> list[Pass]:
    """The passes of all chains, in the order in which they run."""
    passes: dict[str, list[Node]] = {}
    for node in every_node(ends):
        before = node.inputs[0] if len(node.inputs) == 1 else None
        if before is None or _alone(node) or not _parallel(before):
            passes[node.key] = [node]
        else:
            passes[node.key] = [*passes.pop(before.key), node]
    return [Pass(tuple(nodes)) for nodes in passes.values()]


def _parallel(node: Node) -> bool:
    return node.step == READ or step_class(node.step).parallel(node.config)


def _alone(node: Node) -> bool:
    """Whether a pass begins with the node."""
    return not _parallel(node) or issubclass(step_class(node.step), TableStep)
