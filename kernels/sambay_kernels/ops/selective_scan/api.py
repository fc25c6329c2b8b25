"""Selective scan (Mamba-1) over packed documents."""

from __future__ import annotations

from torch import Tensor

from ...runtime.autocast import recorded_in_own_types
from ...runtime.checks import check_flag, check_leading, check_optional, check_tensor, needs_grad
from ...runtime.dispatch import backend_for
from ...runtime.packing import check_cu_seqlens_form, check_cu_seqlens_values, document_count
from .inputs import ScanInputs
from .op import OP, selective_scan_fwd
from .reference import selective_scan_reference


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective scan of Mamba (Gu and Dao 2023, eq. 2), token-major and packed; the state starts anew in each document.

    delta' = softplus(delta + delta_bias) (softplus(x) = x above 20)
    h_t = exp(delta'_t A) h_{t-1} + delta'_t B_t u_t
    y_t = (C_t h_t + D u_t) silu(z_t)

    Args:
        u, delta: (T, d_inner) input and time step (before bias and softplus).
        A: (d_inner, N) the continuous decay, negative.
        B, C: (T, N) input and output maps; rows may be strided views.
        D: (d_inner,) skip weight, or None.
        z: (T, d_inner) gate, or None.
        delta_bias: (d_inner,) or None.
        delta_softplus: False uses delta + delta_bias as it is.
        cu_seqlens: int32 (S+1,) document borders, from 0 to T; None = one document. Documents may be empty.
        initial_state: (S, d_inner, N) state before each document; None = zeros.

    Floating-point types may be mixed; state and arithmetic are float32, or float64 when u is float64. A gradient has
    the type of its input. Same input, same bits. One document's outputs and token gradients don't depend on the others.

    Returns:
        y (T, d_inner) in u's type, and final_state (S, d_inner, N) in float32 (float64): the state after each document,
        equal to its initial state when it is empty. Both are differentiable, once.

    Raises:
        ValueError: a wrong shape, type, device or cu_seqlens, T * d_inner above 2**31 - 1, or a SAMBAY_KERNELS that
            can't be met.
        TypeError: an argument is not a tensor.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state)
    _check(inputs)
    backend = backend_for(OP, u)
    if backend == "reference":
        check_cu_seqlens_values(cu_seqlens, u.shape[0])
        return recorded_in_own_types(lambda *args: selective_scan_reference(ScanInputs(*args)), *inputs)
    y, final_state, _ = selective_scan_fwd(*inputs, needs_grad(*inputs.differentiable()), backend)
    return y, final_state


def _check(inputs: ScanInputs) -> None:
    check_leading(OP, "u", inputs.u, 2)
    (total, channels), device = inputs.u.shape, inputs.u.device
    check_leading(OP, "A", inputs.A, 2)
    states = inputs.A.shape[1]
    check_flag(OP, "delta_softplus", inputs.delta_softplus)
    check_cu_seqlens_form(inputs.cu_seqlens, device)
    check_tensor(OP, "delta", inputs.delta, (total, channels), device)
    check_tensor(OP, "A", inputs.A, (channels, states), device)
    check_tensor(OP, "B", inputs.B, (total, states), device)
    check_tensor(OP, "C", inputs.C, (total, states), device)
    check_optional(OP, "D", inputs.D, (channels,), device)
    check_optional(OP, "z", inputs.z, (total, channels), device)
    check_optional(OP, "delta_bias", inputs.delta_bias, (channels,), device)
    state = (document_count(inputs.cu_seqlens), channels, states)
    check_optional(OP, "initial_state", inputs.initial_state, state, device)
