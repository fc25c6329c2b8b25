"""Linear cross entropy with Triton between its products, against the float64 definition."""

from __future__ import annotations

import packed_ops as ops
import pytest
import torch
from sambay_kernels import linear_cross_entropy, token_statistics
from sambay_kernels.ops.linear_cross_entropy import torch as torch_backend
from sambay_kernels.ops.linear_cross_entropy import triton as triton_backend
from sambay_kernels.ops.linear_cross_entropy.inputs import LceInputs
from sambay_kernels.ops.linear_cross_entropy.op import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    linear_cross_entropy_sum,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def make(tokens: int = 13, hidden: int = 8, vocabulary: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocabulary, (tokens,), generator=g)
    labels[::4] = -100
    return torch.randn(tokens, hidden, generator=g), torch.randn(vocabulary, hidden, generator=g), labels


def run(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, **options: object) -> list[Tensor]:
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    with ops.backend(name):
        loss = linear_cross_entropy(*leaves, labels, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(
    "extra", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 1.0, "z_loss": 1.0}]
)
@pytest.mark.parametrize("block", [16, 8192])
def test_fp32_matches_the_definition(reduction: str, extra: dict, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "LCE_VOCABULARY_BLOCK", block)
    monkeypatch.setattr(triton_backend, "LCE_VOCABULARY_BLOCK", block)
    monkeypatch.setattr(triton_backend, "channel_block", lambda *_: 32)  # several programs and turns for a block
    hidden, weight, labels = make()
    exact = run("reference", hidden.double(), weight.double(), labels, reduction=reduction, **extra)
    found = run("triton", hidden, weight, labels, reduction=reduction, chunk_size=2, **extra)
    for got, want in zip(found, exact, strict=True):
        assert got.dtype == torch.float32 and ops.rms_error(got, want) <= 1e-5


def test_huge_logits_and_no_labels() -> None:
    hidden, weight, labels = make()
    exact = run("reference", 1e3 * hidden.double(), weight.double(), labels)
    for got, want in zip(run("triton", 1e3 * hidden, weight, labels), exact, strict=True):
        assert ops.rms_error(got, want) <= 1e-5
    assert all(not x.any() for x in run("triton", hidden, weight, torch.full_like(labels, -100)))


