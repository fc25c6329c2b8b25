"""Put a checkpoint's tensors into the model, all of them and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from .tensors import expected_shapes, left_over, missing, wrong_shape


def load(model: nn.Module, config: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Copy every tensor of a checkpoint to the parameter of its name; the names.

    Args:
        model: its parameters are named as in the checkpoint; A_log and the lambdas are float32.
        weights: the checkpoint's tensors by their names, as vLLM reads them.

    Raises:
        ValueError: one sentence, when tensors are missing, left over, of a wrong shape, or can't be read.
    """
    wanted, parameters = expected_shapes(config), dict(model.named_parameters())
    found: set[str] = set()
    strange: set[str] = set()
    for name, tensor in _read(weights):
        if name not in wanted:
            strange.add(name)
            continue
        _refuse(wrong_shape(name, tuple(tensor.shape), wanted[name]))
        parameter = parameters[name]
        # The embedding's rows are padded to a multiple that its products want, and its own loader knows how.
        copy = getattr(parameter, "weight_loader", lambda into, value: into.data.copy_(value))
        copy(parameter, tensor)
        found.add(name)
    _refuse(left_over(strange))
    _refuse(missing(wanted.keys() - found))
    return found


def _read(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    try:
        yield from weights
    except SafetensorError as error:
        told = "a weights file can't be read, it is cut short or damaged: copy the checkpoint's folder again"
        raise ValueError(f"sambay-vllm: {told} ({error})") from error


def _refuse(problem: str | None) -> None:
    if problem:
        raise ValueError(f"sambay-vllm: {problem}")
