"""Linear cross entropy against torch's own on full logits; both of its ways, whatever the chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import packed_ops as ops
import pytest
import torch
import torch.nn.functional as F
from sambay_kernels import linear_cross_entropy, token_statistics
from sambay_kernels.ops.linear_cross_entropy import torch as torch_backend
from sambay_kernels.ops.linear_cross_entropy.inputs import LceInputs
from sambay_kernels.ops.linear_cross_entropy.op import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    linear_cross_entropy_sum,
)
from sambay_kernels.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from sambay_kernels.ops.linear_cross_entropy.torch import linear_cross_entropy_torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

TOKENS, WIDTH, VOCABULARY = 37, 6, 50
WAYS = ["by tokens", "by vocabulary"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of scoring a sum: the second is meant for large weights, here also in blocks that don't divide V."""
    if request.param == "by vocabulary":
        monkeypatch.setattr(torch_backend, "LCE_KEPT_GRADIENT_BYTES", 0)
        monkeypatch.setattr(torch_backend, "LCE_VOCABULARY_BLOCK", 16)
    return request.param


def make(dtype: torch.dtype = torch.float64, supervised: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) >= supervised] = -100
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, z_loss: float) -> Tensor:
    """Losses by token from full logits, with torch's own cross entropy."""
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    return losses + z_loss * logits.logsumexp(-1).square() * (labels != -100)


def assert_all_close(found: Any, wanted: Any, **tolerance: float) -> None:
    for got, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, true, **tolerance)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_sum_equals_torch(smoothing: float, z_loss: float, chunk: int, way: str) -> None:
    hidden, weight, labels = make()
    got = linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing, z_loss=z_loss, chunk_size=chunk)
    wanted = plain(hidden, weight, labels, smoothing, z_loss).sum()
    oracle = linear_cross_entropy_reference(LceInputs(hidden, weight, labels, label_smoothing=smoothing, z_loss=z_loss))
    assert_all_close([got, oracle], [wanted, wanted])
    # An upstream factor other than 1, as the division by the number of tokens is.
    found = torch.autograd.grad(got / 7, [hidden, weight])
    assert_all_close(found, torch.autograd.grad(wanted / 7, [hidden, weight]))


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_by_token_equal_torch(smoothing: float, z_loss: float, way: str) -> None:
    hidden, weight, labels = make()
    options = {"label_smoothing": smoothing, "z_loss": z_loss}
    got = linear_cross_entropy(hidden, weight, labels, **options, reduction="none", chunk_size=4)
    wanted = plain(hidden, weight, labels, smoothing, z_loss)
    oracle = linear_cross_entropy_reference(LceInputs(hidden, weight, labels, **options), "none")
    assert_all_close([got, oracle], [wanted, wanted])
    assert (got[labels == -100] == 0).all()
    probe = torch.randn_like(got)
    assert_all_close(
        torch.autograd.grad(got, [hidden, weight], probe), torch.autograd.grad(wanted, [hidden, weight], probe)
    )


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(reduction: str, way: str) -> None:
    hidden, weight, labels = make()
    op = lambda h, w: linear_cross_entropy(  # noqa: E731
        h, w, labels, label_smoothing=0.1, z_loss=0.01, reduction=reduction, chunk_size=8
    )
    assert torch.autograd.gradcheck(op, (hidden, weight), fast_mode=True)


def test_chunks_do_not_change_the_loss(way: str) -> None:
    hidden, weight, labels = make(torch.float32)
    whole, *whole_grads = value_and_grads(hidden, weight, labels, chunk_size=TOKENS)
    for chunk in (1, 3, 16):
        loss, *grads = value_and_grads(hidden, weight, labels, chunk_size=chunk)
        assert abs(loss - whole) <= 1e-6 * whole
        assert_all_close(grads, whole_grads, rtol=1e-5, atol=1e-6)
    again = value_and_grads(hidden, weight, labels, chunk_size=16)
    assert all(map(torch.equal, again, [loss, *grads]))


