"""One token after another by the step ops, against the whole documents at once."""

from __future__ import annotations

import packed_ops as ops
import torch
from sambay_kernels import causal_conv1d_step, selective_scan_step
from torch import Tensor


def _slots(slots: list[int] | None, device: str) -> tuple[Tensor | None, Tensor, int]:
    """The argument of the ops, the places of the three sequences, and how many slots there are."""
    if slots is None:
        return None, torch.arange(3, device=device), 3
    places = torch.tensor(slots, device=device)
    return places, places, max(slots) + 2


def _on(device: str, case: ops.Case) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in case.tensors.items()}


def assert_steps_match(name: str, slots: list[int] | None, gated: bool, device: str = "cpu") -> None:
    """Three documents of five tokens, token by token, give the scan's outputs and states; other slots stay."""
    case = ops.scan_case([5, 5, 5], channels=70, states=5)
    case = case if gated else case.without("z", "D", "delta_bias")
    whole, tensors = ops.run(case, "reference"), _on(device, case)
    index, places, count = _slots(slots, device)
    state = torch.full((count, 70, 5), 7.0, device=device)
    state[places] = tensors["initial_state"]
    rows = {key: tensors[key].view(3, 5, -1) for key in case.tokens if key in tensors}
    fixed = {key: tensors[key] for key in ("A", "D", "delta_bias") if key in tensors}
    for t in range(5):
        with ops.backend(name):
            y = selective_scan_step(state, **{key: value[:, t] for key, value in rows.items()}, **fixed, slots=index)
        assert ops.rms_error(y.cpu(), whole["y"].view(3, 5, -1)[:, t]) <= 1e-6
    assert ops.rms_error(state[places].cpu(), whole["final_state"]) <= 1e-6
    others = [slot for slot in range(count) if slot not in places.tolist()]
    assert (state[others] == 7.0).all()


def assert_conv_steps_match(
    name: str, slots: list[int] | None, width: int, activation: str | None, device: str = "cpu"
) -> None:
    """The same for the convolution."""
    case = ops.conv_case([5, 5, 5], channels=70, width=width)
    whole, tensors = ops.run(case, "reference", activation=activation), _on(device, case)
    index, places, count = _slots(slots, device)
    state = torch.full((count, 70, width - 1), 7.0, device=device)
    state[places] = tensors["initial_state"]
    for t in range(5):
        x = tensors["x"].view(3, 5, -1)[:, t]
        with ops.backend(name):
            y = causal_conv1d_step(state, x, tensors["weight"], tensors["bias"], activation=activation, slots=index)
        assert ops.rms_error(y.cpu(), whole["y"].view(3, 5, -1)[:, t]) <= 1e-6
    assert ops.rms_error(state[places].cpu(), whole["final_state"]) <= 1e-6
    others = [slot for slot in range(count) if slot not in places.tolist()]
    assert (state[others] == 7.0).all()
