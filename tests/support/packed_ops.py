"""Cases and comparisons for tests of the packed ops: inputs, a run with gradients, packed against separate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from sambay_kernels import causal_conv1d, selective_scan
from sambay_kernels.native.cpp_build import BuildError, library
from torch import Tensor

BACKENDS = ("torch", "cpp")
LENGTHS = [0, 1, 2, 31, 32, 33, 0, 64, 65, 0]


@dataclass(frozen=True)
class Case:
    """One call of an op: tensors by name, which of them are per token or per document, and the documents' lengths."""

    op: Callable[..., tuple[Tensor, Tensor]]
    lengths: list[int]
    tensors: dict[str, Tensor]
    tokens: tuple[str, ...]
    states: tuple[str, ...] = ("initial_state",)

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, tensors={name: value.to(dtype) for name, value in self.tensors.items()})

    def without(self, *names: str) -> Case:
        return replace(self, tensors={name: value for name, value in self.tensors.items() if name not in names})

    def document(self, index: int) -> Case:
        """The same call for one document alone."""
        start = sum(self.lengths[:index])
        stop = start + self.lengths[index]
        tensors = dict(self.tensors)
        for name in tensors:
            if name in self.tokens:
                tensors[name] = tensors[name][start:stop]
            elif name in self.states:
                tensors[name] = tensors[name][index : index + 1]
        return replace(self, lengths=[self.lengths[index]], tensors=tensors)


def scan_case(lengths: Sequence[int], channels: int = 24, states: int = 16, seed: int = 0) -> Case:
    """Random inputs of `selective_scan`, all optional ones included."""
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    tensors = {
        "u": randn(total, channels),
        "delta": randn(total, channels),
        "A": -16.0 * torch.rand(channels, states, generator=g),
        "B": randn(total, states),
        "C": randn(total, states),
        "D": randn(channels),
        "z": randn(total, channels),
        "delta_bias": randn(channels),
        "initial_state": randn(len(lengths), channels, states),
    }
    return Case(selective_scan, list(lengths), tensors, ("u", "delta", "B", "C", "z"))


def conv_case(lengths: Sequence[int], channels: int = 24, width: int = 4, seed: int = 0) -> Case:
    """Random inputs of `causal_conv1d`, all optional ones included."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "x": torch.randn(sum(lengths), channels, generator=g),
        "weight": torch.randn(channels, width, generator=g),
        "bias": torch.randn(channels, generator=g),
        "initial_state": torch.randn(len(lengths), channels, width - 1, generator=g),
    }
    return Case(causal_conv1d, list(lengths), tensors, ("x",))


@contextmanager
def backend(name: str):
    """Choose the backend; skip the test if it can't run here."""
    if name == "cpp":
        try:
            library()
        except BuildError as error:
            pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMBAY_KERNELS", name)
        yield


def loss_weights(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The upstream gradients of y and final_state, float32 values that bfloat16 and float16 hold exactly."""
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=g).bfloat16().float() for name, shape in shapes.items()}


def run(case: Case, name: str, upstream: dict[str, Tensor] | None = None, **options: object) -> dict[str, Tensor]:
    """Outputs and gradients: y, final_state and d_NAME of every tensor."""
    leaves = {key: value.detach().clone().requires_grad_() for key, value in case.tensors.items()}
    with backend(name):
        y, final = case.op(**leaves, cu_seqlens=case.cu_seqlens, **options)
        if upstream is None:
            upstream = loss_weights({"y": y.shape, "final_state": final.shape})
        pairs = [(value, upstream[key].to(value.dtype)) for key, value in (("y", y), ("final_state", final))]
        outputs, weights = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    out = {"y": y.detach(), "final_state": final.detach()}
    for (key, leaf), grad in zip(leaves.items(), grads, strict=True):
        out[f"d_{key}"] = torch.zeros_like(leaf) if grad is None else grad
        assert out[f"d_{key}"].dtype == leaf.dtype
    return out


def rms_error(value: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact value; an all-zero exact value demands zero."""
    if exact.numel() == 0:
        return 0.0
    scale = exact.double().square().mean().sqrt()
    error = (value.double() - exact.double()).square().mean().sqrt()
    return float(error / scale) if scale > 0 else float(error)


def assert_close(found: dict[str, Tensor], exact: dict[str, Tensor], bound: float, **bounds: float) -> None:
    """Every output and gradient within the relative bound; `bounds` overrides it by name."""
    errors = {name: rms_error(found[name], value) for name, value in exact.items()}
    bad = {name: error for name, error in errors.items() if not error <= bounds.get(name, bound)}
    assert not bad, f"relative errors above the bound: {bad}"


def assert_packed_equals_separate(case: Case, name: str, *, exact: bool, **options: object) -> None:
    """One packed run against the documents' own runs.

    Outputs and per-token gradients bit for bit, or to 1e-6 of the larger of 1 and their size. Gradients of weights are
    sums over documents, which may be added in another order: to 1e-6 of the sum of the documents' absolute values.
    """
    packed = run(case, name, **options)
    upstream = loss_weights({"y": packed["y"].shape, "final_state": packed["final_state"].shape})
    parts, start = [], 0
    for index, length in enumerate(case.lengths):
        own = {"y": upstream["y"][start : start + length], "final_state": upstream["final_state"][index : index + 1]}
        parts.append(run(case.document(index), name, own, **options))
        start += length
    joined = {"y", "final_state", *(f"d_{key}" for key in (*case.tokens, *case.states))}
    for key, value in packed.items():
        own = [part[key] for part in parts]
        if key not in joined:
            difference, scale = value - torch.stack(own).sum(0), torch.stack(own).abs().sum(0)
            assert difference.norm() <= 1e-6 * scale.norm(), key
        elif exact:
            assert torch.equal(value, torch.cat(own)), key
        else:
            difference, scale = value - torch.cat(own), max(1.0, float(value.norm() / max(1, value.numel()) ** 0.5))
            assert difference.norm() <= 1e-6 * scale * max(1, value.numel()) ** 0.5, key