def value_and_grads(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    loss = linear_cross_entropy(hidden, weight, labels, **options)
    return [loss, *torch.autograd.grad(loss, [hidden, weight])]


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_half_precision_inputs_are_scored_in_float32(types: tuple[torch.dtype, torch.dtype]) -> None:
    hidden, weight, labels = make(torch.bfloat16)
    hidden, weight = (x.detach().to(t).requires_grad_() for x, t in zip((hidden, weight), types, strict=True))
    got = linear_cross_entropy(hidden, weight, labels, chunk_size=8)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = plain(*exact, labels, 0.0, 0.0).sum()
    assert got.dtype == torch.float32
    assert abs(got.double() - wanted) < 1e-6 * wanted
    rough = F.cross_entropy(hidden.bfloat16() @ weight.bfloat16().T, labels, reduction="sum")
    assert abs(rough.double() - wanted) > 1e-4 * wanted
    found = torch.autograd.grad(got, [hidden, weight])
    assert [x.dtype for x in found] == list(types)
    for g, w, leaf in zip(found, torch.autograd.grad(wanted, exact), (hidden, weight), strict=True):
        assert (g.double() - w).norm() < (4e-3 if leaf.dtype == torch.bfloat16 else 1e-6) * w.norm()


def test_autocast_does_not_reach_the_logits(way: str) -> None:
    hidden, weight, labels = make(torch.float32)
    wanted = value_and_grads(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_cross_entropy(hidden, weight, labels)
        form = linear_cross_entropy_torch(hidden, weight, labels)
        assert (hidden @ weight.T).dtype == torch.bfloat16
    assert torch.equal(inside, wanted[0]) and torch.equal(form, wanted[0])
    found = [torch.autograd.grad(x, [hidden, weight]) for x in (inside, form)]
    assert all(map(torch.equal, *found))
    assert all(map(torch.equal, found[0], wanted[1:])) == (way == "by vocabulary")  # else rounded: test_autocast.py


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_torch_form_equals_the_op(reduction: str, way: str) -> None:
    hidden, weight, labels = make(torch.float32)
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01, "chunk_size": 8}
    ours, form = (f(hidden, weight, labels, **options) for f in (linear_cross_entropy, linear_cross_entropy_torch))
    assert torch.equal(ours, form)
    probe = torch.randn_like(ours)
    found = [torch.autograd.grad(x, [hidden, weight], probe) for x in (ours, form)]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_supervised_token(reduction: str, way: str) -> None:
    hidden, weight, _ = make()
    for count in (TOKENS, 0):
        rows, labels = hidden[:count], torch.full((count,), -100)
        loss = linear_cross_entropy(rows, weight, labels, reduction=reduction)
        assert loss.shape == (() if reduction == "sum" else (count,)) and loss.sum() == 0
        for grad in torch.autograd.grad(loss.sum(), [hidden, weight]):
            assert grad.abs().max() == 0


def test_unsupervised_tokens_are_not_read(way: str) -> None:
    hidden, weight, labels = make()
    wanted = value_and_grads(hidden, weight, labels)
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    assert all(map(torch.equal, value_and_grads(hidden, weight, labels), wanted))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_cost_no_gradient(frozen: str, way: str) -> None:
    hidden, weight, labels = make()
    wanted = value_and_grads(hidden, weight, labels)
    leaves = {"hidden": hidden, "weight": weight}
    leaves[frozen].requires_grad_(False)
    free = weight if frozen == "hidden" else hidden
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(hidden, weight, labels)
        (grad,) = torch.autograd.grad(loss, [free])
    torch.testing.assert_close(grad, wanted[2 if frozen == "hidden" else 1])
    assert counter.get_total_flops() == 2 * 2 * int((labels != -100).sum()) * WIDTH * VOCABULARY
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, labels)
    assert counter.get_total_flops() == 2 * int((labels != -100).sum()) * WIDTH * VOCABULARY


