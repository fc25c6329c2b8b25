"""A section of a recipe as chains of nodes: a source, steps, and at the end the documents that are trained on.

Each node's key is the hash of all that decides its rows: its settings and version, and the keys of what it reads. So a
changed step makes new keys for itself and for all that come after it, and what comes before is only looked up. A stage
without steps is a plan of none: its sources are read, tokenised and fitted like any other's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.data.engine.shards import GROUP_CHARACTERS, GROUP_ROWS
from sft.data.read.records import Reading, how_to_read, weights_column
from sft.data.read.sources import OpenSource, open_source
from sft.data.steps import FIT, HOLD_OUT, TOKENIZE, TableStep, step_class
from sft.data.steps.fit import FitSettings
from sft.data.steps.hold_out import OWN_SOURCE, HoldOutSettings, Part
from sft.data.steps.tokenize import TokenizeSettings, most_tokens
from sft.recipe.data_checks import data_problems
from sft.recipe.problems import refuse
from sft.recipe.schema import DataSection, DataSource, Templates
from sft.recipe.source_names import source_names
from sft.recipe.steps import StepEntry
from sft.utils.files import sha256_json

FORMAT_VERSION = 6  # raised when the same inputs would be stored as other bytes
READ = "read"


@dataclass(frozen=True)
class Node:
    """One step for the rows of some sources.

    Attributes:
        key: hash of all that decides the rows.
        line: key of its line in the funnel, which the same step of a group's other sources shares.
        title: for people, such as `openr1: verify`.
        step: name of the step; or "read" (a source), "tokenize", "fit" (what may be trained on).
        inputs: the nodes that it reads, in order; several where it has to see the rows of all sources together.
        rename: for each input, what its rows' source is called from here on (None: as they say).
        config: settings of the step.
        opened, reading: for "read", the source and how its rows become records.
    """

    key: str
    line: str
    title: str
    step: str
    inputs: tuple[Node, ...] = ()
    rename: tuple[str | None, ...] = ()
    config: Any = None
    templates: Templates = field(default_factory=Templates)
    opened: OpenSource | None = None
    reading: Reading | None = None

    def walk(self) -> Iterator[Node]:
        """All nodes below and this one, in the order in which they run."""
        for node in self.inputs:
            yield from node.walk()
        yield self


@dataclass(frozen=True)
class _Chain:
    """The rows of one or more sources on their way: after `node`, called `name`; and what is known of them."""

    node: Node
    name: str | None = None
    tokenized: bool = False


def make_plan(
    data: DataSection,
    tokenizer_hash: str,
    max_length: int | None,
    part: Part = "training",
    weights: str | None = None,
) -> list[Node]:
    """The chains of a section: the last node of each makes documents, in the order in which they are trained on.

    `part`: those of what is trained, or, where the section says so, of what is held out. `weights`: the column with
    the weights of the rows' loss. Opens every source. Raises
    UsageError for what the section itself tells to be wrong (sft.recipe.data_checks), and UserError when a source isn't
    there.
    """
    refuse(data_problems(data))
    held = data.validation
    sources = [*data.sources, *((held and held.sources) or ())]
    opened = {id(source): open_source(source) for source in _leaves(sources)}
    files = Counter(name for found in opened.values() for name in set(found.files))
    clashing = frozenset(name for name, count in files.items() if count > 1)
    settings = TokenizeSettings(data.mask_history, most_tokens(max_length), weights)
    planner = _Planner(tokenizer_hash, data.seed, settings, opened, clashing)
    templates = _templates(data, Templates())
    chains = planner.with_tokens(planner.group(data.sources, data.steps, templates, ""), "")
    if held is not None:
        own = planner.with_tokens(planner.group(held.sources or [], [], templates, OWN_SOURCE), OWN_SOURCE)
        chains += [_Chain(chain.node, OWN_SOURCE, chain.tokenized) for chain in own]
        limit = max_length if data.over_length == "drop" else None
        chains = planner.stepped(chains, HOLD_OUT, HoldOutSettings(held.size, part, limit), Templates(), HOLD_OUT)
    fit = FitSettings(max_length, data.over_length)
    return [chain.node for chain in planner.stepped(chains, FIT, fit, Templates(), FIT)]


def _leaves(sources: list[DataSource]) -> Iterator[DataSource]:
    for source in sources:
        if source.sources is None:
            yield source
        else:
            yield from _leaves(source.sources)


def every_node(ends: Sequence[Node]) -> list[Node]:
    """The nodes of all chains, each once, in the order in which they run."""
    return list({node.key: node for end in ends for node in end.walk()}.values())


def _templates(section: Templates, around: Templates) -> Templates:
    """The section's own templates, else those of the section around it."""
    names = Templates.model_fields
    return Templates(**{name: getattr(section, name) or getattr(around, name) for name in names})