def test_the_gradient_of_a_block_is_rounded_once() -> None:
    hidden, weight, labels = make()
    kept = labels != -100
    logits, targets = (hidden @ weight.T)[kept], labels[kept]
    count = int(kept.sum())
    factor, numbers = torch.linspace(0.5, 1.5, count), torch.tensor([[1.1], [1e-3], [0.9]]).expand(3, count)
    terms = torch.cat([factor[None], logits.logsumexp(1)[None], numbers])
    whole, half = (torch.empty_like(logits, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for out in (whole, half):
        triton_backend.gradient_of_block(logits, targets, terms, 0, out)
    # The interpreter cuts bfloat16 off where a GPU rounds it: twice the error.
    assert ((half.float() - whole).abs() <= 2**-7 * whole.abs() + 1e-12).all()


def test_half_precision_weights() -> None:
    hidden, weight, labels = (x.bfloat16() if x.is_floating_point() else x for x in make())
    exact = run("reference", hidden.double(), weight.double(), labels)
    found = run("triton", hidden, weight, labels)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert ops.rms_error(found[0], exact[0]) <= 1e-5
    assert max(ops.rms_error(got, want) for got, want in zip(found[1:], exact[1:], strict=True)) <= 5e-3


def test_as_torch_ops() -> None:
    hidden, weight, labels = make()
    ids, log_probs = teacher(len(labels), len(weight))
    own = (torch.rand(len(labels)), "power", 2.0, ids, log_probs, 0.5)
    for more in ((), own):
        fixed = LceInputs(hidden, weight, labels, -100, 0.1, 1e-3, 4, *more)
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        torch.library.opcheck(
            linear_cross_entropy_fwd.op, (*fixed._replace(hidden=leaves[0], weight=leaves[1]), "triton")
        )
        torch.library.opcheck(
            linear_cross_entropy_sum.op,
            (*fixed._replace(hidden=leaves[0], weight=leaves[1]), "triton", True, True),
        )
        losses, *saved = linear_cross_entropy_fwd(*fixed, "triton")
        torch.library.opcheck(linear_cross_entropy_bwd.op, (losses, *saved, *fixed, "triton", True, True))


def teacher(tokens: int, vocabulary: int, k: int = 5) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of a random teacher; silent on every third token, with fewer ids on every fifth."""
    g = torch.Generator().manual_seed(3)
    log_probs, ids = torch.randn(tokens, vocabulary, generator=g).mul(2).log_softmax(1).topk(k)
    ids[::3] = -1
    ids[::5, 2:] = -1
    return ids, log_probs.double()


FAMILY = [{"loss_type": "dft"}, {"loss_type": "power", "alpha": 3.0}, {"loss_type": "threshold", "threshold": 0.01}]
DISTILLED = [
    {"divergence": divergence, "tail": tail, "temperature": 2.0, "distill_weight": 0.7}
    for divergence in ("forward", "reverse", "skewed")
    for tail in ("bucket", "renormalize")
]


@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}], ids=str)
@pytest.mark.parametrize("loss", [*FAMILY, *DISTILLED], ids=str)
@pytest.mark.parametrize("block", [16, 8192])
def test_every_loss_matches_the_definition(
    loss: dict, extra: dict, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "LCE_VOCABULARY_BLOCK", block)
    monkeypatch.setattr(triton_backend, "LCE_VOCABULARY_BLOCK", block)
    monkeypatch.setattr(triton_backend, "channel_block", lambda *_: 32)
    hidden, weight, labels = make()
    options = {**loss, **extra, "weights": torch.linspace(0.0, 2.0, len(labels), dtype=torch.float64)}
    if "divergence" in loss:
        options["teacher_ids"], options["teacher_logprobs"] = teacher(len(labels), len(weight))
    exact = run("reference", hidden.double(), weight.double(), labels, reduction="none", **options)
    found = run("triton", hidden, weight, labels, reduction="none", chunk_size=2, **options)
    form = run("torch", hidden, weight, labels, reduction="none", chunk_size=2, **options)
    for got, same, want in zip(found, form, exact, strict=True):
        assert got.dtype == torch.float32 and ops.rms_error(got, want) <= 1e-5 and ops.rms_error(same, want) <= 1e-5
    # A sum, whose gradients come with it: the same losses, bit for bit.
    exact = run("reference", hidden.double(), weight.double(), labels, **options)
    whole = run("triton", hidden, weight, labels, chunk_size=2, **options)
    assert torch.equal(whole[0], found[0].sum())
    for got, want in zip(whole, exact, strict=True):
        assert got.dtype == torch.float32 and ops.rms_error(got, want) <= 1e-5


def test_a_sum_takes_three_products_and_its_gradients_only_where_they_are_wanted() -> None:
    hidden, weight, labels = make()
    product = 2 * int((labels != -100).sum()) * weight.numel()
    both = run("triton", hidden, weight, labels)
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        leaves = [x.clone().requires_grad_(w) for x, w in zip((hidden, weight), wanted, strict=True)]
        with ops.backend("triton"), FlopCounterMode(display=False) as counter:
            loss = linear_cross_entropy(*leaves, labels)
            if any(wanted):
                (loss * 0.5).backward()
        assert counter.get_total_flops() == product * (1 + sum(wanted))
        assert torch.equal(loss, both[0])
        for leaf, want, asked in zip(leaves, both[1:], wanted, strict=True):
            assert torch.equal(leaf.grad, want) if asked else leaf.grad is None


@pytest.mark.parametrize("distilled", [False, True])
def test_gradients_of_several_chunks_meet_the_weight_together(distilled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in bfloat16, whose products are done here in float32."""
    monkeypatch.setattr(triton_backend, "_halves", lambda a, b: a.dtype == b.dtype == torch.bfloat16)
    met = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        met.append(a.shape)
        return a.float() @ b.float()

    monkeypatch.setattr(triton_backend, "_product", product)
    hidden, weight, labels = (x.bfloat16() if x.is_floating_point() else x for x in make(tokens=40))
    ids, log_probs = teacher(len(labels), len(weight))
    options = {"teacher_ids": ids, "teacher_logprobs": log_probs, "distill_weight": 0.5} if distilled else {}
    exact = run("reference", hidden.double(), weight.double(), labels, **options)
    found = run("triton", hidden, weight, labels, chunk_size=1, **options)
    assert met.count((16, 70)) == 1 and met.count((4, 8)) == 7  # 30 tokens: 7 times logits, twice gradients
    assert ops.rms_error(found[0], exact[0]) <= 1e-5
    assert max(ops.rms_error(got, want) for got, want in zip(found[1:], exact[1:], strict=True)) <= 1e-2


def test_a_teacher_in_half_precision_weights() -> None:
    hidden, weight, labels = (x.bfloat16() if x.is_floating_point() else x for x in make())
    ids, log_probs = teacher(len(labels), len(weight))
    options = {"teacher_ids": ids, "teacher_logprobs": log_probs.half(), "distill_weight": 0.5}
    exact = run("reference", hidden.double(), weight.double(), labels, **options)
    found = run("triton", hidden, weight, labels, **options)
    assert ops.rms_error(found[0], exact[0]) <= 1e-5
    assert max(ops.rms_error(got, want) for got, want in zip(found[1:], exact[1:], strict=True)) <= 5e-3


@pytest.mark.parametrize("loss", [{}, *FAMILY, *DISTILLED], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e2])
@pytest.mark.parametrize("block", [16, 8192])
def test_accuracy_and_entropy(loss: dict, scale: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "LCE_VOCABULARY_BLOCK", block)
    monkeypatch.setattr(triton_backend, "LCE_VOCABULARY_BLOCK", block)
    monkeypatch.setattr(triton_backend, "channel_block", lambda *_: 32)
    hidden, weight, labels = make()
    hidden = scale * hidden
    logits = hidden.double() @ weight.double().T
    labels[1:4] = logits[1:4].argmax(1)
    options = {**loss, "chunk_size": 2}
    if "divergence" in loss:
        ids, options["teacher_logprobs"] = teacher(len(labels), len(weight))
        options["teacher_ids"] = torch.where(ids < 0, -1, logits.topk(ids.shape[1]).indices)
    kept = labels != -100
    plain = run("triton", hidden, weight, labels, **options)
    with token_statistics() as tally:
        watched = run("triton", hidden, weight, labels, **options)
    correct, entropy = torch.cat(tally.correct), torch.cat(tally.entropy)
    assert torch.equal(correct, (logits.argmax(1) == labels)[kept]) and correct.any() and not correct.all()
    wanted = torch.distributions.Categorical(logits=logits[kept]).entropy()
    torch.testing.assert_close(entropy.double(), wanted, rtol=1e-5, atol=1e-4 * scale**0.5)
    assert all(map(torch.equal, watched, plain))
