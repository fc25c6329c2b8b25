"""The selective scan: every backend against the float64 loop, packed against separate documents, and as a torch op."""

from __future__ import annotations

import itertools
from dataclasses import replace

import packed_ops as ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sambay_kernels import selective_scan
from sambay_kernels.ops.selective_scan.inputs import ScanInputs
from sambay_kernels.ops.selective_scan.op import selective_scan_bwd, selective_scan_fwd
from sambay_kernels.ops.selective_scan.reference import selective_scan_reference
from sambay_kernels.ops.selective_scan.torch import selective_scan_torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

backends = pytest.mark.parametrize("name", ops.BACKENDS)


@backends
@pytest.mark.parametrize("channels", [1, 24, 64, 100])
def test_fp32_matches_the_float64_loop(name: str, channels: int) -> None:
    case = ops.scan_case(ops.LENGTHS, channels=channels)
    ops.assert_close(ops.run(case, name), ops.run(case.to(torch.float64), "reference"), 1e-5)


@backends
def test_fp64_matches_the_loop_to_fp64(name: str) -> None:
    case = ops.scan_case(ops.LENGTHS).to(torch.float64)
    found = ops.run(case, name)
    assert found["final_state"].dtype == torch.float64
    ops.assert_close(found, ops.run(case, "reference"), 1e-12)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(name: str, dtype: torch.dtype) -> None:
    case = ops.scan_case([40, 3, 70]).to(dtype)
    found = ops.run(case, name)
    assert found["y"].dtype == dtype and found["final_state"].dtype == torch.float32
    ops.assert_close(found, ops.run(case.to(torch.float64), "reference"), 5e-3)


@backends
def test_mixed_types_as_under_autocast(name: str) -> None:
    case = ops.scan_case([40, 3])
    mixed = {key: case.tensors[key].bfloat16() for key in ("u", "delta", "B", "C", "z")}
    case = replace(case, tensors={**case.tensors, **mixed})
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.run(case, name)
    assert found["d_A"].dtype == torch.float32 and found["d_u"].dtype == torch.bfloat16
    exact = ops.run(case.to(torch.float64), "reference")
    ops.assert_close(found, exact, 5e-3, d_A=1e-5, d_initial_state=1e-5, final_state=1e-5)


