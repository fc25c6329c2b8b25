"""What merging makes of a model with adapters, a tensor or a layer at a time: the whole is never in memory.

The mathematics are peft's own `merge`, done in float32 on one layer whose weights are then put back as they were. So a
model whose weights lie in a mapped file can be merged, and run, in the memory of its largest layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sft.utils.errors import UserError, first_line


@dataclass(frozen=True)
class FinalTensor:
    """A tensor of a model as it is handed on.

    Attributes:
        shape: its shape; dtype: what it is held in.
        is_parameter: False for a buffer.
        read: gives it, on the CPU: in float32 where an adapter was merged into it, else as it is held.
        pieces: of a tensor that shouldn't be in memory as a whole, in place of `read`: its values, flat, bit by bit.
    """

    shape: torch.Size
    dtype: torch.dtype
    is_parameter: bool
    read: Callable[[], Tensor]
    pieces: Callable[[], Iterator[Tensor]] | None = None


def base_of(model: Any) -> Any:
    """The model itself, around whose layers a PeftModel puts adapters."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def final_tensors(model: Any) -> dict[str, FinalTensor]:
    """Name -> tensor of `model` with its adapters merged, as its state dict has them; tied tensors are there once.

    Raises:
        UserError: when an adapter changes one of two tied tensors, or is of a kind that can't be merged.
    """
    _refuse_unmergeable(model)
    base = base_of(model)
    # Of tied tensors that one stays whose name transformers looks for in a file.
    tied = getattr(base, "all_tied_weights_keys", None) or {}
    parts = sorted(_parts(base, ""), key=lambda part: part[0] in tied)
    found: dict[str, FinalTensor] = {}
    owners: dict[int, tuple[str, nn.Module | None]] = {}
    for name, tensor, wrapper in parts:
        first, owner = owners.setdefault(id(tensor), (name, wrapper))
        if first == name:
            read = partial(_read, tensor, wrapper)
            found[name] = FinalTensor(tensor.shape, tensor.dtype, isinstance(tensor, nn.Parameter), read)
        elif any(_is_tuner(layer) for part in (wrapper, owner) if part is not None for layer in part.modules()):
            raise UserError(
                f"the adapter can't be merged: it changes one of {first} and {name}, which are the same tensor in this "
                "model; export it unmerged (push.merge_lora: false)"
            )
    return found


def computing_in_float32(model: Any, *, merged: bool = False) -> AbstractContextManager[None]:
    """Inside, `model` computes in float32 whatever it is held in: each layer is widened while it runs.

    `merged`: with the adapters in the weights, as `final_tensors` gives them.
    """
    return _changed_while_running(model, partial(widened, merged=merged))


def computing_as_stored(model: Any, dtype: str, *, merged: bool = False) -> AbstractContextManager[None]:
    """Inside, `model` computes with the weights that `save_model` writes with this `dtype`, a layer at a time."""
    return _changed_while_running(
        model, partial(_as_stored, wide=wide_parts(base_of(model)), dtype=dtype, merged=merged)
    )


def wide_parts(base: Any) -> tuple[str, ...]:
    """The parts of names whose tensors the class of a model without adapters keeps in float32."""
    return tuple(getattr(base, "_keep_in_fp32_modules_strict", None) or ())


@contextmanager
def _as_stored(module: nn.Module, *, wide: tuple[str, ...], dtype: str, merged: bool) -> Iterator[None]:
    with widened(module, merged=merged):
        for name, parameter in module.named_parameters():
            if parameter.is_floating_point() and not any(part in wide for part in name.split(".")):
                parameter.data = parameter.data.to(getattr(torch, dtype))
        yield


@contextmanager
def _changed_while_running(model: Any, change: Callable[[nn.Module], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, each layer of `model` runs within `change(layer)`."""
    opened: dict[nn.Module, AbstractContextManager[None]] = {}

    def enter(module: nn.Module, *_: Any) -> None:
        opened[module] = change(module)
        opened[module].__enter__()

    def leave(module: nn.Module, *_: Any) -> None:
        if module in opened:
            opened.pop(module).__exit__(None, None, None)

    units = list(_units(base_of(model)))
    handles = [unit.register_forward_pre_hook(enter) for unit in units]
    handles += [unit.register_forward_hook(leave, always_call=True) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(opened):
            leave(module)


@contextmanager
def widened(module: nn.Module, *, merged: bool = False) -> Iterator[None]:
    """Inside, the floating tensors of `module` are in float32 (at least), with its adapters merged where asked.

    Raises:
        UserError: when an adapter can't be merged.
    """
    held = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    layers = [layer for layer in module.modules() if merged and _is_tuner(layer)]
    try:
        for tensor, data in held:
            if data.is_floating_point():
                # A copy where peft will add to it in place.
                tensor.data = data.to(torch.promote_types(data.dtype, torch.float32), copy=bool(layers))
        for layer in layers:
            _merge(layer)
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()  # type: ignore[operator, union-attr]
        for tensor, data in held:
            tensor.data = data


def _merge(layer: Any) -> None:
    try:
        layer.merge()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(_cannot(error)) from error
    # A sum is finite only if all its terms are, and takes a third of the time that peft's own check takes.
    if not all(bool(parameter.detach().sum().isfinite()) for parameter in layer.get_base_layer().parameters()):
        raise UserError(_cannot(ValueError("the merged weights aren't finite, so it, or its base model, is broken")))


def _cannot(error: BaseException) -> str:
    return f"the adapter can't be merged: {first_line(error)}; export it unmerged (push.merge_lora: false)"


def _refuse_unmergeable(model: Any) -> None:
    """Refuse adapters that aren't layers around weights, such as learned prompts, and what peft doesn't merge."""
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(model.base_model, BaseTuner):
        kind = ", ".join(str(getattr(config.peft_type, "value", "?")) for config in model.peft_config.values())
        raise UserError(_cannot(ValueError(f"an adapter of type {kind} isn't a change of weights")))
    try:
        model.base_model._check_merge_allowed()
    except (ValueError, NotImplementedError) as error:
        raise UserError(_cannot(error)) from error


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, nn.Module | None]]:
    """(name without wrappers, tensor, the wrapper that changes it) of everything that a state dict holds."""
    if _is_wrapper(module):
        core = _core(module)
        for name, tensor in core.state_dict(keep_vars=True).items():
            yield prefix + name, tensor, module
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter, None
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer, None
    for name, child in module.named_children():
        yield from _parts(child, f"{prefix}{name}.")


def _read(tensor: Tensor, wrapper: nn.Module | None) -> Tensor:
    if wrapper is None:
        return tensor.detach().cpu()
    with widened(wrapper, merged=True):
        return tensor.data.cpu()


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that are widened one at a time: the members of lists (layers), and what has tensors of its own."""
    if _is_wrapper(module) or any(True for _ in module.parameters(recurse=False)):
        yield module
        return
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _units(child)


def _is_tuner(module: nn.Module) -> bool:
    """Whether `module` is a layer of peft's that merges."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _is_wrapper(module: nn.Module) -> bool:
    """Whether peft put `module` around, or in the place of, one of the model's own."""
    return hasattr(module, "base_layer") or hasattr(module, "unload_and_optionally_merge_module")


def _core(wrapper: Any) -> nn.Module:
    """The model's own module that a wrapper stands for."""
    if hasattr(wrapper, "base_layer"):
        return wrapper.get_base_layer()
    return wrapper.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
