"""One token of each sequence (decoding): states live in slots and are updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.cpp_build import problem
from ...runtime.checks import check_flag, check_leading, check_optional, check_slots, check_tensor, compute_dtype
from ...runtime.dispatch import backend_for, register
from ...runtime.segments import power_of_two
from ...triton.launch import DEVICES as TRITON_DEVICES
from ...triton.launch import channel_block, launch
from ...triton.launch import problem as triton_problem
from .cpp import selective_scan_step_cpp
from .inputs import ScanInputs
from .torch import selective_scan_step_torch
from .triton import laid_out

OP = "selective_scan_step"
BLOCK = 64  # channels of a program

register(OP, "cpp", ("cpu",), problem)
register(OP, "triton", TRITON_DEVICES, triton_problem)
register(OP, "torch")


@torch.no_grad()
def selective_scan_step(
    state: Tensor,
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
    slots: Tensor | None = None,
) -> Tensor:
    """One step of `selective_scan` for one token of each of R sequences; no gradient.

    Args:
        state: (slots, d_inner, N) float32 (float64 for float64 data), contiguous; CHANGED to the states after the step.
        u, delta, z: (R, d_inner); A: (d_inner, N); B, C: (R, N); D, delta_bias: (d_inner,), as in `selective_scan`.
        slots: (R,) int64, the slot of each sequence, no slot twice; None: sequence r has slot r.

    Returns:
        y (R, d_inner) in u's type.

    Raises:
        ValueError: a wrong shape, type or device, or a state that isn't contiguous.
        TypeError: an argument is not a tensor.
    """
    check_leading(OP, "u", u, 2)
    check_leading(OP, "A", A, 2)
    (count, channels), states, device = u.shape, A.shape[1], u.device
    check_tensor(OP, "delta", delta, (count, channels), device)
    check_tensor(OP, "A", A, (channels, states), device)
    check_tensor(OP, "B", B, (count, states), device)
    check_tensor(OP, "C", C, (count, states), device)
    for key, value, shape in (
        ("D", D, (channels,)),
        ("z", z, (count, channels)),
        ("delta_bias", delta_bias, (channels,)),
    ):
        check_optional(OP, key, value, shape, device)
    check_flag(OP, "delta_softplus", delta_softplus)
    check_slots(OP, state, slots, count, (channels, states), device)
    if state.dtype != compute_dtype(u):
        raise ValueError(f"{OP}: state must be {compute_dtype(u)}, got {state.dtype}")
    backend = backend_for(OP, u)
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if backend == "triton":
        return selective_scan_step_triton(state, inputs, slots)
    # A compiler can't look into C++, and makes one loop of the torch form.
    if backend == "cpp" and not torch.compiler.is_compiling():
        return selective_scan_step_cpp(state, inputs, slots)
    return selective_scan_step_torch(state, *inputs[:9], slots)


def selective_scan_step_triton(state: Tensor, inputs: ScanInputs, slots: Tensor | None) -> Tensor:
    """The step by one Triton kernel; arguments checked already."""
    from .triton_kernels import scan_step_kernel

    (count, channels), states = inputs.u.shape, inputs.A.shape[1]
    u, delta, A, B, C, D, z, delta_bias, softplus, _, _ = laid_out(inputs)
    y, block = u.new_empty(u.shape), channel_block(channels, BLOCK)
    launch(
        scan_step_kernel, (-(-channels // block), count), state, u, delta, A, B, C, D, z, delta_bias,
        slots, y, channels, u.stride(0), delta.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
        STATES=states, PADDED=power_of_two(states), BLOCK=block, SOFTPLUS=softplus, warps=4,
    )  # fmt: skip
    return y