@backends
@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("initial_state",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("softplus", [True, False])
def test_optional_inputs(name: str, absent: tuple[str, ...], softplus: bool) -> None:
    case = ops.scan_case([5, 0, 40]).without(*absent)
    if not softplus:
        case.tensors["delta"].abs_().mul_(0.1)
        case.tensors.get("delta_bias", torch.zeros(1)).abs_()
    exact = ops.run(case.to(torch.float64), "reference", delta_softplus=softplus)
    ops.assert_close(ops.run(case, name, delta_softplus=softplus), exact, 1e-5)


@backends
def test_only_one_output_used(name: str) -> None:
    case = ops.scan_case([5, 0, 40])
    exact = ops.run(case.to(torch.float64), "reference")
    for unused in ("y", "final_state"):
        upstream = ops.loss_weights({key: exact[key].shape for key in ("y", "final_state")})
        upstream[unused] = torch.zeros_like(upstream[unused])
        want = ops.run(case.to(torch.float64), "reference", upstream)
        leaves = {key: value.clone().requires_grad_() for key, value in case.tensors.items()}
        with ops.backend(name):
            y, final = selective_scan(**leaves, cu_seqlens=case.cu_seqlens)
            used, key = (final, "final_state") if unused == "y" else (y, "y")
            grads = torch.autograd.grad(used, list(leaves.values()), upstream[key], allow_unused=True)
        for leaf, grad in zip(leaves, grads, strict=True):
            found = torch.zeros_like(leaves[leaf]) if grad is None else grad
            assert ops.rms_error(found, want[f"d_{leaf}"]) <= 1e-5, leaf


@backends
@pytest.mark.parametrize("delta", [-30.0, -5.0, 4.9, 19.9, 20.1, 60.0])
def test_tiny_and_huge_steps(name: str, delta: float) -> None:
    """A = -16 with a step of 5 underflows the decay; softplus passes through above 20."""
    case = ops.scan_case([40, 33]).without("delta_bias")
    case.tensors["A"].fill_(-16.0)
    case.tensors["delta"].fill_(delta).add_(torch.linspace(-0.05, 0.05, 24))
    exact = ops.run(case.to(torch.float64), "reference")
    found = ops.run(case, name)
    assert all(value.isfinite().all() for value in found.values())
    # Gradients that pass through an underflowing decay are zero in float32, and next to nothing in float64.
    assert ops.rms_error(found["y"], exact["y"]) <= 1e-5
    for key in found:
        difference = (found[key].double() - exact[key]).abs()
        assert (difference <= 2e-5 * exact[key].abs().max() + 1e-30).all(), key


@backends
def test_denormal_states_stay_right(name: str) -> None:
    """A state without input halves at every step, through the denormal numbers, to nothing."""
    case = ops.scan_case([300], channels=4).without("D", "z", "delta_bias")
    case.tensors["A"].fill_(-1.0)
    case.tensors["delta"].fill_(0.0)
    case.tensors["u"].fill_(0.0)
    found, exact = ops.run(case, name), ops.run(case.to(torch.float64), "reference")
    assert found["final_state"].abs().max() <= 1e-38
    ops.assert_close({**found, "final_state": exact["final_state"]}, exact, 1e-5)


@backends
def test_softplus_and_decay_are_accurate_everywhere(name: str) -> None:
    """One-token documents whose output is the step itself, or the decay itself: relative error of each value."""
    count = 4001
    borders, one = torch.arange(count + 1, dtype=torch.int32), torch.ones(count, 1)
    steps = torch.linspace(-80, 30, count)[:, None]
    with ops.backend(name):
        y, _ = selective_scan(one, steps, torch.zeros(1, 1), one, one, cu_seqlens=borders)
        want = torch.nn.functional.softplus(steps.double())
        # Rounding the exponent of an exponential alone costs 6e-8 times its size.
        assert ((y - want).abs() / want / (1 + steps.double().abs())).max() <= 3e-7
        steps = torch.linspace(0, 86, count)[:, None]
        inputs = {"delta_softplus": False, "cu_seqlens": borders, "initial_state": one[:, :, None]}
        y, _ = selective_scan(one * 0, steps, -torch.ones(1, 1), one, one, **inputs)
        want = torch.exp(-steps.double())
    assert ((y - want).abs() / want / (1 + steps.double())).max() <= 3e-7
    assert y[0] == 1


@backends
def test_packed_equals_separate(name: str) -> None:
    ops.assert_packed_equals_separate(ops.scan_case(ops.LENGTHS, channels=70), name, exact=name == "cpp")


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 7, 31, 32, 33, 63, 65, 97]), min_size=1, max_size=6),
    channels=st.sampled_from([1, 5, 16, 65]),
    states=st.sampled_from([1, 3, 16]),
    seed=st.integers(0, 1000),
)
def test_packed_equals_separate_for_any_documents(lengths: list[int], channels: int, states: int, seed: int) -> None:
    case = ops.scan_case(lengths, channels=channels, states=states, seed=seed)
    for name in ops.BACKENDS:
        ops.assert_packed_equals_separate(case, name, exact=name == "cpp")


@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_document_stays_alone(name: str, bad: float) -> None:
    """NaN or infinity in document 1 moves no bit of documents 0 and 2, outputs or gradients."""
    case = ops.scan_case([40, 33, 45])
    clean = ops.run(case, name)
    for key in ("u", "delta", "B", "C", "z"):
        case.tensors[key][50] = bad
    case.tensors["initial_state"][1] = bad
    dirty = ops.run(case, name)
    for key in ("y", "d_u", "d_delta", "d_B", "d_C", "d_z"):
        assert torch.equal(clean[key][:40], dirty[key][:40]), key
        assert torch.equal(clean[key][73:], dirty[key][73:]), key
    assert dirty["y"][50:73].isnan().any()
    for key in ("final_state", "d_initial_state"):
        assert torch.equal(clean[key][[0, 2]], dirty[key][[0, 2]]), key


@backends
def test_same_input_same_bits_for_any_number_of_threads(name: str) -> None:
    case = ops.scan_case([60, 5, 35], channels=130)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            found.append(ops.run(case, name))
    finally:
        torch.set_num_threads(before)
    # Plain torch splits its sums over threads, so it only repeats itself with the same number.
    repeat = [found[::2], found[1::2]] if name == "torch" else [found]
    for one, two in itertools.chain.from_iterable(itertools.pairwise(runs) for runs in repeat):
        assert all(torch.equal(one[key], two[key]) for key in one)


