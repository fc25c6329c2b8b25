"""What is known before data is prepared or a model loaded: whether a recipe, on this machine, could do what it says.

What is found is told in one go, each at the line of the recipe where it stands.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sft.data.read import local
from sft.data.read.records import columns_taken, weights_column
from sft.recipe.asked import asked_as
from sft.recipe.data_checks import recipe_problems
from sft.recipe.paths import RunPaths
from sft.recipe.problems import KeyProblem, refuse
from sft.recipe.schema import Source
from sft.recipe.yaml_marks import Path as Place
from sft.recipe.yaml_marks import show_path
from sft.run.suite_checks import SuiteReader, suite_problems
from sft.tokenizers.control import template_of
from sft.tokenizers.load import TINY_TOKENIZER, check_named, names_folder, start_tokenizer
from sft.utils.errors import UserError
from sft.utils.files import unwritable
from sft.utils.hub_ask import UnreachableError, answers
from sft.utils.hub_cache import is_cached, lacks_template
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.schema import DataSource, EvaluateSection, ModelSection, Recipe, Stage, SuiteSection
    from sft.recipe.steps import StepEntry
    from sft.recipe.steps.settings import DataSet, Loc

ALL = ("data", "training", "suites")
REHEARSAL_SECONDS, RUN_SECONDS = 5.0, 30.0
"""How long the Hub may take for all that it is asked."""


class _Named(NamedTuple):
    """What is left to be asked of the Hub: whether it has a model, tokenizer or data set of this name."""

    what: str
    name: str
    revision: str | None = None

    def ask(self) -> None:
        check_named(self.name, self.what, self.revision, dataset=self.what == "data set")


class _Unknown(NamedTuple):
    """What can't be known before a tokenizer is fetched; the run itself will tell."""

    what: str


def check_recipe(
    recipe: Recipe,
    parts: Sequence[str] = ALL,
    *,
    stage: str | None = None,
    rehearsal: bool = False,
    ask: bool = True,
    processes: int | None = None,
) -> None:
    """Raise UsageError with a line for all that is wrong. The Hub is asked where nothing here is.

    Args:
        parts: what of it will be done: `data` is read, `training` and `suites`; the recipe itself is always checked.
        stage: the only one whose files will be read.
        rehearsal: nothing will be done here and now, so a Hub that can't be reached is no obstacle: a line says so.
        ask: False: the Hub isn't asked at all.
        processes: that will train; default: those there are.
    """
    problems = [*recipe_problems(recipe), *_problems(recipe, parts, stage, processes)]
    unasked = _settled(problems, recipe.place, rehearsal, ask)
    if not ask:
        return
    if "training" in parts and not any(found.loc == ("model", "model_name_or_path") for found in unasked):
        from sft.models.lora_targets import adapter_problems
        from sft.models.own_loss import loss_problems
        from sft.models.row_shares import sharing_problems
        from sft.train.optimizer import group_problems

        # A rehearsal doesn't wait for a Hub where what it needs is here.
        name, revision = recipe.model.model_name_or_path, recipe.model.model_revision
        here = rehearsal and name is not None and is_cached(name, revision)
        finders = (adapter_problems, group_problems, loss_problems, sharing_problems)
        found_in_model = (find(recipe, fetch=not here) for find in finders)
        refuse(itertools.chain.from_iterable(found_in_model), recipe.place)


def check_suites(section: EvaluateSection, *, rehearsal: bool = False) -> None:
    """Raise UsageError with a line for each suite whose files or data set aren't there, or whose problems are and can't
    be asked; `rehearsal` as above."""
    reader = SuiteReader()
    problems = [
        found._replace(loc=(suite.name, *found.loc)) for suite in section.suites for found in _suite(suite, reader)
    ]
    _settled(problems, lambda path: f"suite {show_path(path)}", rehearsal, ask=True)


