"""The CUDA C++ scan on the CPU, by an emulated runtime: the very kernels of csrc/*.cu against the float64 loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import emulated_cuda
import packed_ops as ops
import pytest
import torch
from sambay_kernels import selective_scan
from sambay_kernels.native import cuda_call
from sambay_kernels.ops.selective_scan import cuda as cuda_backend
from sambay_kernels.ops.selective_scan.op import selective_scan_bwd, selective_scan_fwd
from torch.utils.checkpoint import checkpoint

KEPT = cuda_backend.CUDA_KEPT_EVERY
HALF = KEPT // 2  # the backward's block of tokens
LENGTHS = [0, 1, 2, HALF - 1, HALF, HALF + 1, KEPT - 1, KEPT, KEPT + 1, 0, 2 * KEPT + 3, 0]


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with emulated_cuda.emulated():
        yield


@pytest.fixture(params=["whole", "cut"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents in one segment, and cut into segments of one kept block each."""
    if request.param == "cut":
        monkeypatch.setattr(cuda_backend, "segment_length", lambda *_: KEPT)


def run(case: ops.Case, **options: object) -> dict[str, torch.Tensor]:
    """Outputs and gradients by the emulated kernels (whose fixture leaves no other choice)."""
    return ops.run(case, "torch", **options)


def exact(case: ops.Case, **options: object) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulated_cuda.scan_api, "backend_for", lambda *_: "reference")
        return ops.run(case.to(torch.float64), "reference", **options)


@pytest.mark.parametrize("channels", [1, 24, 130])
def test_fp32_matches_the_float64_loop(cut: None, channels: int) -> None:
    case = ops.scan_case(LENGTHS, channels=channels)
    ops.assert_close(run(case), exact(case), 1e-6)


def test_one_long_document_among_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "segment_length", lambda *_: 2 * KEPT)
    case = ops.scan_case([3, 9 * KEPT + 5, 2 * KEPT, 2 * KEPT + 1])
    case.tensors["delta"].sub_(3.0)  # small steps, so that the beginning is felt at the end
    case.tensors["A"].mul_(0.05)
    ops.assert_close(run(case), exact(case), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(cut: None, dtype: torch.dtype) -> None:
    case = ops.scan_case([2 * KEPT + 3, 3, 17])
    case = replace(case, tensors={k: v.to(dtype) if k in case.tokens else v for k, v in case.tensors.items()})
    found = run(case)
    assert found["y"].dtype == dtype and found["final_state"].dtype == torch.float32
    wide = dict.fromkeys(("d_A", "d_D", "d_delta_bias", "d_initial_state", "final_state"), 1e-5)
    ops.assert_close(found, exact(case), 5e-3, **wide)


def test_mixed_types_are_calculated_in_float32() -> None:
    case = ops.scan_case([5, 20])
    case = replace(case, tensors={k: v.bfloat16() if k in ("u", "B", "A") else v for k, v in case.tensors.items()})
    ops.assert_close(run(case), exact(case), 5e-3, d_delta=1e-6, d_C=1e-6, final_state=1e-6)


@pytest.mark.parametrize("states", [1, 5, 16, 17, 40, 256])
@pytest.mark.parametrize("absent", [("initial_state",), ("D", "z", "delta_bias")])
def test_any_number_of_states(cut: None, absent: tuple[str, ...], states: int) -> None:
    """Lanes share a channel from 17 states on: 256 states are 2 channels a warp, 8 a block."""
    case = ops.scan_case([KEPT + 1, 0, 9], channels=11, states=states).without(*absent)
    ops.assert_close(run(case), exact(case), 1e-6)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("z", "initial_state")])
def test_optional_inputs(absent: tuple[str, ...]) -> None:
    case = ops.scan_case([5, 0, 20]).without(*absent)
    ops.assert_close(run(case), exact(case), 1e-6)


def test_without_softplus(cut: None) -> None:
    case = ops.scan_case([5, 0, 20])
    case.tensors["delta"].abs_().mul_(0.1)
    case.tensors["delta_bias"].abs_()
    ops.assert_close(run(case, delta_softplus=False), exact(case, delta_softplus=False), 1e-6)


