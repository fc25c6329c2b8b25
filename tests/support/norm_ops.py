"""Cases and comparisons for tests of the residual addition with its LayerNorm."""

from __future__ import annotations

import packed_ops as ops
import torch
from sambay_kernels import add_layer_norm
from torch import Tensor

Case = dict[str, Tensor]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of the stream, of what is added to it, of the normalised rows, of the weights.
TYPES = [
    (F32, BF16, BF16, F32),
    (F32, F32, BF16, F32),
    (F32, BF16, F32, F32),
    (F32, BF16, BF16, BF16),
    (BF16, BF16, BF16, F32),
    (BF16, BF16, BF16, BF16),
    (F32, F16, F16, F16),
]


def case(*shape: int, added: bool = True, types: tuple[torch.dtype, ...] = (F32,) * 4, seed: int = 0) -> Case:
    """Leaves and upstream gradients; values that bfloat16 holds, and a stream whose sums it holds too."""
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=g).bfloat16()

    def quarters(*size: int) -> Tensor:
        return torch.randint(-15, 16, size, generator=g) / 4

    made = {"hidden": quarters(*shape).to(types[0]), "delta": quarters(*shape).to(types[1])}
    made |= {name: randn(shape[-1]).to(types[3]) for name in ("weight", "bias")}
    made |= {"up_total": randn(*shape).to(types[0]), "up_normed": randn(*shape).to(types[2])}
    return made if added else {name: value for name, value in made.items() if name != "delta"}


def wide(made: Case) -> Case:
    """The same in float64."""
    return {name: value.double() for name, value in made.items()}


def tensors(made: Case) -> list[Tensor]:
    """hidden, delta, weight, bias."""
    return [made[name] for name in ("hidden", "delta", "weight", "bias")]


def run(name: str, made: Case, *, eps: float = 1e-5, out_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs, and gradients in their leaf's type."""
    leaves = {key: value.detach().clone().requires_grad_() for key, value in made.items() if key[:3] != "up_"}
    with ops.backend(name):
        total, normed = add_layer_norm(
            leaves["hidden"], leaves.get("delta"), leaves["weight"], leaves["bias"], eps=eps, out_dtype=out_dtype
        )
        outs = [total, normed]
        ups = [made["up_total"].to(total.dtype), made["up_normed"].to(normed.dtype)]
        grads = torch.autograd.grad(outs, list(leaves.values()), ups)
    assert total.dtype == leaves["hidden"].dtype and normed.dtype == (out_dtype or leaves["weight"].dtype)
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves.values(), strict=True))
    return {
        "total": total.detach(),
        "normed": normed.detach(),
        **{f"d_{key}": grad for key, grad in zip(leaves, grads, strict=True)},
    }


def assert_rows_stand_alone(name: str) -> None:
    """Each row's results by itself are those among others, to the last bit."""
    made = case(70, 40, types=(F32, BF16, BF16, F32))
    rows = ("hidden", "delta", "up_total", "up_normed")
    whole = run(name, made, out_dtype=BF16)
    for i in range(0, 70, 23):
        alone = run(
            name, {key: value[i : i + 1] if key in rows else value for key, value in made.items()}, out_dtype=BF16
        )
        for key in ("total", "normed", "d_hidden", "d_delta"):
            assert torch.equal(alone[key], whole[key][i : i + 1]), key


def assert_only_what_is_wanted(name: str) -> None:
    """Frozen weights get no gradient and change none; an output that nobody reads counts as none."""
    made = case(5, 8)
    want = run(name, made)
    hidden, delta, weight, bias = tensors(made)
    leaves = [hidden.clone().requires_grad_(), delta.clone().requires_grad_()]
    with ops.backend(name):
        outs = add_layer_norm(*leaves, weight, bias)
        found = torch.autograd.grad(outs, leaves, [made["up_total"], made["up_normed"]], retain_graph=True)
        assert torch.equal(found[0], want["d_hidden"]) and torch.equal(found[1], want["d_delta"])
        only = torch.autograd.grad(outs[0], leaves, made["up_total"], retain_graph=True)
        assert torch.equal(only[0], made["up_total"]) and torch.equal(only[1], made["up_total"])
        rest = torch.autograd.grad(outs[1], leaves, made["up_normed"])
        assert ops.rms_error(rest[0] + made["up_total"], want["d_hidden"]) <= 1e-6
        assert not any(x.requires_grad for x in add_layer_norm(hidden, delta, weight, bias))