def _settled(
    problems: Sequence[KeyProblem], place: Callable[[Place], object], rehearsal: bool, ask: bool
) -> list[KeyProblem]:
    """Refuse what is wrong, with what the Hub says; those of a rehearsal that couldn't be asked, which a line tells."""
    unknown = [found for found in problems if isinstance(found.value, _Named | _Unknown)]
    refuse((found for found in problems if found not in unknown), place)
    if not ask:
        return []
    found_out = _answered(unknown, REHEARSAL_SECONDS if rehearsal else RUN_SECONDS)
    unasked = [found for found in found_out if isinstance(found.value, UnreachableError)] if rehearsal else []
    open_ones = [*(found for found in found_out if isinstance(found.value, _Unknown)), *unasked]
    refuse((found for found in found_out if found not in open_ones), place)
    if rehearsal:
        told: dict[str, Loc] = {}
        for one in {one.loc: one for one in open_ones}.values():
            told.setdefault(one.message, one.loc)  # a name that stages share is told once
        for message, loc in told.items():
            say(f"{place(loc)}: not checked: {message}")
    return unasked


def _problems(recipe: Recipe, parts: Sequence[str], stage: str | None, processes: int | None) -> Iterator[KeyProblem]:
    """What is wrong around the recipe, and what is left to be asked of the Hub."""
    paths, reader = RunPaths(recipe), SuiteReader()
    tokenizer = functools.cache(partial(start_tokenizer, recipe.model, fetch=False))
    yield from _folders(recipe, parts)
    if "data" in parts or "training" in parts:
        yield from _start(recipe, tokenizer, loaded="training" in parts)
    if "training" in parts:
        yield from _four_bit(recipe)
    for index, one_stage in enumerate(recipe.stages):
        found: list[KeyProblem] = []
        if "data" in parts and stage in (None, one_stage.name):
            made = {paths.final_dir(before.name).absolute() for before in recipe.stages[:index]}
            found += _sources(one_stage.data.sources, one_stage.data.steps, ("data",), made)
            held = one_stage.data.validation
            found += _sources((held and held.sources) or [], [], ("data", "validation"), made)
            found += _columns(one_stage.data.sources, ("data",), one_stage.train.loss.weights)
            found += _columns((held and held.sources) or [], ("data", "validation"), None)
        in_training = one_stage.keep_best is not None or one_stage.evaluate.every is not None
        asked = "suites" in parts or ("training" in parts and in_training)
        if asked and stage in (None, one_stage.name):
            found += _suites(one_stage, reader, partial(_if_here, recipe.model, tokenizer))
        if "training" in parts:
            found += _training(one_stage, processes)
        yield from (one._replace(loc=("stages", index, *one.loc)) for one in found)


def _answered(problems: list[KeyProblem], seconds: float) -> list[KeyProblem]:
    """The problems, with the Hub's answers in the place of what was left to be asked; each name is asked for once."""
    names = list(dict.fromkeys(found.value for found in problems if isinstance(found.value, _Named)))
    said = dict(zip(names, answers([(one.what, one.name, one.ask) for one in names], seconds), strict=True))
    told = []
    for found in problems:
        if not isinstance(found.value, _Named):
            told.append(found)
        elif (error := said[found.value]) is not None:
            told.append(found._replace(message=str(error), value=error))
    return told


def _folders(recipe: Recipe, parts: Sequence[str]) -> Iterator[KeyProblem]:
    """Folders that can't be written to. Prepared data may lie in one, if all of it is there."""
    for key in ("output_dir", "prepared_dir"):
        name = getattr(recipe, key)
        there = next((at for at in (Path(name), *Path(name).parents) if os.path.lexists(at)), None) if name else None
        if there is not None and not there.is_dir():
            yield KeyProblem((key,), f"{there} is no folder: set another one", name)
        elif key == "output_dir" and {"training", "suites"} & set(parts) and (why := unwritable(recipe.output_dir)):
            yield KeyProblem((key,), f"can't be written to ({why}): set another one", name)


