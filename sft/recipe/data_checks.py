"""What is wrong with stages' data sections, suites and results, as far as the recipe alone tells it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft.recipe.outcome_keys import outcome_problems
from sft.recipe.problems import KeyProblem, nearest
from sft.recipe.schema import TRAIN_COLUMNS, DataSection, DataSource, Recipe, Templates
from sft.recipe.source_names import source_name, source_names
from sft.recipe.steps import StepEntry
from sft.recipe.steps.settings import Loc, StepSettings
from sft.recipe.values import HUB_ID

PLACEHOLDER = re.compile(r"(?<![\\\w$])\{(\w+)\}")
"""`{name}`, but for TeX's \\boxed{name}."""


def recipe_problems(recipe: Recipe) -> list[KeyProblem]:
    """What is wrong in any stage, by its place in the recipe."""
    problems, target = [], recipe.push.repo_id
    if target is not None and not re.fullmatch(HUB_ID, target):
        reason = f"is no Hub id, got {target!r}: my-name/my-model"
        problems.append(KeyProblem(("push", "repo_id"), reason, target))
    for index, stage in enumerate(recipe.stages):
        inside = [_within(("data",), data_problems(stage.data)), outcome_problems(stage)]
        for number, suite in enumerate(stage.evaluate.suites):
            loc = ("evaluate", "suites", number, "prompt_template")
            if suite.prompt_template is not None and "{prompt}" not in suite.prompt_template:
                inside.append([KeyProblem(loc, "must contain {prompt}, the place where the problem goes", None)])
        if stage.train.distill is not None and not _has_teacher(stage.data.sources, stage.data.steps):
            reason = "no step gives rows what a teacher finds likely: add top_logprobs, or generate with top_logprobs"
            inside.append([KeyProblem(("train", "distill"), reason, None)])
        problems += [found for group in inside for found in _within(("stages", index), group)]
    return problems


def data_problems(data: DataSection) -> list[KeyProblem]:
    """What is wrong with a data section, by its place in it."""
    check = _Check([], [])
    check.templates(data, ())
    held = data.validation.sources if data.validation else None
    for rows in [*check.group(data.sources, data.steps, ()), *check.group(held or [], [], ("validation",))]:
        if not rows.answered:
            reason = (
                f"the source {rows.name} has problems without answers, and no step gives them one: add "
                "explode_rollouts or generate"
            )
            check.problems.append(KeyProblem((*rows.loc, "rows"), reason, "problems"))
    return [*check.problems, *check.too_early()]


def _has_teacher(sources: Sequence[DataSource], steps: Sequence[StepEntry]) -> bool:
    """Whether rows of some source may come with a teacher's likeliest tokens."""
    own = (entry.name == "top_logprobs" or "generate.top_logprobs" in entry.config.notes() for entry in steps)
    return any(own) or any(_has_teacher(source.sources or [], source.steps) for source in sources)


def _within(loc: Loc, problems: Iterable[KeyProblem]) -> list[KeyProblem]:
    return [found._replace(loc=(*loc, *found.loc)) for found in problems]


@dataclass
class _Rows:
    """The rows of one source on their way: what they are called now, whether they have answers, the steps behind."""

    source: DataSource
    loc: Loc
    name: str
    answered: bool
    steps: list[str]