def test_another_ignore_index_and_int32_labels(way: str) -> None:
    hidden, weight, labels = make()
    moved = torch.where(labels == -100, -1, labels).int()
    assert torch.equal(
        linear_cross_entropy(hidden, weight, moved, ignore_index=-1), linear_cross_entropy(hidden, weight, labels)
    )


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)], ids=str)
def test_opcheck_of_the_sum(wanted: tuple[bool, bool]) -> None:
    hidden, weight, labels = make(torch.float32)
    leaves = [x.detach().requires_grad_(w) for x, w in zip((hidden, weight), wanted, strict=True)]
    torch.library.opcheck(
        linear_cross_entropy_sum.op, (*LceInputs(*leaves, labels, -100, 0.1, 0.01, 8), "torch", *wanted)
    )


def test_opcheck_of_the_losses() -> None:
    hidden, weight, labels = make(torch.float32)
    inputs = LceInputs(hidden, weight, labels, -100, 0.1, 0.01, 8)
    torch.library.opcheck(linear_cross_entropy_fwd.op, (*inputs, "torch"))
    fixed = inputs._replace(hidden=hidden.detach(), weight=weight.detach())
    losses, *saved = linear_cross_entropy_fwd(*fixed, "torch")
    torch.library.opcheck(linear_cross_entropy_bwd.op, (losses, *saved, *fixed, "torch", True, True))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiled_and_checkpointed_gradients_are_the_same(reduction: str) -> None:
    hidden, weight, labels = make(torch.float32)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, reduction=reduction).sum() / 3

    wanted = [loss(hidden, weight), *torch.autograd.grad(loss(hidden, weight), [hidden, weight])]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda h, w: checkpoint(loss, h, w, use_reentrant=False)):
        value = other(hidden, weight)
        assert all(map(torch.equal, [value, *torch.autograd.grad(value, [hidden, weight])], wanted))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_differentiable_once(reduction: str, way: str) -> None:
    """A second derivative is refused, whoever asks; a second backward pass through a kept graph is the first again."""
    hidden, weight, labels = make(torch.float32)
    own = {"reduction": reduction, "chunk_size": 8}
    for form in (linear_cross_entropy, linear_cross_entropy_torch):
        loss = form(hidden, weight, labels, **own).sum() / 3
        once, again = (torch.autograd.grad(loss, [hidden, weight], retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, once, again))
        with pytest.raises(RuntimeError):
            first = torch.autograd.grad(loss, [hidden, weight], create_graph=True)
            torch.autograd.grad(first[0].square().sum(), [hidden, weight], allow_unused=True)


def test_a_factor_is_not_rounded_to_half_precision() -> None:
    """Gradients that came with the loss are scaled in float32: 1/3 in bfloat16 would be 0.2% too much for all."""
    hidden, weight, labels = make(torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    for form in (linear_cross_entropy, linear_cross_entropy_torch):
        (found,) = torch.autograd.grad(form(half, weight, labels) / 3, [half])
        exact = half.detach().float().requires_grad_()
        (wanted,) = torch.autograd.grad(form(exact, weight, labels) / 3, [exact])
        assert torch.equal(found, wanted.bfloat16())


def test_memory_stays_far_below_the_logits(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made is a chunk of the logits, or has the size of an input."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(torch_backend, "LCE_VOCABULARY_BLOCK", 512)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    self.size = max(self.size, x.numel())
            return out

    hidden, weight = torch.randn(600, 4), torch.randn(2000, 4)
    labels = torch.arange(600)
    inputs = LceInputs(hidden, weight, labels, -100, 0.1, 0.0, 32)
    with Largest() as largest:
        if way == "by tokens":
            torch_backend.lce_sum(inputs, True, True)
        else:
            losses, *saved = torch_backend.lce_losses(inputs)
            torch_backend.lce_losses_backward(losses, inputs, *saved, True, True)
    assert largest.size == 32 * (2000 if way == "by tokens" else 512)


def test_which_sums_keep_their_gradient() -> None:
    small, large = torch.empty(10, 4), torch.empty(200_064, 2560, device="meta")
    rule = torch_backend.lce_by_tokens
    assert rule(small, small, "sum") and rule(small.bfloat16(), small, "sum")
    assert not rule(small, small, "none")
    assert not rule(small.bfloat16(), small.bfloat16(), "sum")
    assert not rule(small, large, "sum")


def call(**changes: Any) -> Callable[[], Tensor]:
    hidden, weight, labels = make()
    return lambda: linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(TOKENS)}, "hidden must have 2 dimensions"),
        ({"weight": torch.zeros(VOCABULARY, WIDTH + 1)}, "weight must have shape"),
        ({"labels": torch.zeros(TOKENS)}, "int64 or int32"),
        ({"labels": torch.zeros(TOKENS + 1, dtype=torch.int64)}, "labels must have shape"),
        ({"labels": torch.full((TOKENS,), VOCABULARY)}, "labels must lie in 0 .. 49"),
        ({"labels": torch.full((TOKENS,), -1)}, "got values from -1"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"reduction": "mean"}, "reduction must be 'sum' or 'none'"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)()


