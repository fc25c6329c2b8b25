"""Residual addition and LayerNorm: every backend against the definition in float64, and as a torch op."""

from __future__ import annotations

import norm_ops as norm
import packed_ops as ops
import pytest
import torch
import torch.nn.functional as F
from norm_ops import BF16, F32
from sambay_kernels import add_layer_norm
from sambay_kernels.ops.add_layer_norm import api
from sambay_kernels.ops.add_layer_norm.op import add_layer_norm_bwd, add_layer_norm_fwd
from sambay_kernels.ops.add_layer_norm.reference import add_layer_norm_reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

backends = pytest.mark.parametrize("name", ops.BACKENDS)


@pytest.fixture(autouse=True)
def even_a_small_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """By C++ where that is asked for."""
    monkeypatch.setattr(api, "SMALL", 0)


AUTOCAST = (F32, BF16, BF16, F32)  # what the model has under autocast


@backends
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", [(1,), (5,), (0, 4), (17, 1), (33, 70), (2, 3, 5), (300, 160), (7, 2560)])
def test_fp32_matches_float64(name: str, shape: tuple[int, ...], added: bool) -> None:
    made = norm.case(*shape, added=added)
    ops.assert_close(norm.run(name, made), norm.run("reference", norm.wide(made)), 1e-5)


@backends
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("types", norm.TYPES)
def test_other_types(name: str, types: tuple[torch.dtype, ...], added: bool) -> None:
    made = norm.case(33, 70, types=types, added=added)
    found = norm.run(name, made, out_dtype=types[2])
    ops.assert_close(found, norm.run("reference", norm.wide(made)), 5e-3)


@backends
def test_float64(name: str) -> None:
    made = norm.wide(norm.case(33, 70))
    ops.assert_close(norm.run(name, made), norm.run("reference", made), 1e-13)


@backends
@pytest.mark.parametrize("weights", [F32, BF16])
def test_as_the_operations_it_stands_for(name: str, weights: torch.dtype) -> None:
    """Added, rounded to the weights' type, normalised, rounded to the type of the next product; and back."""
    made = norm.case(90, 160, types=(F32, BF16, BF16, weights), seed=1)
    made["hidden"] *= 1.01  # a stream that bfloat16 does not hold
    leaves = [x.detach().clone().requires_grad_() for x in norm.tensors(made)]
    total = leaves[0] + leaves[1]
    normed = F.layer_norm(total.to(weights), (160,), *leaves[2:], 1e-3).to(BF16)
    grads = torch.autograd.grad([total, normed], leaves, [made["up_total"], made["up_normed"]])
    want = {
        "total": total,
        "normed": normed,
        **dict(zip(("d_hidden", "d_delta", "d_weight", "d_bias"), grads, strict=True)),
    }
    want = {key: value.detach() for key, value in want.items()}
    found = norm.run(name, made, eps=1e-3, out_dtype=BF16)
    assert torch.equal(found["total"], total)
    # In bfloat16 a few values round the other way. Below bfloat16 weights torch rounds the gradient of the stream, and
    # on the way the sums of theirs.
    bounds = {} if weights == F32 else {"d_hidden": 5e-3, "d_weight": 2e-2, "d_bias": 2e-2}
    ops.assert_close(found, want, 1e-6, normed=1e-3, d_delta=2e-3, **bounds)


@backends
def test_a_mean_far_from_zero_and_values_that_are_no_numbers(name: str) -> None:
    made = norm.case(9, 64)
    made["hidden"] += 4096
    ops.assert_close(norm.run(name, made), norm.run("reference", norm.wide(made)), 1e-4 if name == "torch" else 1e-5)
    made["hidden"][3, 5], made["hidden"][4, 0] = float("nan"), float("inf")
    normed = norm.run(name, made)["normed"]
    assert normed[3:5].isnan().all() and normed[[0, 1, 2, 5, 6, 7, 8]].isfinite().all()
    flat = add_layer_norm(torch.full((2, 4), 3.0), None, torch.ones(4), torch.full((4,), 7.0))[1]
    assert torch.equal(flat, torch.full((2, 4), 7.0))


@backends
def test_strided_inputs(name: str) -> None:
    made = norm.case(6, 40, types=AUTOCAST)
    want = norm.run(name, made, out_dtype=BF16)
    hidden, delta, weight, bias = norm.tensors(made)
    spread = torch.stack([hidden.t(), hidden.t()], 2)[..., 0].t()
    assert not spread.is_contiguous()
    with ops.backend(name):
        total, normed = add_layer_norm(spread, delta.repeat(1, 2)[:, :40], weight, bias, out_dtype=BF16)
    assert normed.is_contiguous() and torch.equal(normed, want["normed"]) and torch.equal(total, want["total"])


@pytest.mark.parametrize("name", [*ops.BACKENDS, "reference"])
def test_without_an_addition_the_stream_is_itself(name: str) -> None:
    hidden, _, weight, bias = norm.tensors(norm.case(3, 8))
    with ops.backend(name):
        for leaf in (hidden, hidden.clone().requires_grad_()):
            for out_dtype in (None, BF16):
                assert add_layer_norm(leaf, None, weight, bias, out_dtype=out_dtype)[0] is leaf


@backends
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    norm.assert_rows_stand_alone(name)


@backends
def test_frozen_weights_and_one_output(name: str) -> None:
    norm.assert_only_what_is_wanted(name)


