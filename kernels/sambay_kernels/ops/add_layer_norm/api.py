"""LayerNorm of a residual stream in the type that its reader wants, with the addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.autocast import recorded_in_own_types
from ...runtime.checks import FLOAT_TYPES, check_optional, check_real, check_tensor, compute_dtype
from ...runtime.dispatch import backend_for
from .op import OP, add_layer_norm_fwd
from .reference import add_layer_norm_reference
from .torch import add_layer_norm_torch

SMALL = 1 << 18  # elements of the stream below which, on a CPU, one call of ours takes as long as torch's several


def add_layer_norm(
    hidden: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden + delta, and its LayerNorm (Ba et al. 2016, arXiv 1607.06450, eq. 4) over the last dimension.

    Args:
        hidden: (..., W), the residual stream.
        delta: hidden's shape, what a layer adds to it; None: nothing is added.
        weight, bias: (W,), both of one type; float64 if hidden is, and only then.
        eps: added to the variance.
        out_dtype: type of the normalised rows; weight's if None.

    The sum is rounded to hidden's type, read rounded to weight's, and all else is float32, or float64 when hidden is.
    So the result is, to rounding, that of `hidden + delta`, `layer_norm(_.to(weight.dtype))` and `.to(out_dtype)`. A
    row depends on no other row. Same input, same bits, in gradients too; in C++ for any number of threads. Torch's own
    operations stand in for C++ where there is neither an addition nor a type to change, and for few elements. A
    gradient has its input's type.

    Returns:
        hidden + delta in hidden's type, or hidden itself without delta; and the normalised rows (..., W), contiguous.
        Differentiable once.

    Raises:
        ValueError: shapes, types or devices that don't fit, a width of 0, an eps below 0, or a SAMBAY_KERNELS that
            can't be met.
        TypeError: an argument is not a tensor, a number or a type.
    """
    out_dtype = _checked_type(hidden, delta, weight, bias, out_dtype)
    check_real(OP, "eps", eps, least=0.0)
    backend, args = backend_for(OP, hidden), (hidden, delta, weight, bias, float(eps), out_dtype)
    pays = hidden.numel() >= SMALL and (delta is not None or out_dtype != weight.dtype)
    if backend == "cpp" and hidden.dtype == weight.dtype == compute_dtype(hidden) and not pays:
        return add_layer_norm_torch(hidden, delta, weight, bias, eps=eps, out_dtype=out_dtype)
    if backend == "reference":
        total, normed = recorded_in_own_types(add_layer_norm_reference, *args)
    else:
        total, normed, _ = add_layer_norm_fwd(*args, backend)
    return (hidden if delta is None else total), normed


def _checked_type(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, out_dtype: torch.dtype | None
) -> torch.dtype:
    """The type of the normalised rows, after a check of all that decides it."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{OP}: hidden must be a tensor, got {type(hidden)}")
    check_tensor(OP, "hidden", hidden, tuple(hidden.shape), hidden.device)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{OP}: hidden must have elements in its last dimension, got shape {tuple(hidden.shape)}")
    check_optional(OP, "delta", delta, tuple(hidden.shape), hidden.device)
    check_tensor(OP, "weight", weight, (hidden.shape[-1],), hidden.device)
    check_tensor(OP, "bias", bias, (hidden.shape[-1],), hidden.device)
    if bias.dtype != weight.dtype:
        raise ValueError(f"{OP}: bias must have weight's type, {weight.dtype}, got {bias.dtype}")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(f"{OP}: hidden is {hidden.dtype} but weight {weight.dtype}: only both can be float64")
    if out_dtype is None:
        return weight.dtype
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"{OP}: out_dtype must be a torch.dtype or None, got {out_dtype!r}")
    if out_dtype not in FLOAT_TYPES:
        raise ValueError(f"{OP}: out_dtype must be float32, bfloat16, float16 or float64, got {out_dtype}")
    return out_dtype
