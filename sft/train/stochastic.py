"""AdamW for weights that are held in bfloat16: steps are taken in float32 and rounded up or down by chance.

A step is often smaller than half of what separates two bfloat16 numbers, and rounding to the nearer one would undo it
each time. Rounded up with a probability that is its distance from the lower one, it is right on average: the expected
weight is the float32 one (Gupta et al. 2015, arXiv 1502.02551; for bfloat16 training Zamirai et al. 2020, arXiv
2010.06192).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

PIECE = 1 << 24
"""Values that are widened to float32 at once."""


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 `values` in bfloat16, each rounded to one of its two neighbours, with the expectation of its value.

    What bfloat16 holds exactly stays as it is; so do infinities, and what is no number is none after it.
    """
    bits = values.contiguous().view(torch.int32)
    # Of a float32's bits the upper half is a bfloat16: a carry out of the lower half makes it the next larger one.
    chance = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = (bits + chance).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


class StochasticAdamW(Optimizer):
    """torch's AdamW, computed in float32, for weights in bfloat16; weights in float32 are trained as torch does.

    The chance is drawn by a generator of its own, begun anew for each step and weight from the seed, the step and the
    weight's place: it is the same on every process and in a run that goes on, and nothing else draws from it.

    Args:
        groups: groups of torch's kind.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
        state_dtype: "float32" or "bfloat16", what both moments are held in; they are rounded by chance too.
        seed: of the rounding.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, {**own, "state_dtype": state_dtype, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all weights that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group, place)
                place += 1
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            kind = getattr(torch, group["state_dtype"]) if parameter.dtype == torch.bfloat16 else parameter.dtype
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter, dtype=kind) for _ in range(2))
        state["step"] += 1
        step = int(state["step"])
        generator = torch.Generator(parameter.device)
        generator.manual_seed(_seed(group["seed"], step, place))
        assert parameter.grad is not None and parameter.is_contiguous()
        held = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for pieces in _pieces(held):
            weight, grad, mean, square = (x.float() for x in pieces)  # what is float32 is itself, changed in place
            _adamw(weight, grad, mean, square, group, step)
            for old, new in zip((pieces[0], *pieces[2:]), (weight, mean, square), strict=True):
                if old.dtype == torch.bfloat16:
                    old.copy_(round_stochastically(new, generator))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the moments keep the type that they were saved in: torch's would get their weight's."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state_dict["state"].get(name, {}):
                    saved: Tensor = state_dict["state"][name][key]
                    self.state[parameter][key] = saved.to(parameter.device, copy=True)


def _seed(*numbers: int) -> int:
    """One number of 32 bits, which is what a CPU's generator takes, from several."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _pieces(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The same `PIECE` values of each at a time. Weights are contiguous, so what is done to these is done to them."""
    return zip(*(x.detach().reshape(-1).split(PIECE) for x in tensors), strict=True)


def _adamw(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, group: dict[str, Any], step: int) -> None:
    """A step of decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), in place."""
    beta1, beta2 = group["betas"]
    weight.mul_(1.0 - group["lr"] * group["weight_decay"])
    mean.lerp_(grad, 1.0 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    scale = (square / (1.0 - beta2**step)).sqrt_().add_(group["eps"])
    weight.addcdiv_(mean, scale, value=-group["lr"] / (1.0 - beta1**step))
