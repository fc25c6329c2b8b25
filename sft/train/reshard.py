"""The optimizer's state of a checkpoint, taken over by another engine or another number of processes, value by value.

DeepSpeed keeps each process's part of all parameters of a group in one flat tensor, and reads them at the number of
processes that wrote them alone. (Its universal checkpoints are read at any, but count Adam's steps wrongly.) Here each
parameter's moments are put together from those parts, one parameter at a time, and cut anew; nothing is rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.utils.errors import UserError


@dataclass(frozen=True)
class Moments:
    """One parameter's state in an optimizer: `values`, flat tensors of a number per weight; `counts`, which are of the
    parameter as a whole (Adam's step)."""

    values: dict[str, Tensor]
    counts: dict[str, Any]


class SavedMoments:
    """The optimizer's state in the checkpoint `folder`, parameter by parameter, whichever engine wrote it.

    `names`: those of the optimizer's parameters, group by group, as they are without an engine.
    Raises UserError for a state that can't be told parameter by parameter.
    """

    def __init__(self, folder: Path, names: Sequence[Sequence[str]]) -> None:
        self._folder = folder
        shards = sorted(folder.glob("global_step*/*_optim_states.pt"), key=_rank_of)
        self._places: dict[str, _Whole | _Cut] = dict(_in_shards(shards) if shards else _in_one_file(folder, names))

    def of(self, name: str) -> Moments | None:
        """The state of a parameter; None where it has none yet."""
        place = self._places.get(name)
        if place is None:
            raise UserError(f"{self._folder} holds no optimizer state of {name}: it is of another model.")
        return place.moments(f"{self._folder}: {name}")


# ---- what is there ----


@dataclass(frozen=True)
class _Whole:
    """A parameter of `size` weights whose state is one entry of an ordinary optimizer's."""

    state: dict[str, Any]
    size: int | None

    def moments(self, where: str) -> Moments | None:
        values, counts = {}, {}
        for key, value in self.state.items():
            if _is_count(value):
                counts[key] = value
            elif value.numel() == self.size:
                values[key] = value.reshape(-1)
            else:
                raise _not_by_weight(where, key)
        return Moments(values, counts) if self.state else None


@dataclass(frozen=True)
class _Cut:
    """A parameter of `size` weights, whose pieces, end to end, are (state of a flat tensor, its length, start, end)."""

    pieces: list[tuple[dict[str, Any], int, int, int]]
    size: int

    def moments(self, where: str) -> Moments | None:
        states = [state for state, _, _, _ in self.pieces]
        if not any(states):
            return None
        values, counts = {}, {}
        for key in states[0]:
            found = [state[key] for state in states]
            if all(_is_count(value) for value in found):
                if any(value != found[0] for value in found):
                    raise _not_by_weight(where, key)
                counts[key] = found[0]
                continue
            if any(value.numel() != length for value, (_, length, _, _) in zip(found, self.pieces, strict=True)):
                raise _not_by_weight(where, key)
            parts = [state[key].reshape(-1)[start:end] for state, _, start, end in self.pieces]
            values[key] = torch.cat(parts)[: self.size]
        return Moments(values, counts)


def _is_count(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1


def _not_by_weight(where: str, key: str) -> UserError:
    return UserError(
        f"{where}: this optimizer's {key} isn't a number for each weight, so that it can't be shared out anew: go on "
        "with as many processes and the engine that wrote it."
    )


def _in_one_file(folder: Path, names: Sequence[Sequence[str]]) -> Iterator[tuple[str, _Whole]]:
    """Of an optimizer without an engine, whose state goes by the parameters' order."""
    saved = _load(folder / "optimizer.pt")
    order = [number for group in saved["param_groups"] for number in group["params"]]
    flat = list(itertools.chain.from_iterable(names))
    if len(order) != len(flat):
        raise UserError(f"{folder} holds the optimizer state of {len(order)} parameters; the model trains {len(flat)}.")
    for number, name in zip(order, flat, strict=True):
        state = saved["state"].get(number, {})
        sizes = [value.numel() for value in state.values() if not _is_count(value)]
        yield name, _Whole(state, max(sizes, default=None))


def _in_shards(shards: Sequence[Path]) -> Iterator[tuple[str, _Cut]]:
    """Of DeepSpeed's ZeRO, a file for each process."""
    models = sorted(shards[0].parent.glob("*_model_states.pt"))
    groups: list[dict[str, Any]] = _load(models[0])["param_shapes"]
    saved = [_load(path)["optimizer_state_dict"] for path in shards]
    if len(shards) != _count(saved[0]["partition_count"]):
        raise UserError(f"{shards[0].parent} has {len(shards)} parts of {_count(saved[0]['partition_count'])}.")
    if int(saved[0]["zero_stage"]) == 3:
        yield from _of_parted_parameters(groups, [one["optimizer_state_dict"] for one in saved])
    else:
        yield from _of_parted_groups(groups, [one["base_optimizer_state"] for one in saved])


def _of_parted_groups(groups: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> Iterator[tuple[str, _Cut]]:
    """ZeRO-1 and ZeRO-2: all parameters of a group are end to end, and that is cut into a part for each process."""
    for number, shapes in enumerate(groups):
        parts = [(state := one["state"].get(number, {}), _length(state)) for one in saved]
        start = 0
        for name, shape in shapes.items():
            yield name, _Cut(list(_overlaps(parts, start, start + shape.numel())), shape.numel())
            start += shape.numel()


def _of_parted_parameters(
    groups: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, _Cut]]:
    """ZeRO-3: each parameter is cut into a part for each process, which has its parts end to end in tensors."""
    ranks = [[(state := one["state"][key], _length(state)) for key in sorted(one["state"])] for one in saved]
    start = 0
    for name, shape in itertools.chain.from_iterable(shapes.items() for shapes in groups):
        part = -(-shape.numel() // len(saved))
        pieces = [piece for parts in ranks for piece in _overlaps(parts, start, start + part)]
        yield name, _Cut(pieces, shape.numel())
        start += part


def _overlaps(
    parts: Iterable[tuple[dict[str, Any], int]], start: int, end: int
) -> Iterator[tuple[dict[str, Any], int, int, int]]:
    """Where the stretch from `start` to `end` lies in `parts` that are end to end."""
    offset = 0
    for state, length in parts:
        first, last = max(start, offset), min(end, offset + length)
        if first < last:
            yield state, length, first - offset, last - offset
        offset += length


def _length(state: dict[str, Any]) -> int:
    return max((value.numel() for value in state.values() if not _is_count(value)), default=0)


def _rank_of(path: Path) -> int:
    digits = path.name.partition("zero_pp_rank_")[2].partition("_")[0]
    return int(digits) if digits.isdecimal() else 0


def _count(value: Any) -> int:
    return int(max(value)) if isinstance(value, list) else int(value)


def _load(path: Path) -> Any:
    # Objects of DeepSpeed's own are in its files. They are this run's, whole by their hashes.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


# ---- where it goes ----


def take_over(folder: Path, names: Sequence[Sequence[str]], optimizer: Any, rates: Sequence[float]) -> None:
    """Give `optimizer`, as the running engine has it, the state that the checkpoint `folder` holds.

    `names`: see SavedMoments; `rates`: the learning rate of each group at that step. To be called on every rank, with
    the model's weights loaded before the engine was made of them, or after `take_weights`.
    """
    saved = SavedMoments(folder, names)
    inner = _unwrapped(optimizer)
    if parts := list(_parts(inner, names)):
        _load_state(inner, inner.optimizer, (_flat(saved, pieces, mine) for pieces, mine in parts), rates)
    else:
        _load_state(inner, inner, _whole_parameters(saved, names, inner), rates)


def take_weights(folder: Path, names: Sequence[Sequence[str]], model: nn.Module, optimizer: Any) -> None:
    """Give a model that ZeRO trains, and its float32 masters, the weights of the checkpoint `folder`, whichever engine
    wrote it. Arguments as of `take_over`; to be called on every rank. Not for adapters, whose file has other names.
    """
    inner, saved = _unwrapped(optimizer), _SavedWeights(folder)
    for pieces, mine in _parts(inner, names):
        for name, (start, end), (first, last) in pieces:
            mine.data[start:end].copy_(saved.flat(name)[first:last])
    _fill(model, saved, set(itertools.chain.from_iterable(names)))


def fill(model: nn.Module, folder: Path) -> None:
    """Give a model, on whatever engine, the weights in `folder`, to be run with and not trained on. On every rank.

    A model that was to be cut up and wasn't has no values on the ranks behind the first: there they are put in.
    """
    saved, empty = _SavedWeights(folder), {name: p for name, p in model.named_parameters() if p.is_meta}
    for name, parameter in empty.items():
        owner, _, own = name.rpartition(".")
        value = saved.flat(name).view(parameter.shape).to(parameter.dtype)
        setattr(model.get_submodule(owner), own, nn.Parameter(value, parameter.requires_grad))
    if empty:
        model.tie_weights()  # type: ignore[operator]
    _fill(model, saved, {name for name, _ in model.named_parameters()} - empty.keys())


def _fill(model: nn.Module, saved: _SavedWeights, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        with _whole(parameter) as mine:
            if mine:
                parameter.data.copy_(saved.flat(name).view(parameter.shape))


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[bool]:
    """While active a parameter is there as a whole; whether what this rank puts into it stays."""
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield torch.distributed.get_rank() == 0


class _SavedWeights:
    """The weights in a checkpoint, one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        files = [safe_open(path, framework="pt", device="cpu") for path in sorted(folder.glob("model*.safetensors"))]
        self._folder, self._files = folder, {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def flat(self, name: str) -> Tensor:
        """A weight, end to end."""
        if name not in self._files:
            raise UserError(f"{self._folder} holds no weight {name}: it is of another model.")
        return self._files[name].get_tensor(name).reshape(-1)


def _unwrapped(optimizer: Any) -> Any:
    """DeepSpeed's optimizer, or torch's, out of accelerate's."""
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    return optimizer


def _load_state(inner: Any, base: Any, states: Iterable[dict[str, Any]], rates: Sequence[float]) -> None:
    parted = base is not inner and hasattr(inner, "_set_fp32_optimizer_param_groups")
    if parted:
        inner._set_fp32_optimizer_param_groups()
    try:
        groups = base.state_dict()["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        state = {number: found for number, found in zip(numbers, states, strict=True) if found}
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        base.load_state_dict({"state": state, "param_groups": groups})
    finally:
        if parted:
            inner._clear_fp32_optimizer_param_groups()


def _whole_parameters(saved: SavedMoments, names: Sequence[Sequence[str]], base: Any) -> Iterator[dict[str, Any]]:
    for group, called in zip(base.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], called, strict=True):
            found = saved.of(name)
            if found is None:
                yield {}
                continue
            shaped = {key: value.view(parameter.shape).clone() for key, value in found.values.items()}
            yield shaped | _counts(found)


def _counts(found: Moments) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.counts.items()}


Piece = tuple[str, tuple[int, int], tuple[int, int]]
"""A parameter's name, where in a flat tensor a part of it goes, and which part."""


def _parts(inner: Any, names: Sequence[Sequence[str]]) -> Iterator[tuple[list[Piece], Tensor]]:
    """This process's float32 masters under ZeRO, a flat tensor a group, and what they are of; nothing elsewhere."""
    if hasattr(inner, "fp32_partitioned_groups_flat"):
        yield from _of_parameters(inner, names)
    elif hasattr(inner, "single_partition_of_fp32_groups"):
        yield from _of_groups(inner, names)


def _of_groups(inner: Any, names: Sequence[Sequence[str]]) -> Iterator[tuple[list[Piece], Tensor]]:
    """ZeRO-1 and ZeRO-2: this process's part of each group, padded with zeros at the end."""
    called = _names_of(inner, names)
    for number, parameters in enumerate(inner.round_robin_bit16_groups):
        size = int(inner.partition_size[number])
        first = size * torch.distributed.get_rank(inner.real_dp_process_group[number])
        pieces: list[Piece] = []
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            if start < first + size and end > first:
                into = max(start, first) - first, min(end, first + size) - first
                out_of = max(start, first) - start, min(end, first + size) - start
                pieces.append((called[id(parameter)], into, out_of))
            start = end
        mine = inner.single_partition_of_fp32_groups[number]
        yield pieces or [(called[id(parameters[0])], (0, 0), (0, 0))], mine


def _of_parameters(inner: Any, names: Sequence[Sequence[str]]) -> Iterator[tuple[list[Piece], Tensor]]:
    """ZeRO-3: this process's part of each parameter, end to end."""
    called = _names_of(inner, names)
    rank = torch.distributed.get_rank(inner.dp_process_group)
    for number, parameters in enumerate(inner.fp16_groups):
        pieces: list[Piece] = []
        start = 0
        for parameter in parameters:
            part = parameter.partition_numel()
            first = min(rank * part, parameter.ds_numel)
            last = min(first + part, parameter.ds_numel)
            pieces.append((called[id(parameter)], (start, start + last - first), (first, last)))
            start += part
        yield pieces, inner.fp32_partitioned_groups_flat[number]


def _flat(saved: SavedMoments, pieces: Sequence[Piece], like: Tensor) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, (start, end), (first, last) in pieces:
        found = saved.of(name)
        if found is None:
            continue
        for key, value in found.values.items():
            into = made.setdefault(key, torch.zeros(like.numel(), dtype=value.dtype, device=like.device))
            into[start:end] = value[first:last]
        made |= _counts(found)
    return made


def _names_of(inner: Any, names: Sequence[Sequence[str]]) -> dict[int, str]:
    """The name of each parameter, by its id, as DeepSpeed knows it."""
    known: dict[Any, str] = inner.param_names
    flat = set(itertools.chain.from_iterable(names))
    return {id(parameter): name for parameter, name in known.items() if name in flat}
