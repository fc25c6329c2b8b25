"""Which parameter is trained how: weight decay by kind, groups by pattern, and Muon beside AdamW."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sft.models.load import structure
from sft.recipe.problems import KeyProblem
from sft.train.muon import MuonAndAdamW, matrices, muon_arguments
from sft.train.stochastic import StochasticAdamW
from sft.utils.errors import UsageError
from sft.utils.say import say
from sft.utils.tables import counted

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from sft.recipe.schema import Recipe
    from sft.recipe.train_keys import TrainSection

NO_DECAY = re.compile(r"(^|\.)(A_log|D|lambda_\w+|\w*bias|\w*norm\w*)($|\.)")
"""Parameters that take no weight decay by name: state space A and D, attention lambdas, norms, biases."""
SHOWN = 5


def takes_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter, by its name and number of dimensions."""
    # ZeRO-3 keeps the true shape of a partitioned parameter beside it.
    dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
    return dimensions > 1 and not NO_DECAY.search(name) and not getattr(parameter, "_no_weight_decay", False)


def hold_weights(model: nn.Module, dtype: str) -> None:
    """Hold the weights in float32, or in bfloat16 all but those that take no weight decay: small and delicate ones."""
    model.float()
    if dtype == "bfloat16":
        for name, parameter in model.named_parameters():
            if takes_decay(name, parameter):
                parameter.data = parameter.data.bfloat16()


def rounding(optimizer: Any, train: TrainSection) -> Optimizer:
    """The AdamW for weights in bfloat16 that does what `optimizer`, an AdamW, was made to do."""
    own = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups]
    return StochasticAdamW(groups, **own, state_dtype=train.optim_state_dtype, seed=train.seed)


def groups_of_its_own(train: TrainSection) -> bool:
    """Whether a stage's parameters are grouped otherwise than by weight decay alone."""
    return train.optim == "muon" or bool(train.param_groups)


def parameter_groups(model: Any, train: TrainSection) -> list[dict[str, Any]]:
    """Groups of the trained parameters that share how they are trained: `params`, `lr`, `weight_decay` and `muon`.

    Those that no pattern of `param_groups` matches come first, then each pattern's in the recipe's order; Muon's come
    before the others. The same model and keys give the same groups in the same order, which a state dict goes by.
    """
    entries = train.param_groups or []
    for_muon = matrices(model) if train.optim == "muon" else set()
    groups: dict[tuple[int, bool, float], list[nn.Parameter]] = {}
    rates = {True: train.learning_rate, False: train.learning_rate}
    if train.adamw_learning_rate is not None:
        rates[False] = train.adamw_learning_rate
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        entry, decays = _first_match(name, train), takes_decay(name, parameter)
        own = None if entry is None else entries[entry].weight_decay
        decay = own if own is not None else train.weight_decay if decays else 0.0
        key = (-1 if entry is None else entry, not (decays and name in for_muon), -decay)
        groups.setdefault(key, []).append(parameter)
    made = []
    for (entry, rest, decay), parameters in sorted(groups.items(), key=lambda item: item[0]):
        own = entries[entry].learning_rate if entry >= 0 else None
        rate = rates[not rest] if own is None else own
        made.append({"params": parameters, "lr": rate, "weight_decay": -decay, "muon": not rest})
    return made


def _first_match(name: str, train: TrainSection) -> int | None:
    """The first entry of `param_groups` that a parameter belongs to."""
    return next((i for i, entry in enumerate(train.param_groups or []) if re.search(entry.match, name)), None)


def regrouped(optimizer: Any, model: Any, train: TrainSection) -> Optimizer:
    """A new optimizer with the stage's own groups in place of the two that it was made with."""
    groups = parameter_groups(model, train)
    if train.optim == "muon":
        _tell(groups)
        return MuonAndAdamW(groups, adamw=optimizer, muon=muon_arguments(train), lr=train.learning_rate)
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group({key: value for key, value in group.items() if key != "muon"})
    made: Optimizer = optimizer
    return made


def _tell(groups: list[dict[str, Any]]) -> None:
    told = []
    for muon, name, one, many in ((True, "Muon", "matrix", "matrices"), (False, "AdamW", "tensor", "tensors")):
        parameters = [parameter for group in groups if group["muon"] is muon for parameter in group["params"]]
        count = sum(parameter.numel() for parameter in parameters)
        told.append(f"{name} trains {counted(len(parameters), one, many)} ({counted(count, 'parameter')})")
    say(", ".join(told))


# ---- what has no effect ----


def check_groups(model: Any, train: TrainSection, where: str) -> None:
    """Raise UsageError naming `where` for a pattern that no trained parameter comes to, and for Muon without a matrix.

    `model` is the one that is trained, its adapters attached.
    """
    for index, reason in _idle_patterns(model, train):
        raise UsageError(f"{where}.param_groups[{index}].match: {reason}")
    if train.optim == "muon" and not any(group["muon"] for group in parameter_groups(model, train)):
        raise UsageError(f"{where}.optim: this stage trains no matrix of a hidden layer, which is what muon is for.")


def group_problems(recipe: Recipe, *, fetch: bool = True) -> Iterator[KeyProblem]:
    """Patterns that match no parameter of the model that the run starts from, found without its weights. Without
    `fetch` the Hub isn't asked.

    Adapters aren't there yet, so stages that train them are looked at when the model is loaded.
    """
    stages = [(i, stage) for i, stage in enumerate(recipe.stages) if stage.train.param_groups]
    stages = [(i, stage) for i, stage in stages if not stage.train.use_peft]
    # Foreign code isn't run for its structure alone.
    if not stages or recipe.model.trust_remote_code:
        return
    section = recipe.model
    model = structure(section.model_name_or_path, section.config, revision=section.model_revision, fetch=fetch)
    for place, stage in stages:
        for index, reason in _idle_patterns(model, stage.train):
            yield KeyProblem(("stages", place, "train", "param_groups", index, "match"), reason, None)


def _idle_patterns(model: Any, train: TrainSection) -> Iterator[tuple[int, str]]:
    """The entries of `param_groups` that no trained parameter comes to, and why."""
    names = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    reached = {_first_match(name, train) for name, trained in names.items() if trained}
    for index, entry in enumerate(train.param_groups or []):
        found = [name for name in names if re.search(entry.match, name)]
        if index in reached:
            continue
        if not found:
            # One of each kind, so that few names tell how names are made.
            kinds = list({re.sub(r"\d+", "N", name): name for name in names}.values())
            more = ", ..." if len(kinds) > SHOWN else ""
            yield (
                index,
                f"no parameter's name holds {entry.match!r}; names are such as {', '.join(kinds[:SHOWN])}{more}",
            )
        elif not any(names[name] for name in found):
            yield index, f"{entry.match!r} matches frozen parameters alone, such as {found[0]}"
        else:
            yield index, f"all that {entry.match!r} matches belongs to an earlier group: the first that matches counts"
