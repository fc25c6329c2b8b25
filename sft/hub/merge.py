"""Merge LoRA adapters into the weights, and show that nothing but rounding changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.hub.reload import relative_error
from sft.models.merge import computing_as_stored, computing_in_float32
from sft.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Largest relative difference of the same weights' logits that another order of sums explains.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

# In fp32 a merge that loses a part of what the adapter does is told apart from rounding by this share of it.
EFFECT_SHARE = 0.01


@dataclass(frozen=True)
class MergeReport:
    """What merging changed.

    Attributes:
        error: relative difference of logits, merged against adapter (Frobenius norm, centred).
        tolerance: what was allowed.
        effect: relative difference of logits, adapter against base model: what there was to merge.
    """

    error: float
    tolerance: float
    effect: float


def logits_of(model: Any, inputs: Sequence[Sequence[int]]) -> list[Tensor]:
    """(T, V) logits of each input, on the CPU; the model's mode is left as it was."""
    import torch

    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            rows = [torch.tensor([list(ids)], device=device) for ids in inputs]
            return [model(input_ids=row, use_cache=False).logits[0].cpu().clone() for row in rows]
    finally:
        model.train(training)


def stored_logits(model: Any, inputs: Sequence[Sequence[int]], dtype: str, *, merged: bool = False) -> list[Tensor]:
    """The (T, V) logits of the model as it is written in `dtype`, a layer at a time; it stays as it is."""
    with computing_as_stored(model, dtype, merged=merged):
        return logits_of(model, inputs)


def merged_logits(model: Any, inputs: Sequence[Sequence[int]]) -> tuple[list[Tensor], MergeReport]:
    """The (T, V) logits that merging the adapter of a PeftModel leads to, and how far they are from the adapter's own.

    Computed in float32 a layer at a time, whatever the model is held in; the model stays as it is.

    Raises:
        UserError: when the merged model computes something else than the one with the adapter.
    """
    with computing_in_float32(model):
        wanted = logits_of(model, inputs)
        with model.disable_adapter():
            base = logits_of(model, inputs)
    with computing_in_float32(model, merged=True):
        merged = logits_of(model, inputs)
    return merged, check_merge(merged, wanted, base, "float32")


def check_merge(merged: Sequence[Tensor], wanted: Sequence[Tensor], base: Sequence[Tensor], dtype: str) -> MergeReport:
    """Compare logits of the merged model with those that the adapter gave (`wanted`), and with the base model's.

    Raises:
        UserError: when they differ by more than rounding in `dtype` explains.
    """
    error = max(relative_error(a, b) for a, b in zip(merged, wanted, strict=True))
    effect = max(relative_error(a, b) for a, b in zip(base, wanted, strict=True))
    tolerance = TOLERANCE[dtype]
    if dtype == "float32":
        # Below 1e-5 the whole effect is of the size of rounding, and a share of it can't be demanded.
        tolerance = min(tolerance, max(1e-5, EFFECT_SHARE * effect))
    if not error <= tolerance:
        raise UserError(
            f"merging the adapter changes the logits by {error:.1e} (relative), {tolerance:.0e} is allowed in {dtype}; "
            "nothing was exported: export the adapter unmerged (push.merge_lora: false)"
        )
    return MergeReport(error, tolerance, effect)