@backends
@pytest.mark.parametrize("cut", [0, 1, 31, 32, 70, 77])
def test_the_state_carries_a_document_on(name: str, cut: int) -> None:
    """A document in two calls, the second starting from the first one's final state, equals one call."""
    case = ops.scan_case([77])
    with ops.backend(name):
        y, final = selective_scan(**case.tensors)
        first = {k: v[:cut] if k in case.tokens else v for k, v in case.tensors.items()}
        second = {k: v[cut:] if k in case.tokens else v for k, v in case.tensors.items()}
        y1, middle = selective_scan(**first)
        y2, end = selective_scan(**{**second, "initial_state": middle})
    assert ops.rms_error(torch.cat([y1, y2]), y) <= 1e-6 and ops.rms_error(end, final) <= 1e-6


@backends
def test_decode_steps_equal_one_pass(name: str) -> None:
    """B one-token documents a step, states handed on, against one packed pass over B documents."""
    documents, steps = 3, 5
    case = ops.scan_case([steps] * documents)
    with ops.backend(name):
        want, want_state = selective_scan(**case.tensors, cu_seqlens=case.cu_seqlens)
        state, borders, rows = case.tensors["initial_state"], torch.arange(documents + 1, dtype=torch.int32), []
        for step in range(steps):
            at = torch.arange(documents) * steps + step
            now = {k: v[at] if k in case.tokens else v for k, v in case.tensors.items()}
            y, state = selective_scan(**{**now, "initial_state": state}, cu_seqlens=borders)
            rows.append(y)
    found = torch.stack(rows, 1).reshape(want.shape)
    assert ops.rms_error(found, want) <= 1e-6 and ops.rms_error(state, want_state) <= 1e-6


@backends
def test_nothing_to_do(name: str) -> None:
    for lengths in ([], [0], [0, 0]):
        case = ops.scan_case(lengths)
        found = ops.run(case, name)
        assert found["y"].shape == (0, 24)
        assert torch.equal(found["final_state"], case.tensors["initial_state"])
        assert found["d_A"].abs().max() == 0


@backends
def test_strided_rows(name: str) -> None:
    """B and C are slices of one projection, u and z halves of another."""
    case = ops.scan_case([40, 9])
    want = ops.run(case, name)
    strided = dict(case.tensors)
    wide = torch.cat([case.tensors["B"], case.tensors["C"]], 1)
    strided["B"], strided["C"] = wide[:, :16], wide[:, 16:]
    wide = torch.cat([case.tensors["u"], case.tensors["z"]], 1)
    strided["u"], strided["z"] = wide[:, :24], wide[:, 24:]
    strided["delta"] = case.tensors["delta"].t().contiguous().t()
    with ops.backend(name):
        y, _ = selective_scan(**strided, cu_seqlens=case.cu_seqlens)
    assert torch.equal(y, want["y"]) if name == "cpp" else ops.rms_error(y, want["y"]) <= 1e-6


