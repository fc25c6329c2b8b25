"""Merge LoRA adapters into the weights, and show that nothing but rounding changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.hub.reload import fixed_inputs, relative_error
from sft.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Largest relative difference of logits that rounding of the weights, or another order of sums, explains.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 0.1}

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


def merge_adapter(model: Any, *, in_place: bool) -> tuple[Any, MergeReport]:
    """The base model with the adapter of a PeftModel in its weights.

    Args:
        model: a PeftModel. in_place: it may be used up; False leaves it as it is and needs the memory twice.

    Raises:
        UserError: when the merged model computes something else than the one with the adapter.
    """
    inputs = fixed_inputs(model.config.get_text_config().vocab_size)
    wanted = logits_of(model, inputs)
    with model.disable_adapter():
        base = logits_of(model, inputs)
    dtype = str(next(p for p in model.get_base_model().parameters() if p.is_floating_point()).dtype)
    try:
        merged = (model if in_place else copy.deepcopy(model)).merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the adapter can't be merged: {first}; export it unmerged (push.merge_lora: false)") from error
    report = check_merge(logits_of(merged, inputs), wanted, base, dtype.removeprefix("torch."))
    return merged, report


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