def noted(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Accuracy and entropy of the supervised tokens, as the loss leaves them."""
    with token_statistics() as tally:
        linear_cross_entropy(hidden, weight, labels, **options)
    return torch.cat(tally.correct), torch.cat(tally.entropy)


@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=str)
@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_accuracy_and_entropy_of_each_supervised_token(reduction: str, chunk: int, extra: dict, way: str) -> None:
    hidden, weight, labels = make()
    labels[:9:2] = (hidden @ weight.T).argmax(-1)[:9:2]
    logits = (hidden @ weight.T)[labels != -100].detach()
    correct, entropy = noted(hidden, weight, labels, reduction=reduction, chunk_size=chunk, **extra)
    assert torch.equal(correct, logits.argmax(-1) == labels[labels != -100]) and correct.any() and not correct.all()
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert not entropy.requires_grad


@pytest.mark.parametrize("scale", [1e-3, 1e2])
def test_entropy_of_flat_and_of_sharp_distributions(scale: float, way: str) -> None:
    hidden, weight, labels = make(torch.float32)
    _, entropy = noted(hidden * scale, weight, labels)
    logits = ((hidden.double() * scale) @ weight.double().T)[labels != -100]
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    # As exact as the loss is: float32 of the largest logits.
    torch.testing.assert_close(entropy.double(), wanted, rtol=1e-5, atol=2e-7 * max(10.0, logits.abs().max().item()))
    assert (entropy >= 0).all()


def test_the_loss_is_the_same_where_statistics_are_taken(way: str) -> None:
    hidden, weight, labels = make(torch.float32)
    plain = value_and_grads(hidden, weight, labels, chunk_size=8)
    with token_statistics() as tally:
        watched = value_and_grads(hidden, weight, labels, chunk_size=8)
    assert all(map(torch.equal, watched, plain))
    assert sum(map(len, tally.correct)) == int((labels != -100).sum())
    linear_cross_entropy(hidden, weight, labels)
    assert sum(map(len, tally.correct)) == int((labels != -100).sum()), "noted after nobody asked any more"


def test_the_definition_notes_once() -> None:
    """Its backward pass computes it again."""
    hidden, weight, labels = make()
    with ops.backend("reference"), token_statistics() as tally:
        linear_cross_entropy(hidden, weight, labels).backward()
    assert [len(part) for part in tally.entropy] == [int((labels != -100).sum())]
    torch.testing.assert_close(tally.entropy[0], noted(hidden, weight, labels)[1])


def test_no_label_is_no_token(way: str) -> None:
    hidden, weight, labels = make()
    with token_statistics() as tally:
        linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert sum(map(len, tally.correct)) == sum(map(len, tally.entropy)) == 0