@dataclass
class _Check:
    """A walk over a section that gathers its problems, and the steps that come before the answers that they need."""

    problems: list[KeyProblem]
    early: list[tuple[Loc, str, list[_Rows]]]

    def too_early(self) -> Iterator[KeyProblem]:
        """Steps whose rows get their answers later. Rows that never get one are told as such, once."""
        for loc, step, rows in self.early:
            if late := _named(one for one in rows if one.answered):
                reason = f"the step {step} needs answers, and the rows of {late} have none yet: put it behind "
                yield KeyProblem(loc, f"{reason}explode_rollouts or generate", None)

    def templates(self, section: Templates, loc: Loc, columns: Mapping[Any, str | None] | None = None) -> None:
        """`columns`: as a source has them."""
        for key, place in (("prompt_template", "{prompt}"), ("completion_template", "{completion}")):
            template = getattr(section, key)
            if template is not None and place not in template:
                self._tell((*loc, key), f"must contain {place}, the place where the row's text goes")
            others = {found for found in PLACEHOLDER.findall(template or "") if f"{{{found}}}" != place}
            for other in sorted(others & {*TRAIN_COLUMNS, *filter(None, (columns or {}).values())}):
                reason = (
                    f"{{{other}}} isn't filled in, {place} alone is: it would be trained as it stands; `columns` says "
                    "which column is what, reasoning, too"
                )
                self._tell((*loc, key), reason)

    def group(self, sources: Sequence[DataSource], steps: list[StepEntry], loc: Loc) -> list[_Rows]:
        """Sources, and the steps that all of them go through; their rows behind these."""
        names, gathered = source_names(sources), []
        self._names(sources, names, loc)
        for index, (source, name) in enumerate(zip(sources, names, strict=True)):
            here = (*loc, "sources", index)
            self.templates(source, here, source.columns)
            if source.sources is not None:
                found = self.group(source.sources, source.steps, here)
            else:
                self._columns(source, here)
                found = [_Rows(source, here, name, source.rows == "conversations", [])]
                self._steps(found, source.steps, here, [name])
            for rows in found:
                rows.name = name
            gathered += found
        self._steps(gathered, steps, loc, names)
        return gathered

    def _names(self, sources: Sequence[DataSource], names: list[str], loc: Loc) -> None:
        for index, (source, name) in enumerate(zip(sources, names, strict=True)):
            here = (*loc, "sources", index)
            if source in sources[:index]:
                # A source counts once; to take its rows more often is what `mix` is for.
                reason = (
                    f"{source_name(source)} is named as a source {sources.count(source)} times with the same settings; "
                    "name it once, and use `mix` with max_repeats to take its rows more often"
                )
                if source not in sources[index + 1 :]:
                    self._tell(here, reason)
            elif name in names[:index]:
                self._tell((*here, "name"), f"Two sources are called {name}: give each a `name` of its own.")

    def _columns(self, source: DataSource, loc: Loc) -> None:
        given = set(source.columns or {})
        if "messages" in given and {"prompt", "input", "history", "completion"} & given:
            reason = "maps both messages and prompt/completion; a row can be only one of them"
        elif source.rows == "problems" and {"messages", "completion"} & given:
            reason = "`rows: problems` takes the column of the prompt alone, not those of an answer"
        elif "reasoning" in given and "completion" not in given:
            reason = "`reasoning` stands in front of a completion's column: name that too"
        else:
            return
        self._tell((*loc, "columns"), reason)

    def _steps(self, rows: list[_Rows], steps: list[StepEntry], loc: Loc, names: list[str]) -> None:
        for index, entry in enumerate(steps):
            here = (*loc, "steps", index, entry.name)
            for inside, reason in _step_problems(entry, rows, names):
                self._tell((*here, *inside), reason)
            unanswered = [one for one in rows if not one.answered]
            if unanswered and entry.config.needs_answers():
                self.early.append((here, entry.name, unanswered))
            for one in rows:
                one.steps += [entry.name, *entry.config.notes()]
                one.answered = one.answered or entry.config.gives_answers

    def _tell(self, loc: Loc, reason: str) -> None:
        self.problems.append(KeyProblem(loc, reason, None))


def _step_problems(entry: StepEntry, rows: list[_Rows], names: list[str]) -> Iterator[tuple[Loc, str]]:
    """What is wrong with a step that gets these rows, by its place in the step's settings."""
    config = entry.config
    unknown = {loc: source for loc, source in config.sources().items() if source not in names}
    for loc, source in unknown.items():
        hint = nearest(source, names) or f"; the sources here: {', '.join(names)}"
        yield loc, f"the step {entry.name} speaks of a source {source!r} that it doesn't get{hint}"
    unnamed = [name for name in names if config.names_all and name not in config.sources().values()]
    if unnamed and not unknown:
        yield (), f"no weight for the source {', '.join(unnamed)}: give every source one (0 drops it)"
    yield from _column_problems(entry.name, config, rows)
    yield from _order_problems(entry.name, config, rows)


def _column_problems(step: str, config: StepSettings, rows: list[_Rows]) -> Iterator[tuple[Loc, str]]:
    for loc, column in config.columns().items():
        without = _named(one for one in rows if column not in one.source.carry)
        if without:
            reason = f"the step {step} uses the column {column!r}, which {without} must name under `carry`, so that "
            yield loc, f"{reason}it is read"
    for loc, role in config.roles().items():
        without = _named(one for one in rows if role not in (one.source.columns or {}))
        if without:
            reason = f"the step {step} needs the {role} of each row, and would drop all of {without}: say under "
            yield loc, f"{reason}`columns` which column is the {role}"


def _order_problems(step: str, config: StepSettings, rows: list[_Rows]) -> Iterator[tuple[Loc, str]]:
    for loc, wanted in config.behind().items():
        if not any(set(wanted) & set(one.steps) for one in rows):
            yield loc, f"needs what {' or '.join(wanted)} notes, and no such step comes before {step}"
    early = [name for name in config.not_behind if any(name in one.steps for one in rows)]
    if early:
        yield (), f"the step {step} goes by the ids of the source, and {early[0]} has changed them: put it before"


def _named(rows: Iterable[_Rows]) -> str:
    return " and ".join(dict.fromkeys(one.name for one in rows))
