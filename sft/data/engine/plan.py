"""A section of a recipe as a tree of nodes: sources at the leaves, steps on the way to the rows that are trained on.

Each node's key is the hash of all that decides its rows: its settings and version, and the keys of what it reads. So a
changed step makes new keys for itself and for all that come after it, and what comes before is only looked up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sft.data.engine.shards import GROUP_CHARACTERS, GROUP_ROWS
from sft.data.read.conversation import check_templates
from sft.data.read.sources import OpenSource, open_source, source_name
from sft.data.steps import step_class
from sft.recipe.problems import nearest
from sft.recipe.schema import DataSection, DataSource, Templates
from sft.recipe.steps import StepEntry
from sft.utils.errors import UsageError
from sft.utils.files import sha256_json

FORMAT_VERSION = 2  # raised when the same inputs would be stored as other bytes
MEASURE = "measure"


@dataclass(frozen=True)
class Node:
    """Something that makes shards.

    Attributes:
        key: hash of all that decides the rows.
        title: for people, such as `openr1: verify`.
        step: name of the step; or "read" (a source), "measure" (lengths are counted), "concatenate" (sources meet).
        inputs: the nodes that it reads, in order.
        names: for "concatenate", what each input is called: from there on the rows' `source`.
        source: for "read", the source and how it is read; `opened` is what was found there.
        config: settings of the step.
    """

    key: str
    title: str
    step: str
    inputs: tuple[Node, ...] = ()
    names: tuple[str, ...] = ()
    config: Any = None
    templates: Templates = field(default_factory=Templates)
    source: DataSource | None = None
    opened: OpenSource | None = None

    def walk(self) -> Iterator[Node]:
        """All nodes below and this one, in the order in which they run."""
        for node in self.inputs:
            yield from node.walk()
        yield self

    @property
    def leaves(self) -> list[Node]:
        """The sources."""
        return [node for node in self.walk() if node.step == "read"]


def uses_steps(data: DataSection) -> bool:
    """Whether the section needs more than reading its sources one after the other."""
    return bool(data.steps) or any(
        source.steps or source.sources or source.recipe or source.carry or source.rows == "problems"
        for source in data.sources
    )


def make_plan(data: DataSection, tokenizer_hash: str) -> Node:
    """The tree of a section; its root makes the rows that are trained on.

    Opens every source. Raises UsageError or UserError when a source isn't there, a step names a column that its source
    doesn't carry, or rows would end without an answer.
    """
    planner = _Planner(tokenizer_hash, data.seed)
    root = planner.group(data.sources, data.steps, _templates(data, Templates()), "")
    _refuse_unanswered(data.sources, data.steps)
    _refuse_twice(root)
    return root


def _templates(section: Templates, around: Templates) -> Templates:
    """The section's own templates, else those of the section around it."""
    check_templates(section)
    names = Templates.model_fields
    return Templates(**{name: getattr(section, name) or getattr(around, name) for name in names})


@dataclass(frozen=True)
class _Planner:
    tokenizer_hash: str
    seed: int

    def group(self, sources: list[DataSource], steps: list[StepEntry], templates: Templates, prefix: str) -> Node:
        """Sources, one after the other, and the steps that all of them go through."""
        names = [source_name(source) for source in sources]
        nodes = tuple(self._source(source, templates, prefix) for source in sources)
        node = self._concatenated(nodes, tuple(names), prefix)
        available = set.intersection(*(_carried(source) for source in sources))
        self._check_names(steps, available, names)
        return self._steps(node, steps, templates, prefix)

    def _concatenated(self, nodes: tuple[Node, ...], names: tuple[str, ...], prefix: str) -> Node:
        key = self._key({"concatenated": [node.key for node in nodes], "names": names})
        return Node(key, f"{prefix}all sources", "concatenate", nodes, names)

    def _source(self, source: DataSource, around: Templates, prefix: str) -> Node:
        templates, name = _templates(source, around), source_name(source)
        if source.sources is not None:
            return self.group(source.sources, source.steps, templates, f"{prefix}{name}/")
        opened = open_source(source)
        settings = source.model_dump(include={"columns", "rows", "carry"})
        decided_by = {**opened.identity, **settings, "name": name, "templates": templates.model_dump()}
        key = self._key({"read": decided_by, "group": [GROUP_ROWS, GROUP_CHARACTERS]})
        node = Node(key, f"{prefix}{name}: read", "read", templates=templates, source=source, opened=opened)
        self._check_names(source.steps, set(source.carry), [name])
        first = step_class(source.steps[0].name) if source.steps else None
        if source.rows == "conversations" and not (first is not None and first.measures):
            key = self._key({"measure": 1, "input": node.key, "tokenizer": self.tokenizer_hash})
            node = Node(key, f"{prefix}{name}: {MEASURE}", MEASURE, (node,), templates=templates)
        return self._steps(node, source.steps, templates, f"{prefix}{name}: ")

    def _steps(self, node: Node, steps: list[StepEntry], templates: Templates, prefix: str) -> Node:
        for entry in steps:
            kind, config = step_class(entry.name), entry.config
            decided_by = {
                "step": entry.name,
                "version": kind.version,
                "config": kind.settings(config),
                "identity": kind.identity(config),
                "templates": templates.model_dump() if kind.measures else None,
                "tokenizer": self.tokenizer_hash if kind.uses_tokenizer or kind.measures else None,
                "seed": self.seed,
                "input": node.key,
            }
            key, title = self._key(decided_by), f"{prefix}{entry.name}"
            node = Node(key, title, entry.name, (node,), config=config, templates=templates)
        return node

    @staticmethod
    def _key(decided_by: dict[str, Any]) -> str:
        return sha256_json({"format": FORMAT_VERSION, **decided_by})[:32]

    @staticmethod
    def _check_names(steps: list[StepEntry], carried: set[str], names: list[str]) -> None:
        for entry in steps:
            unknown = sorted(step_class(entry.name).sources(entry.config) - set(names))
            if unknown:
                hint = nearest(unknown[0], names) or f"; the sources here: {', '.join(names)}"
                raise UsageError(f"the step {entry.name} speaks of a source {unknown[0]!r} that it doesn't get{hint}")
            missing = sorted(step_class(entry.name).carried(entry.config) - carried)
            if missing:
                raise UsageError(
                    f"the step {entry.name} uses the column {missing[0]!r}, which {' and '.join(names)} "
                    f"must name under `carry`, so that it is read"
                )


def _carried(source: DataSource) -> set[str]:
    """Columns that every row of a source carries."""
    if source.sources is not None:
        return set.intersection(*(_carried(inner) for inner in source.sources))
    return set(source.carry)


def _refuse_twice(root: Node) -> None:
    """A source counts once; to take its rows more often is what `mix` is for."""
    keys = Counter(leaf.key for leaf in root.leaves)
    for leaf in root.leaves:
        if keys[leaf.key] > 1:
            name, times = leaf.title.removesuffix(": read"), keys[leaf.key]
            raise UsageError(
                f"{name} is named as a source {times} times with the same settings; name it once, and use `mix` with "
                "max_repeats to take its rows more often"
            )


def _refuse_unanswered(sources: list[DataSource], steps: list[StepEntry]) -> None:
    answering = {"explode_rollouts", "generate"}
    for source in sources:
        if any(entry.name in answering for entry in (*source.steps, *steps)):
            continue
        if source.sources is not None:
            _refuse_unanswered(source.sources, [*source.steps, *steps])
        elif source.rows == "problems":
            raise UsageError(
                f"the source {source_name(source)} has problems without answers, and no step gives them one: add "
                f"{' or '.join(sorted(answering))}"
            )
