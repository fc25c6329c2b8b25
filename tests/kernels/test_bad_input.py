"""Absurd arguments of every public op: a ValueError or TypeError that names the op, by every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import packed_ops as ops
import pytest
import sambay_kernels
import torch
from torch import Tensor

ABSURD: list[Any] = [
    "x", 1.5, [1.0], float("nan"), float("inf"), -(10**30), 10**400, True, object(),
    torch.zeros(0), torch.zeros(()), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.complex64),
    torch.zeros(4, 3, device="meta"), torch.zeros(4, 3).to_sparse(),
]  # fmt: skip


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def attention(**caches: tuple[int, ...]) -> dict[str, Any]:
    made = {name: random(*shape) for name, shape in caches.items()}
    return {**made, "lambda_full": torch.tensor(0.3), "subln_weight": random(4), "lambda_init": 0.3}


BORDERS = torch.tensor([0, 4], dtype=torch.int32)
LABELS = torch.tensor([0, 1, -100])
# Good arguments of each op, and the names of the other ones.
CALLS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "selective_scan": (
        {"u": random(4, 3), "delta": random(4, 3), "A": random(3, 2), "B": random(4, 2), "C": random(4, 2)},
        ("D", "z", "delta_bias", "delta_softplus", "cu_seqlens", "initial_state"),
    ),
    "causal_conv1d": (
        {"x": random(4, 3), "weight": random(3, 2)},
        ("bias", "activation", "cu_seqlens", "initial_state"),
    ),
    "swiglu": ({"gate": random(2, 2), "value": random(2, 2)}, ()),
    "add_layer_norm": (
        {"hidden": random(4, 3), "delta": random(4, 3), "weight": random(3), "bias": random(3)},
        ("eps", "out_dtype"),
    ),
    "differential_attention": (
        {**attention(q=(4, 4, 2), k=(4, 2, 2), v=(4, 2, 2)), "cu_seqlens_q": BORDERS},
        ("cu_seqlens_k", "window", "scale", "eps"),
    ),
    "differential_attention_step": (
        attention(q=(2, 4, 2), k=(2, 2, 5, 2), v=(2, 2, 5, 2)),
        ("key_mask", "scale", "eps"),
    ),
    "linear_cross_entropy": (
        {"hidden": random(3, 2), "weight": random(5, 2), "labels": LABELS},
        (
            *("ignore_index", "label_smoothing", "z_loss", "reduction", "chunk_size", "weights", "loss_type", "alpha"),
            *("threshold", "teacher_ids", "teacher_logprobs", "distill_weight", "divergence", "skew", "tail"),
            "temperature",
        ),
    ),
    "selective_scan_step": (
        {
            "state": random(2, 3, 2),
            "u": random(2, 3),
            "delta": random(2, 3),
            "A": random(3, 2),
            "B": random(2, 2),
            "C": random(2, 2),
        },
        ("D", "z", "delta_bias", "delta_softplus", "slots"),
    ),
    "causal_conv1d_step": (
        {"state": random(2, 3, 1), "x": random(2, 3), "weight": random(3, 2)},
        ("bias", "activation", "slots"),
    ),
}


@pytest.mark.parametrize("name", ["torch", "cpp", "reference"])
@pytest.mark.parametrize(("op", "argument"), [(op, x) for op, (good, more) in CALLS.items() for x in (*good, *more)])
def test_an_absurd_argument_is_named(op: str, argument: str, name: str) -> None:
    call: Callable[..., Any] = getattr(sambay_kernels, op)
    refused = 0
    with ops.backend(name):
        call(**CALLS[op][0])
        for value in ABSURD:
            try:
                call(**{**CALLS[op][0], argument: value})
            except (ValueError, TypeError) as error:
                assert str(error).startswith((op, op.removesuffix("_step"), "cu_seqlens")), (value, error)
                refused += 1
    # A few of them are fine for some arguments: 1.5 as a scale, the empty mask of nothing.
    assert refused >= len(ABSURD) - 4


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_wrong_values_are_named_by_the_reference_too(name: str) -> None:
    good = CALLS["differential_attention"][0]
    with ops.backend(name):
        with pytest.raises(ValueError, match=r"labels must lie in 0 \.\. 4"):
            sambay_kernels.linear_cross_entropy(random(3, 2), random(5, 2), torch.tensor([0, 5, -100]))
        with pytest.raises(ValueError, match="document 0 has 4 queries but 3 keys"):
            borders = torch.tensor([0, 3], dtype=torch.int32)
            sambay_kernels.differential_attention(
                **{**good, "k": good["k"][:3], "v": good["v"][:3], "cu_seqlens_k": borders}
            )


@pytest.mark.parametrize("op", ["nope", "", None, 3, ["selective_scan"]])
def test_an_unknown_op_is_named(op: Any) -> None:
    with pytest.raises(sambay_kernels.BackendError, match=r"unknown op .*, choose from add_layer_norm"):
        sambay_kernels.why(op)
