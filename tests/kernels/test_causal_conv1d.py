"""The causal convolution: every backend against the float64 loop, packed against separate, and as a torch op."""

from __future__ import annotations

import packed_ops as ops
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sambay_kernels import causal_conv1d
from sambay_kernels.ops.causal_conv1d.inputs import ConvInputs
from sambay_kernels.ops.causal_conv1d.op import causal_conv1d_bwd, causal_conv1d_fwd
from sambay_kernels.ops.causal_conv1d.reference import causal_conv1d_reference
from sambay_kernels.ops.causal_conv1d.torch import causal_conv1d_torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

backends = pytest.mark.parametrize("name", ops.BACKENDS)
LENGTHS = [0, 1, 2, 3, 4, 0, 50]


@backends
@pytest.mark.parametrize("channels", [1, 24, 64, 100])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_fp32_matches_the_float64_loop(name: str, channels: int, width: int) -> None:
    case = ops.conv_case(LENGTHS, channels=channels, width=width)
    ops.assert_close(ops.run(case, name), ops.run(case.to(torch.float64), "reference"), 1e-5)


@pytest.mark.parametrize("name", [*ops.BACKENDS, "reference"])
def test_one_document_is_torchs_convolution(name: str) -> None:
    case = ops.conv_case([50]).without("initial_state")
    x, weight, bias = (case.tensors[key] for key in ("x", "weight", "bias"))
    want = F.silu(F.conv1d(F.pad(x.t(), (3, 0)), weight[:, None], bias, groups=24)).t()
    with ops.backend(name):
        y, final = causal_conv1d(x, weight, bias)
    assert ops.rms_error(y, want) <= 1e-6 and torch.equal(final[0], x[-3:].t())


@backends
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("absent", [(), ("bias",), ("initial_state",), ("bias", "initial_state")])
def test_optional_inputs(name: str, activation: str | None, absent: tuple[str, ...]) -> None:
    case = ops.conv_case(LENGTHS).without(*absent)
    exact = ops.run(case.to(torch.float64), "reference", activation=activation)
    ops.assert_close(ops.run(case, name, activation=activation), exact, 1e-5)


@backends
def test_fp64_matches_the_loop_to_fp64(name: str) -> None:
    case = ops.conv_case(LENGTHS).to(torch.float64)
    ops.assert_close(ops.run(case, name), ops.run(case, "reference"), 1e-12)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(name: str, dtype: torch.dtype) -> None:
    case = ops.conv_case(LENGTHS).to(dtype)
    found = ops.run(case, name)
    assert found["y"].dtype == found["final_state"].dtype == dtype
    ops.assert_close(found, ops.run(case.to(torch.float64), "reference"), 5e-3)


@backends
def test_mixed_types_as_under_autocast(name: str) -> None:
    case = ops.conv_case(LENGTHS)
    case.tensors["x"] = case.tensors["x"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.run(case, name)
    assert found["d_weight"].dtype == torch.float32 and found["d_x"].dtype == torch.bfloat16
    exact = ops.run(case.to(torch.float64), "reference")
    ops.assert_close(found, exact, 5e-3, d_weight=1e-5, d_bias=1e-5)


@backends
def test_packed_equals_separate(name: str) -> None:
    ops.assert_packed_equals_separate(ops.conv_case(LENGTHS, channels=70), name, exact=name == "cpp")


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 40]), min_size=1, max_size=8),
    channels=st.sampled_from([1, 5, 64, 65]),
    width=st.sampled_from([1, 3, 4]),
    seed=st.integers(0, 1000),
)
def test_packed_equals_separate_for_any_documents(lengths: list[int], channels: int, width: int, seed: int) -> None:
    case = ops.conv_case(lengths, channels=channels, width=width, seed=seed)
    for name in ops.BACKENDS:
        ops.assert_packed_equals_separate(case, name, exact=name == "cpp")


@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_document_stays_alone(name: str, bad: float) -> None:
    """NaN or infinity in document 1 moves no bit of documents 0 and 2, outputs or gradients."""
    case = ops.conv_case([5, 4, 6])
    clean = ops.run(case, name)
    case.tensors["x"][5:9] = bad
    case.tensors["initial_state"][1] = bad
    dirty = ops.run(case, name)
    for key in ("y", "d_x"):
        assert torch.equal(clean[key][:5], dirty[key][:5]) and torch.equal(clean[key][9:], dirty[key][9:]), key
    for key in ("final_state", "d_initial_state"):
        assert torch.equal(clean[key][[0, 2]], dirty[key][[0, 2]]), key


@backends
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 20, 50])
def test_the_state_carries_a_document_on(name: str, cut: int) -> None:
    case = ops.conv_case([50])
    with ops.backend(name):
        y, final = causal_conv1d(**case.tensors)
        first = {**case.tensors, "x": case.tensors["x"][:cut]}
        y1, middle = causal_conv1d(**first)
        y2, end = causal_conv1d(**{**case.tensors, "x": case.tensors["x"][cut:], "initial_state": middle})
    assert ops.rms_error(torch.cat([y1, y2]), y) <= 1e-6 and torch.equal(end, final)