def _start(recipe: Recipe, tokenizer: Callable[[], Any], *, loaded: bool) -> Iterator[KeyProblem]:
    """What is wrong with the model that the run starts from, which rows alone don't need `loaded`, or else with its
    `tokenizer`."""
    wrong = list(_start_model(recipe.model, loaded=loaded))
    yield from wrong
    if recipe.model.tokenizer or not any(isinstance(found.value, UserError) for found in wrong):
        yield from _start_tokenizer(recipe.model, tokenizer, loaded=loaded)


def _start_model(section: ModelSection, *, loaded: bool) -> Iterator[KeyProblem]:
    name, revision, loc = section.model_name_or_path, section.model_revision, ("model", "model_name_or_path")
    if name is None:
        return
    if Path(name).is_dir() and loaded:
        from sft.models.identity import check_there

        yield from _told(loc, partial(check_there, name, revision))
    elif loaded or section.tokenizer is None:
        yield from _named("model", name, loc, revision)
    else:
        yield from _told(loc, partial(check_named, name, "model", hub=False))


def _told(loc: Loc, look: Callable[[], Any]) -> Iterator[KeyProblem]:
    try:
        look()
    except UserError as error:
        yield KeyProblem(loc, str(error).removeprefix("model.config: "), error)


def _named(what: str, name: str, loc: Loc, revision: str | None = None) -> Iterator[KeyProblem]:
    """What is wrong with a name, or that it is left to be asked for."""
    try:
        check_named(name, what, revision, hub=False)
    except UserError as error:
        yield KeyProblem(loc, str(error), error)
    else:
        if not Path(name).expanduser().exists():
            yield KeyProblem(loc, "", _Named(what, name, revision))


def _start_tokenizer(section: ModelSection, load: Callable[[], Any], *, loaded: bool) -> Iterator[KeyProblem]:
    """What is wrong with the tokenizer, its chat template, and the configuration of a model made for it. One that would
    have to be fetched is for the run itself to look into."""
    key, (name, revision) = "tokenizer" if section.tokenizer else "model_name_or_path", _tokenizer_of(section)
    here = _is_built_in_or_folder(name)
    if not here and section.tokenizer:
        yield from _named("tokenizer", name, ("model", key))
    if not _is_here(name, revision):
        if section.chat_template is None and not names_folder(name):
            what = f"whether the tokenizer {name} has a chat template that can be trained with; it isn't here yet"
            yield KeyProblem(("model", key), what, _Unknown(what))
        return
    try:
        tokenizer = load()
    except UserError as error:
        if here:
            yield KeyProblem(("model", key), str(error), error)
        return
    if here or template_of(tokenizer) is not None or lacks_template(name, revision):
        from sft.data.tokenize.render import Renderer

        yield from _told(("model", key), partial(Renderer, tokenizer))
    if section.config is not None and loaded:
        from sft.models.load import scratch_config

        yield from _told(("model", "config"), partial(scratch_config, section, tokenizer))


def _tokenizer_of(section: ModelSection) -> tuple[str, str | None]:
    """The name, and the revision, of the tokenizer that a run starts with."""
    return (section.tokenizer, None) if section.tokenizer else (str(section.model_name_or_path), section.model_revision)


def _is_built_in_or_folder(tokenizer: str) -> bool:
    return tokenizer == TINY_TOKENIZER or Path(tokenizer).exists()


def _is_here(tokenizer: str, revision: str | None) -> bool:
    """Whether a tokenizer can be loaded without being fetched."""
    return _is_built_in_or_folder(tokenizer) or (not names_folder(tokenizer) and is_cached(tokenizer, revision))


def _if_here(section: ModelSection, load: Callable[[], Any]) -> Any | None:
    """The tokenizer that a run starts with, as far as nothing has to be fetched for it; what is wrong with it is told
    as such."""
    if not _is_here(*_tokenizer_of(section)):
        return None
    try:
        return load()
    except UserError:
        return None


def _suites(stage: Stage, reader: SuiteReader, tokenizer: Callable[[], Any]) -> Iterator[KeyProblem]:
    """What is wrong with a stage's suites."""
    for number, suite in enumerate(stage.evaluate.suites):
        for found in _suite(suite, reader, tokenizer, stage):
            yield found._replace(loc=("evaluate", "suites", number, *found.loc))