@pytest.mark.parametrize("types", [AUTOCAST, (F32,) * 4])
def test_the_same_bits_for_any_number_of_threads(types: tuple[torch.dtype, ...]) -> None:
    made, before, found = norm.case(1500, 48, types=types), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(norm.run("cpp", made, out_dtype=types[2]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in other)


def test_gradcheck_of_the_reference() -> None:
    leaves = [x.requires_grad_() for x in norm.tensors(norm.wide(norm.case(3, 4)))]
    assert torch.autograd.gradcheck(lambda *x: add_layer_norm_reference(*x, 1e-5, torch.float64), leaves)


@backends
@pytest.mark.parametrize("added", [True, False])
def test_opcheck(name: str, added: bool) -> None:
    hidden, delta, weight, bias = norm.tensors(norm.case(3, 4, types=AUTOCAST))
    leaves = [hidden.requires_grad_(), delta.requires_grad_() if added else None, weight.requires_grad_(), bias]
    with ops.backend(name):
        torch.library.opcheck(add_layer_norm_fwd.op, (*leaves, 1e-5, BF16, name))
        total, normed, stats = (x.detach() for x in add_layer_norm_fwd(*leaves, 1e-5, BF16, name))
        passed, dtype = (total, BF16) if added else (None, F32)
        args = (normed, passed, hidden.detach(), stats, weight.detach(), F32, dtype, True, name)
        torch.library.opcheck(add_layer_norm_bwd.op, args, test_utils=("test_schema", "test_faketensor"))


def gradients(name: str, call: object, types: tuple[torch.dtype, ...] = AUTOCAST) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in norm.tensors(norm.case(6, 8, types=types))]
    with ops.backend(name):
        return list(torch.autograd.grad(call(*leaves), leaves))


def call(*leaves: Tensor) -> Tensor:
    total, normed = add_layer_norm(*leaves, out_dtype=BF16)
    again = add_layer_norm(total, None, *leaves[2:], out_dtype=BF16)[1]
    return (normed * again).float().sin().sum() + total.cos().sum()


@backends
def test_compile_and_checkpoint_give_the_same_gradients(name: str) -> None:
    torch.compiler.reset()  # a compiled graph keeps the backend it was traced with
    want = gradients(name, call)
    compiled = gradients(name, torch.compile(call, fullgraph=True, backend="aot_eager"))
    kept = gradients(name, lambda *leaves: checkpoint(call, *leaves, use_reentrant=False))
    for one, two, three in zip(want, compiled, kept, strict=True):
        assert torch.equal(one, three) and ops.rms_error(two, one) <= 1e-7


@backends
def test_with_and_without_torchs_dispatcher(name: str) -> None:
    """What follows the ops (a mode) sees them, both ways; their results are the same."""
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    want = gradients(name, call)
    with Watch():
        found = gradients(name, call)
    assert all(map(torch.equal, want, found))
    assert seen.count("sambay_kernels::add_layer_norm_fwd") == seen.count("sambay_kernels::add_layer_norm_bwd") == 2
    with FlopCounterMode(display=False) as counter:
        gradients(name, call)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("types", [AUTOCAST, (F32,) * 4, (BF16,) * 4])
def test_few_elements_give_what_many_do(types: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    made = norm.case(40, 160, types=types)
    want = norm.run("cpp", made, out_dtype=types[2])
    monkeypatch.setattr(api, "SMALL", 40 * 160 + 1)
    found = norm.run("cpp", made, out_dtype=types[2])
    ops.assert_close(found, want, 1e-6, normed=1e-3 if types[2] == BF16 else 1e-6, d_delta=2e-3)


@pytest.mark.parametrize("weights", [F32, BF16])
def test_what_is_kept_for_the_backward_pass(weights: torch.dtype) -> None:
    """The stream, which lives anyway, where it is read as it stands; else what was read, half as large."""
    hidden, delta, weight, bias = norm.tensors(norm.case(6, 8, types=(F32, BF16, BF16, weights)))
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total, _ = add_layer_norm(hidden.requires_grad_(), delta, weight, bias, out_dtype=BF16)
    (large,) = (x for x in kept if x.shape == (6, 8))
    assert large.dtype == weights and (large.data_ptr() == total.data_ptr()) == (weights == F32)


@pytest.mark.parametrize("name", [*ops.BACKENDS, "reference"])
def test_bad_input_is_named(name: str) -> None:
    hidden, _, weight, bias = norm.tensors(norm.case(2, 3))
    with ops.backend(name):
        with pytest.raises(ValueError, match=r"delta must have shape \(2, 3\), got \(3,\)"):
            add_layer_norm(hidden, torch.zeros(3), weight, bias)
        with pytest.raises(ValueError, match=r"bias must have weight's type, torch\.float32, got torch\.bfloat16"):
            add_layer_norm(hidden, None, weight, bias.bfloat16())
        with pytest.raises(ValueError, match=r"hidden is torch\.float32 but weight torch\.float64: only both"):
            add_layer_norm(hidden, None, weight.double(), bias.double())
        with pytest.raises(ValueError, match=r"must have elements in its last dimension, got shape \(2, 0\)"):
            add_layer_norm(hidden[:, :0], None, weight[:0], bias[:0])
        with pytest.raises(ValueError, match=r"eps must lie in \[0, 3.4e\+38\], got -1"):
            add_layer_norm(hidden, None, weight, bias, eps=-1.0)
        with pytest.raises(ValueError, match=r"out_dtype must be float32, .* got torch\.int32"):
            add_layer_norm(hidden, None, weight, bias, out_dtype=torch.int32)