@backends
def test_decode_steps_equal_one_pass(name: str) -> None:
    """B one-token documents a step, states handed on, against one packed pass over B documents."""
    documents, steps = 3, 6
    case = ops.conv_case([steps] * documents)
    with ops.backend(name):
        want, want_state = causal_conv1d(**case.tensors, cu_seqlens=case.cu_seqlens)
        state, borders, rows = case.tensors["initial_state"], torch.arange(documents + 1, dtype=torch.int32), []
        for step in range(steps):
            now = {**case.tensors, "x": case.tensors["x"][step::steps], "initial_state": state}
            y, state = causal_conv1d(**now, cu_seqlens=borders)
            rows.append(y)
    assert ops.rms_error(torch.stack(rows, 1).reshape(want.shape), want) <= 1e-6
    assert torch.equal(state, want_state)


@backends
def test_nothing_to_do(name: str) -> None:
    for lengths in ([], [0], [0, 0]):
        case = ops.conv_case(lengths)
        found = ops.run(case, name)
        assert found["y"].shape == (0, 24) and found["d_weight"].abs().max() == 0
        assert torch.equal(found["final_state"], case.tensors["initial_state"])


@backends
def test_strided_rows(name: str) -> None:
    case = ops.conv_case([40, 9])
    want = ops.run(case, name)
    x = torch.cat([case.tensors["x"], torch.ones(49, 24)], 1)[:, :24]
    with ops.backend(name):
        y, _ = causal_conv1d(**{**case.tensors, "x": x}, cu_seqlens=case.cu_seqlens)
    assert ops.rms_error(y, want["y"]) <= 1e-7


def test_gradcheck_of_the_reference() -> None:
    case = ops.conv_case([3, 0, 1], channels=2, width=3).to(torch.float64)

    def call(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = dict(zip(case.tensors, values, strict=True))
        return causal_conv1d_reference(ConvInputs(**tensors, cu_seqlens=case.cu_seqlens))

    assert torch.autograd.gradcheck(call, [value.requires_grad_() for value in case.tensors.values()])


def test_the_torch_form_is_differentiable_by_itself() -> None:
    """It travels inside exported models without the op around it."""
    case = ops.conv_case(LENGTHS).to(torch.float64)
    want = ops.run(case, "reference")
    leaves = {key: value.clone().requires_grad_() for key, value in case.tensors.items()}
    y, final = causal_conv1d_torch(**leaves, cu_seqlens=case.cu_seqlens)
    weights = ops.loss_weights({"y": y.shape, "final_state": final.shape})
    grads = torch.autograd.grad([y, final], list(leaves.values()), [w.double() for w in weights.values()])
    for key, grad in zip(leaves, grads, strict=True):
        assert ops.rms_error(grad, want[f"d_{key}"]) <= 1e-12, key


@backends
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(name: str, full: bool) -> None:
    case = ops.conv_case([5, 0, 40], channels=8)
    case = case if full else case.without("bias", "initial_state")
    values = {key: value.requires_grad_() for key, value in case.tensors.items()}
    inputs = [values.get(key) for key in ("x", "weight", "bias")]
    args = (*inputs, "silu" if full else None, case.cu_seqlens if full else None, values.get("initial_state"))
    with ops.backend(name):
        torch.library.opcheck(causal_conv1d_fwd.op, (*args, name))
        plain = [value.detach() if isinstance(value, torch.Tensor) else value for value in args]
        y, final = causal_conv1d_fwd(*plain, name)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(causal_conv1d_bwd.op, (y, final, *plain, name), test_utils=tests)


@backends
def test_compile_and_checkpoint_give_the_same_gradients(name: str) -> None:
    case = ops.conv_case([5, 40], channels=8)
    names, values = list(case.tensors), list(case.tensors.values())

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        y, final = causal_conv1d(**dict(zip(names, tensors, strict=True)), cu_seqlens=case.cu_seqlens)
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
        assert torch.equal(one, three) and ops.rms_error(two, one) <= 1e-7


def test_flops_are_counted() -> None:
    case = ops.conv_case([40], channels=8)
    with ops.backend("torch"), FlopCounterMode(display=False) as counter:
        causal_conv1d(**{key: value.requires_grad_() for key, value in case.tensors.items()})[0].sum().backward()
    assert counter.get_total_flops() == 6 * 40 * 8 * 4


BAD = {
    "x must have 2 dimensions": {"x": torch.zeros(3)},
    "x must be float32": {"x": torch.zeros(7, 24, dtype=torch.int32)},
    "weight must have 2 dimensions": {"weight": torch.zeros(24, 1, 4)},
    "weight must have shape \\(24, 4\\)": {"weight": torch.zeros(23, 4)},
    "weight must have at least one column": {"weight": torch.zeros(24, 0)},
    "bias must have shape": {"bias": torch.zeros(1)},
    "activation must be 'silu' or None, got 'relu'": {"activation": "relu"},
    "initial_state must have shape \\(2, 24, 3\\)": {"initial_state": torch.zeros(3, 24, 3)},
    "weight is on meta": {"weight": torch.zeros(24, 4, device="meta")},
    "must be int32": {"cu_seqlens": torch.tensor([0, 3, 7])},
    "must start at 0, got 1": {"cu_seqlens": torch.tensor([1, 3, 7], dtype=torch.int32)},
    "must end at the number of tokens, 7, got 6": {"cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)},
    "must not decrease": {
        "cu_seqlens": torch.tensor([0, 5, 3, 7], dtype=torch.int32),
        "initial_state": torch.zeros(3, 24, 3),
    },
}


@pytest.mark.parametrize("name", [*ops.BACKENDS, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(name: str, message: str) -> None:
    case = ops.conv_case([3, 4])
    with ops.backend(name), pytest.raises(ValueError, match=message):
        causal_conv1d(**{**case.tensors, "cu_seqlens": case.cu_seqlens, **BAD[message]})