def _suite(
    suite: SuiteSection, reader: SuiteReader, tokenizer: Callable[[], Any] | None = None, stage: Stage | None = None
) -> Iterator[KeyProblem]:
    """A suite's files that aren't there, or else its problems that couldn't be asked: as `stage` asks, by what starts
    with `tokenizer`."""
    wrong = list(_files(suite.source, ("source",)))
    yield from wrong
    if not wrong:
        defaults = None if stage is None else asked_as(stage.data)
        yield from suite_problems(suite, reader, tokenizer and tokenizer(), defaults)


def _four_bit(recipe: Recipe) -> Iterator[KeyProblem]:
    from sft.models.four_bit import four_bit_problem

    if recipe.model.load_in_4bit and (why := four_bit_problem()):
        yield KeyProblem(("model", "load_in_4bit"), why, True)


def _training(stage: Stage, processes: int | None) -> Iterator[KeyProblem]:
    from sft.train.arguments import argument_problems

    for found in argument_problems(stage, processes):
        yield found._replace(loc=("train", *found.loc))


def _sources(
    sources: Sequence[DataSource], steps: Sequence[StepEntry], loc: Loc, made: set[Path]
) -> Iterator[KeyProblem]:
    """Files, models and tokenizers of sources and steps that aren't there; `made` are the models that stages before
    this one will have made."""
    for index, source in enumerate(sources):
        here = (*loc, "sources", index)
        if source.sources is not None:
            yield from _sources(source.sources, source.steps, here, made)
        else:
            yield from _files(source, here)
            yield from _steps(source.steps, here, made)
    yield from _steps(steps, loc, made)


def _columns(sources: Sequence[DataSource], loc: Loc, weights: str | None) -> Iterator[KeyProblem]:
    """Columns that local files lack, as far as their first rows show; `weights`: the one with the loss's weights."""
    for index, source in enumerate(sources):
        here = (*loc, "sources", index)
        if source.sources is not None:
            yield from _columns(source.sources, here, weights)
        elif source.path is not None and local.looks_local(source.path):
            yield from _wrong_columns(source, here, weights)


def _wrong_columns(source: DataSource, loc: Loc, weights: str | None) -> Iterator[KeyProblem]:
    path = str(source.path)
    try:
        files = local.find_files(path, source.split, source.data_files, source.config)
        names = local.columns_of(files)
    except UserError:
        return  # told as such: of files that aren't there by `_found`, of those that can't be read when they are
    if names is None:
        return
    # A missing column of ids is no error, and its warning is for those who read the rows.
    columns = {role: column for role, column in (source.columns or {}).items() if role != "id"}
    key = "carry" if set(source.carry) - names else "columns" if columns else "path"
    read = source.model_copy(update={"columns": columns or None})
    yield from _told((*loc, key), partial(columns_taken, names, path, read))
    yield from _told((*loc, "path"), partial(weights_column, names, path, weights))


def _steps(steps: Sequence[StepEntry], loc: Loc, made: set[Path]) -> Iterator[KeyProblem]:
    for index, entry in enumerate(steps):
        for inside, place in entry.config.places().items():
            if not (isinstance(place, str) and Path(place).expanduser().absolute() in made):
                yield from _place(place, (*loc, "steps", index, entry.name, *inside))


def _place(place: DataSet | str, loc: Loc) -> Iterator[KeyProblem]:
    if isinstance(place, str):
        yield from _named("model or tokenizer", place, loc)
    else:
        yield from _found(Source(path=place.path, split=place.split, config=place.config), loc)


def _files(source: Source, loc: Loc) -> Iterator[KeyProblem]:
    if source.path is not None:
        yield from _found(source, (*loc, "path"))


def _found(source: Source, loc: Loc) -> Iterator[KeyProblem]:
    """Local files that aren't there; a data set is left to be asked for."""
    path = str(source.path)
    if local.looks_local(path):
        yield from _told(loc, partial(local.find_files, path, source.split, source.data_files, source.config))
    else:
        yield from _named("data set", path, loc, source.revision)