def test_gradcheck_of_the_reference() -> None:
    case = ops.scan_case([3, 0, 2], channels=2, states=2).to(torch.float64)
    names = list(case.tensors)

    def call(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return selective_scan_reference(ScanInputs(**dict(zip(names, values, strict=True)), cu_seqlens=case.cu_seqlens))

    assert torch.autograd.gradcheck(call, [value.requires_grad_() for value in case.tensors.values()])


def test_the_torch_form_is_differentiable_by_itself() -> None:
    """It travels inside exported models without the op around it."""
    case = ops.scan_case([40, 0, 33]).to(torch.float64)
    want = ops.run(case, "reference")
    leaves = {key: value.clone().requires_grad_() for key, value in case.tensors.items()}
    y, final = selective_scan_torch(**leaves, cu_seqlens=case.cu_seqlens)
    weights = ops.loss_weights({"y": y.shape, "final_state": final.shape})
    grads = torch.autograd.grad([y, final], list(leaves.values()), [w.double() for w in weights.values()])
    for key, grad in zip(leaves, grads, strict=True):
        assert ops.rms_error(grad, want[f"d_{key}"]) <= 1e-12, key


def test_channel_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sambay_kernels.ops.selective_scan import torch as torch_backend
    from sambay_kernels.ops.selective_scan import torch_backward

    case = ops.scan_case([40, 33], channels=40)
    want = ops.run(case, "torch")
    monkeypatch.setattr(torch_backend, "SCAN_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(torch_backward, "SCAN_BLOCK_ELEMENTS", 1)
    ops.assert_close(ops.run(case, "torch"), want, 1e-6)


@backends
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(name: str, full: bool) -> None:
    case = ops.scan_case([5, 0, 40], channels=8)
    case = case if full else case.without("D", "z", "delta_bias", "initial_state")
    values = {key: value.requires_grad_() for key, value in case.tensors.items()}
    optional = [values.get(key) for key in ("D", "z", "delta_bias")]
    inputs = [values[key] for key in ("u", "delta", "A", "B", "C")] + optional
    borders = case.cu_seqlens if full else None
    args = (*inputs, True, borders, values.get("initial_state"))
    with ops.backend(name):
        torch.library.opcheck(selective_scan_fwd.op, (*args, True, name))
        plain = [value.detach() if isinstance(value, torch.Tensor) else value for value in args]
        y, final, kept = selective_scan_fwd(*plain, True, name)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(selective_scan_bwd.op, (y, final, *plain, kept, name), test_utils=tests)


@backends
def test_compile_and_checkpoint_give_the_same_gradients(name: str) -> None:
    case = ops.scan_case([5, 40], channels=8)
    names, values = list(case.tensors), list(case.tensors.values())

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        y, final = selective_scan(**dict(zip(names, tensors, strict=True)), cu_seqlens=case.cu_seqlens)
        return y.sin().sum() + final.sin().sum()

    def gradients(function: object) -> list[torch.Tensor]:
        leaves = [value.clone().requires_grad_() for value in values]
        return list(torch.autograd.grad(function(*leaves), leaves))

    torch.compiler.reset()  # a compiled graph keeps the backend it was traced with
    with ops.backend(name):
        want = gradients(call)
        compiled = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"))
        kept = gradients(lambda *leaves: checkpoint(call, *leaves, use_reentrant=False))
    for one, two, three in zip(want, compiled, kept, strict=True):
        assert torch.equal(one, three)
        assert ops.rms_error(two, one) <= 1e-7


def test_no_grad_keeps_no_states() -> None:
    case = ops.scan_case([64, 64])
    args = [case.tensors.get(key) for key in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    with ops.backend("cpp"):
        for save, rows in ((True, 128 // 32 + 2), (False, 0)):
            kept = selective_scan_fwd(*args, True, case.cu_seqlens, None, save, "cpp")[2]
            assert kept.shape[0] == rows


def test_flops_are_counted() -> None:
    case = ops.scan_case([40], channels=8)
    with ops.backend("torch"), FlopCounterMode(display=False) as counter:
        selective_scan(**{key: value.requires_grad_() for key, value in case.tensors.items()})[0].sum().backward()
    assert counter.get_total_flops() == 21 * 40 * 8 * 16


BAD = {
    "u must have 2 dimensions": {"u": torch.zeros(3)},
    "u must be float32": {"u": torch.zeros(7, 24, dtype=torch.int32)},
    "delta must have shape \\(7, 24\\)": {"delta": torch.zeros(6, 24)},
    "A must have 2 dimensions": {"A": torch.zeros(24)},
    "A must have shape \\(24, 16\\)": {"A": torch.zeros(23, 16)},
    "B must have shape \\(7, 16\\)": {"B": torch.zeros(7, 15)},
    "C must be float32": {"C": torch.zeros(7, 16, dtype=torch.int64)},
    "D must have shape": {"D": torch.zeros(1)},
    "z must have shape": {"z": torch.zeros(7, 23)},
    "delta_bias must have shape": {"delta_bias": torch.zeros(24, 1)},
    "initial_state must have shape \\(2, 24, 16\\)": {"initial_state": torch.zeros(3, 24, 16)},
    "delta is on meta": {"delta": torch.zeros(7, 24, device="meta")},
    "must be int32": {"cu_seqlens": torch.tensor([0, 3, 7])},
    "must have shape \\(documents \\+ 1,\\)": {"cu_seqlens": torch.zeros(1, 3, dtype=torch.int32)},
    "is on meta but": {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")},
    "must start at 0, got 1": {"cu_seqlens": torch.tensor([1, 3, 7], dtype=torch.int32)},
    "must end at the number of tokens, 7, got 6": {"cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)},
    "must not decrease": {
        "cu_seqlens": torch.tensor([0, 5, 3, 7], dtype=torch.int32),
        "initial_state": torch.zeros(3, 24, 16),
    },
}


@pytest.mark.parametrize("name", [*ops.BACKENDS, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(name: str, message: str) -> None:
    case = ops.scan_case([3, 4])
    with ops.backend(name), pytest.raises(ValueError, match=message):
        selective_scan(**{**case.tensors, "cu_seqlens": case.cu_seqlens, **BAD[message]})


def test_too_many_elements() -> None:
    u = torch.zeros(1, 1).expand(2**16, 2**15)
    with pytest.raises(ValueError, match="more than 2\\*\\*31 - 1: split the row"):
        selective_scan(u, u, torch.zeros(2**15, 1), u[:, :1], u[:, :1])
