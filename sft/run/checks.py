"""All that can be known before anything is read or loaded: whether a recipe, on this machine, could do what it says.

What is found is told in one go, each at the line of the recipe where it stands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.read import local
from sft.recipe.data_checks import recipe_problems
from sft.recipe.paths import RunPaths
from sft.recipe.problems import KeyProblem, refuse
from sft.tokenizers.load import TINY_TOKENIZER, UnreachableError, check_named, start_tokenizer
from sft.utils.errors import UserError
from sft.utils.files import unwritable
from sft.utils.hub_cache import cannot_fetch
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.schema import DataSource, Recipe, Source, Stage
    from sft.recipe.steps import StepEntry
    from sft.recipe.steps.settings import DataSet, Loc

ALL = ("data", "training", "suites")


def check_recipe(
    recipe: Recipe, parts: Sequence[str] = ALL, *, stage: str | None = None, rehearsal: bool = False
) -> None:
    """Raise UsageError with a line for all that is wrong.

    Args:
        parts: what of it will be done: `data` is read, `training` and `suites`; the recipe itself is always checked.
        stage: the only one whose files will be read.
        rehearsal: nothing will be done here and now, so a Hub that can't be reached is no obstacle: a line says so.
    """
    paths, problems = RunPaths(recipe), [*recipe_problems(recipe), *_folders(recipe, parts)]
    if "data" in parts or "training" in parts:
        problems += list(_start(recipe, loaded="training" in parts))
    if "training" in parts:
        problems += list(_four_bit(recipe))
    for index, one_stage in enumerate(recipe.stages):
        found: list[KeyProblem] = []
        if "data" in parts and stage in (None, one_stage.name):
            made = {paths.final_dir(before.name).absolute() for before in recipe.stages[:index]}
            found += _sources(one_stage.data.sources, one_stage.data.steps, ("data",), made)
            held = one_stage.data.validation
            found += _sources((held and held.sources) or [], [], ("data", "validation"), made)
        asked = "suites" in parts or ("training" in parts and one_stage.keep_best is not None)
        if asked and stage in (None, one_stage.name):
            for number, suite in enumerate(one_stage.evaluate.suites):
                found += _files(suite.source, ("evaluate", "suites", number, "source"))
        if "training" in parts:
            found += _training(one_stage)
        problems += [one._replace(loc=("stages", index, *one.loc)) for one in found]
    unasked = [found for found in problems if isinstance(found.value, UnreachableError)] if rehearsal else []
    for one in unasked:
        say(f"{recipe.place(one.loc)}: not checked: {one.message}")
    refuse((found for found in problems if found not in unasked), recipe.place)
    if "training" in parts:
        from sft.models.lora_targets import adapter_problems

        if not any(found.loc == ("model", "model_name_or_path") for found in unasked):
            refuse(adapter_problems(recipe), recipe.place)


def _folders(recipe: Recipe, parts: Sequence[str]) -> Iterator[KeyProblem]:
    """Folders that can't be written to. Prepared data may lie in one, if all of it is there."""
    for key in ("output_dir", "prepared_dir"):
        name = getattr(recipe, key)
        there = next((at for at in (Path(name), *Path(name).parents) if os.path.lexists(at)), None) if name else None
        if there is not None and not there.is_dir():
            yield KeyProblem((key,), f"{there} is no folder: set another one", name)
        elif key == "output_dir" and {"training", "suites"} & set(parts) and (why := unwritable(recipe.output_dir)):
            yield KeyProblem((key,), f"can't be written to ({why}): set another one", name)


def _start(recipe: Recipe, *, loaded: bool) -> Iterator[KeyProblem]:
    """What is wrong with the model that the run starts from, which rows alone don't need `loaded`, or else with its
    tokenizer."""
    section, key = recipe.model, "model_name_or_path"
    try:
        if section.model_name_or_path is not None and not loaded:
            check_named(section.model_name_or_path, "model", section.model_revision, hub=section.tokenizer is None)
        elif section.model_name_or_path is not None:
            from sft.models.identity import check_there

            check_there(section.model_name_or_path, section.model_revision)
        key = "tokenizer" if section.tokenizer else key
        name = section.tokenizer or str(section.model_name_or_path)
        if name != TINY_TOKENIZER and not Path(name).exists():
            # A Hub id's is asked for, not fetched: that is for the run itself.
            check_named(name, "tokenizer", None if section.tokenizer else section.model_revision)
            return
        tokenizer = start_tokenizer(section)
        if section.config is not None and loaded:
            from sft.models.load import scratch_config

            key = "config"
            scratch_config(section, tokenizer)
    except UserError as error:
        yield KeyProblem(("model", key), str(error).removeprefix("model.config: "), error)


def _four_bit(recipe: Recipe) -> Iterator[KeyProblem]:
    from sft.models.four_bit import four_bit_problem

    if recipe.model.load_in_4bit and (why := four_bit_problem()):
        yield KeyProblem(("model", "load_in_4bit"), why, True)


def _training(stage: Stage) -> Iterator[KeyProblem]:
    from sft.train.arguments import argument_problems

    for found in argument_problems(stage):
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


def _steps(steps: Sequence[StepEntry], loc: Loc, made: set[Path]) -> Iterator[KeyProblem]:
    for index, entry in enumerate(steps):
        for inside, place in entry.config.places().items():
            if not (isinstance(place, str) and Path(place).expanduser().absolute() in made):
                yield from _place(place, (*loc, "steps", index, entry.name, *inside))


def _place(place: DataSet | str, loc: Loc) -> Iterator[KeyProblem]:
    try:
        if isinstance(place, str):
            check_named(place, "model or tokenizer")
        else:
            _find(place.path, place.split, None, place.config)
    except UserError as error:
        yield KeyProblem(loc, str(error), error)


def _files(source: Source, loc: Loc) -> Iterator[KeyProblem]:
    if source.path is not None:
        try:
            _find(source.path, source.split, source.data_files, source.config)
        except UserError as error:
            yield KeyProblem((*loc, "path"), str(error), source.path)


def _find(path: str, split: str, data_files: Any, config: str | None) -> None:
    """Raise UserError for local files that aren't there, and for a data set that couldn't be kept here; whether the Hub
    has it is found when it is read."""
    from huggingface_hub import constants

    if local.looks_local(path):
        local.find_files(path, split, data_files, config)
        return
    check_named(path, "data set", hub=False)
    known = Path(constants.HF_HOME) / "datasets" / path.replace("/", "___").lower()
    if not known.exists() and (why := cannot_fetch("data set", path, dataset=True)):
        raise UserError(why)