@dataclass(frozen=True)
class _Planner:
    tokenizer_hash: str
    seed: int
    tokenize: TokenizeSettings
    opened: dict[int, OpenSource]
    clashing: frozenset[str]
    """Names of files that several sources have: places of their rows, and ids made of them, begin with the source's."""

    def group(
        self, sources: list[DataSource], steps: list[StepEntry], templates: Templates, prefix: str
    ) -> list[_Chain]:
        """Sources, and the steps that all of them go through."""
        names = source_names(sources)
        chains: list[_Chain] = []
        for source, name in zip(sources, names, strict=True):
            found = self._source(source, name, templates, prefix)
            chains += [_Chain(chain.node, name, chain.tokenized) for chain in found]
        return self._steps(chains, steps, templates, prefix)

    def _source(self, source: DataSource, name: str, around: Templates, prefix: str) -> list[_Chain]:
        templates = _templates(source, around)
        if source.sources is not None:
            return self.group(source.sources, source.steps, templates, f"{prefix}{name}/")
        opened = self.opened[id(source)]
        source = self._carrying_weights(source, opened)
        before = f"{prefix}{name}/" if self.clashing & set(opened.files) else ""
        settings = source.model_dump(include={"columns", "rows", "carry"})
        decided_by = {
            **opened.identity,
            **settings,
            "name": name,
            "before": before,
            "templates": templates.model_dump(),
        }
        key = self._key({"read": decided_by, "group": [GROUP_ROWS, GROUP_CHARACTERS]})
        reading = how_to_read(opened, source, templates, name, before)
        node = Node(key, key, f"{prefix}{name}: {READ}", READ, opened=opened, reading=reading)
        return self._steps([_Chain(node)], source.steps, templates, f"{prefix}{name}: ")

    def _carrying_weights(self, source: DataSource, opened: OpenSource) -> DataSource:
        """The source, which carries the column with the weights of the stage's loss along."""
        column = weights_column(opened.columns(), opened.name, self.tokenize.weights)
        if column is None or column in source.carry:
            return source
        return source.model_copy(update={"carry": [*source.carry, column]})

    def _steps(self, chains: list[_Chain], steps: list[StepEntry], templates: Templates, prefix: str) -> list[_Chain]:
        for entry in steps:
            kind = step_class(entry.name)
            if kind.reads_tokens:
                chains = self.with_tokens(chains, prefix)
            chains = self.stepped(chains, entry.name, entry.config, templates, f"{prefix}{entry.name}")
        return chains

    def with_tokens(self, chains: list[_Chain], prefix: str) -> list[_Chain]:
        """The chains, each with its conversations tokenised."""
        bare = [chain for chain in chains if not chain.tokenized]
        made = iter(self.stepped(bare, TOKENIZE, self.tokenize, Templates(), f"{prefix}{TOKENIZE}"))
        return [chain if chain.tokenized else next(made) for chain in chains]

    def stepped(self, chains: list[_Chain], name: str, config: Any, templates: Templates, title: str) -> list[_Chain]:
        """A step behind the chains: behind each of its own, or, where it needs the rows of all together, behind all."""
        kind = step_class(name)
        together = issubclass(kind, TableStep) or not kind.parallel(config)
        groups = [chains] if together else [[chain] for chain in chains]
        decided_by = {
            "step": name,
            "version": kind.version,
            "config": kind.settings(config),
            "identity": kind.identity(config),
            "templates": templates.model_dump() if kind.changes_text else None,
            "tokenizer": self.tokenizer_hash if kind.uses_tokenizer else None,
            "seed": self.seed,
        }
        line = self._key({**decided_by, "inputs": [[chain.node.key, chain.name] for chain in chains]})
        made = []
        for group in groups:
            inputs = [[chain.node.key, chain.name] for chain in group]
            nodes, names = tuple(chain.node for chain in group), tuple(chain.name for chain in group)
            key = self._key({**decided_by, "inputs": inputs, "together": together})
            node = Node(key, line, title, name, nodes, names, config, templates)
            tokenized = name == TOKENIZE or (not kind.changes_text and all(chain.tokenized for chain in group))
            made.append(_Chain(node, None, tokenized))
        return made

    @staticmethod
    def _key(decided_by: dict[str, Any]) -> str:
        return sha256_json({"format": FORMAT_VERSION, **decided_by})[:32]
