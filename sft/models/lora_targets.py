"""Whether what a stage names for adapters is there: found out from the model's structure, before weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sft.models.load import LORA_TARGETS, structure
from sft.models.lora import lora_settings
from sft.recipe.problems import KeyProblem, refuse
from sft.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from sft.recipe.schema import Recipe

ADAPTABLE = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "Conv1D", "MultiheadAttention")
"""Classes that peft has adapters for; a SambaY's are those of LORA_TARGETS alone, whose forward is a product."""


def check_adapters(recipe: Recipe) -> None:
    """Raise UsageError for a stage whose adapters name something that the model the run starts from doesn't have."""
    names = [stage.name for stage in recipe.stages]
    refuse(adapter_problems(recipe), lambda loc: f"stages[{names[int(loc[1])]}].train.{loc[-1]}")


def adapter_problems(recipe: Recipe, *, fetch: bool = True) -> Iterator[KeyProblem]:
    """What adapters name that the model the run starts from doesn't have, by its place in the recipe. Without `fetch`
    the Hub isn't asked."""
    # Foreign code isn't run for its structure alone; attach_adapters checks the model itself.
    if recipe.model.trust_remote_code or not any(stage.train.use_peft for stage in recipe.stages):
        return
    section = recipe.model
    model = structure(section.model_name_or_path, section.config, revision=section.model_revision, fetch=fetch)
    for index, stage in enumerate(recipe.stages):
        if stage.train.use_peft:
            try:
                check_targets(model, lora_settings(stage) or {})
            except UsageError as error:
                key, _, reason = str(error).partition(": ")
                loc = ("stages", index, "train", key.removeprefix("train."))
                yield KeyProblem(loc, reason, None)


def check_targets(model: nn.Module, settings: dict[str, Any], where: str = "train") -> None:
    """Raise UsageError unless every entry of `settings` (`lora_settings`) stands for something in `model`.

    `where` is put before the key in the sentence. `model` may be on the meta device.
    """
    names = [name for name, _ in model.named_modules() if name]
    saved = _saved(model, names, settings["modules_to_save"] or [], f"{where}.lora_modules_to_save")
    adaptable = [name for name in _adaptable(model) if not any(_inside(name, other) for other in saved)]
    targets, key = settings["target_modules"], f"{where}.lora_target_modules"
    if isinstance(targets, str) and targets != "all-linear":
        _check_pattern(targets, names, adaptable, key)
        found = [name for name in names if re.fullmatch(targets, name)]
    else:
        entries = targets if isinstance(targets, list) else []
        for entry in entries:
            _check_entry(entry, names, adaptable, key)
        found = [name for name in names if any(_called(name, entry) for entry in entries)]
    _refuse_head(model, found, key)
    parameters = [name for name, _ in model.named_parameters()]
    for entry in settings["target_parameters"] or []:
        if not any(_called(name, entry) for name in parameters):
            there = _listed(name.rpartition(".")[2] for name in parameters)
            raise UsageError(f"{where}.lora_target_parameters: no parameter is called {entry!r}; there are {there}.")


def _called(name: str, entry: str) -> bool:
    """Whether peft takes `name` for what a list's `entry` means."""
    return name == entry or name.endswith(f".{entry}")


def _inside(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted({name for name in names if not name.isdigit()}))


def _adaptable(model: Any) -> list[str]:
    """Names of the modules that can take an adapter. Not the output head: losses read its weights, past an adapter."""
    if getattr(model.config, "model_type", None) == "phi4flash":
        return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in LORA_TARGETS]
    head = model.get_output_embeddings()
    kinds = ((name, type(module).__mro__) for name, module in model.named_modules() if module is not head)
    return [name for name, classes in kinds if any(kind.__name__ in ADAPTABLE for kind in classes)]


def _check_entry(entry: str, names: list[str], adaptable: list[str], key: str) -> None:
    if any(_called(name, entry) for name in adaptable):
        return
    there = f"these can take an adapter: {_listed(name.rpartition('.')[2] for name in adaptable)}."
    if any(_called(name, entry) for name in names):
        raise UsageError(f"{key}: {entry!r} takes no adapter; {there}")
    raise UsageError(f"{key}: no module is called {entry!r}; {there}")


def _check_pattern(pattern: str, names: list[str], adaptable: list[str], key: str) -> None:
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UsageError(f"{key}: {pattern!r} is no regular expression: {error}.") from None
    without = [name for name in found if name not in adaptable]
    if without:
        raise UsageError(f"{key}: {pattern!r} means {without[0]} too, which takes no adapter.")
    if not found:
        hint = f"; as a module's name it stands in a list, [{pattern}]" if re.fullmatch(r"\w+", pattern) else ""
        raise UsageError(f"{key}: no module's whole name matches the regular expression {pattern!r}{hint}.")


def _saved(model: nn.Module, names: list[str], entries: list[str], key: str) -> list[str]:
    """Modules that are trained in full; peft takes every name that ends so."""
    saved: list[str] = []
    for entry in entries:
        found = [name for name in names if name.endswith(entry)]
        if not found:
            there = _listed(name.rpartition(".")[2] for name in names)
            raise UsageError(f"{key}: no module is called {entry!r}; there are {there}.")
        saved += found
    for name in saved:
        around = next((other for other in saved if other != name and _inside(name, other)), None)
        if around:
            raise UsageError(f"{key}: means {around} and, inside it, {name}; name modules that don't hold one another.")
    _refuse_head(model, saved, key)
    return saved


def _refuse_head(model: Any, found: list[str], key: str) -> None:
    """Refuse to change one of two tied matrices, which would leave the model with two different ones."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {name for name, module in model.named_modules() if module is inner or module is outer}
    wrong = sorted(ends & set(found))
    if wrong and outer is not None and inner.weight is outer.weight:
        raise UsageError(
            f"{key}: {wrong[0]} can't be changed alone: the model's embedding and output head are the same matrix."
        )