@pytest.mark.parametrize("delta", [-30.0, 19.9, 20.1, 60.0])
def test_tiny_and_huge_steps(cut: None, delta: float) -> None:
    """A = -16 with a step of 5 underflows the decay; softplus passes through above 20."""
    case = ops.scan_case([20, 13]).without("delta_bias")
    case.tensors["A"].fill_(-16.0)
    case.tensors["delta"].fill_(delta).add_(torch.linspace(-0.05, 0.05, 24))
    want, found = exact(case), run(case)
    assert ops.rms_error(found["y"], want["y"]) <= 1e-5
    for key in found:
        difference = (found[key].double() - want[key]).abs()
        assert (difference <= 2e-5 * want[key].abs().max() + 1e-30).all(), key


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_output_used(cut: None, used: int) -> None:
    case = ops.scan_case([5, 0, 20])
    found, want = [], []
    for grads, wide, backend in ((found, torch.float32, "cuda"), (want, torch.float64, "reference")):
        leaves = [value.to(wide).requires_grad_() for value in case.tensors.values()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(emulated_cuda.scan_api, "backend_for", lambda *_, backend=backend: backend)
            out = case.op(**dict(zip(case.tensors, leaves, strict=True)), cu_seqlens=case.cu_seqlens)[used]
        grads += torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    for key, one, two in zip(case.tensors, found, want, strict=True):
        zero = torch.zeros_like(case.tensors[key])
        assert ops.rms_error(zero if one is None else one, zero if two is None else two) <= 1e-6, key


def test_strided_rows_are_read_in_place() -> None:
    """B and C are views of one projection, u and z of another, as in the model; what lies between them is NaN."""
    case = ops.scan_case([5, 20])
    want = run(case)
    views = dict(case.tensors)
    for one, two in (("B", "C"), ("u", "z")):
        tokens, width = case.tensors[one].shape
        wide = torch.full((tokens, 2 * width + 7), float("nan"))
        wide[:, 1 : width + 1], wide[:, width + 4 : 2 * width + 4] = case.tensors[one], case.tensors[two]
        views[one], views[two] = wide[:, 1 : width + 1], wide[:, width + 4 : 2 * width + 4]
    found = run(replace(case, tensors=views))
    assert all(torch.equal(found[key], want[key]) for key in want)


def test_packed_equals_separate() -> None:
    ops.assert_packed_equals_separate(ops.scan_case(LENGTHS), "torch", exact=True)


@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
def test_one_document_changes_nothing_in_another(cut: None, bad: float) -> None:
    case = ops.scan_case([20, 17, 5])
    changed = replace(case, tensors={key: value.clone() for key, value in case.tensors.items()})
    for key in case.tokens:
        changed.tensors[key][20:37] += bad
    before, after = run(case), run(changed)
    others = torch.tensor([*range(20), *range(37, 42)])
    for key in ("y", *(f"d_{name}" for name in case.tokens)):
        assert torch.equal(before[key][others], after[key][others]), key
    for key in ("final_state", "d_initial_state"):
        assert torch.equal(before[key][[0, 2]], after[key][[0, 2]]), key


@pytest.mark.parametrize("states", [16, 40])
def test_no_order_of_the_threads_changes_a_bit(cut: None, states: int) -> None:
    """A missing barrier would: threads would read shared memory before others had written it."""
    case = ops.scan_case([KEPT + 9, KEPT, 5], channels=130 if states == 16 else 40, states=states)
    first = run(case)
    for order in (1, 2):
        emulated_cuda.set_order(order)
        again = run(case)
        assert all(torch.equal(first[key], again[key]) for key in first), order


def test_without_tokens() -> None:
    for lengths in ([], [0], [0, 0]):
        case = ops.scan_case(lengths)
        found = run(case)
        assert torch.equal(found["final_state"], case.tensors["initial_state"])
        assert found["y"].shape == (0, 24) and found["d_A"].abs().max() == 0


def test_as_a_torch_op() -> None:
    case = ops.scan_case([3, 9])
    values = [case.tensors[key] for key in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    inputs = (*values, True, case.cu_seqlens, case.tensors["initial_state"])
    torch.library.opcheck(selective_scan_fwd.op, (*[x.requires_grad_() for x in values], *inputs[8:], True, "cuda"))
    fixed = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
    y, final, kept = selective_scan_fwd(*fixed, True, "cuda")
    torch.library.opcheck(selective_scan_bwd.op, (y, final, *fixed, kept, "cuda"))


def test_checkpointed_gradients_are_the_same() -> None:
    case = ops.scan_case([3, 9])
    leaves = {key: value.requires_grad_() for key, value in case.tensors.items()}

    def loss(**tensors: torch.Tensor) -> torch.Tensor:
        y, final = case.op(**tensors, cu_seqlens=case.cu_seqlens)
        return y.square().sum() + final.sum()

    forms = (loss, lambda **x: checkpoint(loss, use_reentrant=False, **x))
    one, two = (torch.autograd.grad(form(**leaves), list(leaves.values())) for form in forms)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_too_many_states_are_an_error() -> None:
    u, maps = torch.ones(3, 2), torch.ones(3, 257)
    with pytest.raises(ValueError, match="up to 256 states a channel, got 257: use SAMBAY_KERNELS=triton"):
        selective_scan(u, u, -torch.ones(2, 257), maps, maps)


def test_a_launch_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_call, "sizeof", lambda _: 8)  # a structure that C++ knows otherwise
    u = torch.ones(3, 2)
    said = r"kernel scan_forward can't run on cpu: invalid argument \(error 1\): SAMBAY_KERNELS=triton avoids it"
    with pytest.raises(cuda_call.KernelError, match=said):
        selective_scan(u, u, -torch.ones(2, 3), torch.ones(3, 3), torch.ones(3, 3))
