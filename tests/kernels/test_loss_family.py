"""Losses of the target's probability and of a teacher's, against their plain definitions with torch's autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import packed_ops as ops
import pytest
import torch
from sambay_kernels import linear_cross_entropy, token_statistics
from sambay_kernels.ops.linear_cross_entropy import torch as torch_backend
from sambay_kernels.ops.linear_cross_entropy.inputs import LceInputs
from sambay_kernels.ops.linear_cross_entropy.op import linear_cross_entropy_fwd, linear_cross_entropy_sum
from sambay_kernels.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from sambay_kernels.ops.linear_cross_entropy.torch import linear_cross_entropy_torch
from torch import Tensor

TOKENS, WIDTH, VOCABULARY, K = 37, 6, 50, 4
TYPES: list[dict[str, Any]] = [
    {"loss_type": "nll"},
    {"loss_type": "dft"},
    *({"loss_type": "power", "alpha": alpha} for alpha in (0.1, 1.0, 10.0)),
    *({"loss_type": "threshold", "threshold": threshold} for threshold in (0.02, 0.5)),
]
DIVERGENCES: list[dict[str, Any]] = [
    *({"divergence": name} for name in ("forward", "reverse")),
    *({"divergence": "skewed", "skew": skew} for skew in (0.0, 0.1, 0.9)),
]


@pytest.fixture(params=["by tokens", "by vocabulary"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "by vocabulary":
        monkeypatch.setattr(torch_backend, "LCE_KEPT_GRADIENT_BYTES", 0)
        monkeypatch.setattr(torch_backend, "LCE_VOCABULARY_BLOCK", 16)
    return request.param


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, labels and weights, of which some are zero."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=g)
    weights = torch.rand(TOKENS, generator=g, dtype=torch.float64) * (torch.arange(TOKENS) % 5 > 0)
    labels[torch.rand(TOKENS, generator=g) >= 0.6] = -100
    return hidden, weight, labels, weights


def make_teacher(k: int = K) -> tuple[Tensor, Tensor]:
    """A random teacher's k best tokens; silent on every third position, with fewer of them on every fifth."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(TOKENS, VOCABULARY, generator=g, dtype=torch.float64) * 2
    log_probs, ids = logits.log_softmax(1).topk(k)
    if k < VOCABULARY:
        ids[::3] = -1
        ids[::5, k // 2 :] = -1
        log_probs[::3] = math.nan  # what isn't there isn't read
    return ids, log_probs


def of_target(log_p: Tensor, loss_type: str, alpha: float = 0.0, threshold: float = 0.0) -> Tensor:
    p = log_p.exp()
    return {
        "nll": lambda: -log_p,
        "dft": lambda: -p.detach() * log_p,
        "power": lambda: (1 - p**alpha) / alpha,
        "threshold": lambda: -log_p * (p >= threshold),
    }[loss_type]()


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, **options: Any) -> Tensor:
    smoothing, z_loss = options.pop("label_smoothing", 0.0), options.pop("z_loss", 0.0)
    logits = hidden @ weight.T
    log_probs = logits.log_softmax(1)
    losses = of_target(log_probs.gather(1, labels.clamp(min=0)[:, None])[:, 0], **options)
    losses = (1 - smoothing) * losses - smoothing * log_probs.mean(1) + z_loss * logits.logsumexp(1).square()
    return torch.where(labels == -100, 0.0, weights * losses)


def assert_same(found: Tensor, wanted: Tensor, leaves: list[Tensor], tolerance: float = 1e-12) -> None:
    probe = torch.linspace(0.5, 1.5, found.numel(), dtype=torch.float64).reshape(found.shape).to(found.dtype)
    grads = [torch.autograd.grad(x, leaves, probe, retain_graph=True) for x in (found, wanted)]
    for got, true in zip([found, *grads[0]], [wanted, *grads[1]], strict=True):
        assert (got - true).norm() <= tolerance * true.norm()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=str)
@pytest.mark.parametrize("loss", TYPES, ids=str)
def test_a_loss_of_the_family_is_its_definition(
    loss: dict[str, Any], extra: dict[str, float], reduction: str, way: str
) -> None:
    hidden, weight, labels, weights = make()
    found = linear_cross_entropy(
        hidden, weight, labels, weights=weights, reduction=reduction, chunk_size=8, **loss, **extra
    )
    wanted = plain(hidden, weight, labels, weights, **loss, **extra)
    assert_same(found, wanted if reduction == "none" else wanted.sum(), [hidden, weight])
    single = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    rough = linear_cross_entropy(*single, labels, weights=weights, reduction=reduction, **loss, **extra)
    grads = torch.autograd.grad(rough.sum(), single), torch.autograd.grad(wanted.sum(), [hidden, weight])
    assert (rough - found).abs().max() <= 2e-6 * found.abs().max()
    assert all((got - true).norm() <= 2e-6 * true.norm() for got, true in zip(*grads, strict=True))


@pytest.mark.parametrize("loss", TYPES, ids=str)
def test_the_oracle_is_the_definition(loss: dict[str, Any]) -> None:
    hidden, weight, labels, weights = make()
    parameter = loss.get("alpha", loss.get("threshold", 0.0))
    inputs = LceInputs(hidden, weight, labels, weights=weights, loss_type=loss["loss_type"], parameter=parameter)
    wanted = plain(hidden, weight, labels, weights, **loss)
    assert_same(linear_cross_entropy_reference(inputs, "none"), wanted, [hidden, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nll_with_weight_one_is_cross_entropy_bit_by_bit(dtype: torch.dtype, way: str) -> None:
    hidden, weight, labels, _ = make(dtype)
    found = []
    for more in ({}, {"weights": torch.ones(TOKENS)}, {"loss_type": "nll", "distill_weight": 0.0}):
        loss = linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1, z_loss=0.01, **more)
        found.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    ids, log_probs = make_teacher()
    loss = linear_cross_entropy(
        hidden, weight, labels, label_smoothing=0.1, z_loss=0.01, teacher_ids=ids, teacher_logprobs=log_probs
    )
    found.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_power_becomes_nll_and_has_dfts_gradient() -> None:
    hidden, weight, labels, _ = make()
    nll, small, one, dft = (
        linear_cross_entropy(hidden, weight, labels, **loss)
        for loss in ({}, {"loss_type": "power", "alpha": 1e-6}, {"loss_type": "power", "alpha": 1.0}, TYPES[1])
    )
    assert abs(nll - small) < 1e-4 * nll
    for got, true in zip(*(torch.autograd.grad(x, [hidden, weight]) for x in (one, dft)), strict=True):
        torch.testing.assert_close(got, true)


def merged(logits: Tensor, ids: Tensor, log_probs: Tensor, tail: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Student's and teacher's outcomes at one position, from the whole softmax."""
    known = ids >= 0
    student, teacher = logits.softmax(0), log_probs[known].exp()
    q, p = student[ids[known]], teacher
    if tail == "bucket" and len(p) < VOCABULARY:
        q, p = torch.cat([q, 1 - q.sum()[None]]), torch.cat([p, 1 - p.sum()[None]])
    q, p = q ** (1 / temperature), p ** (1 / temperature)
    return q / q.sum(), p / p.sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


def distilled(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, **options: Any) -> Tensor:
    ids, log_probs, w = options["teacher_ids"], options["teacher_logprobs"], options["distill_weight"]
    nll = plain(hidden, weight, labels, weights, loss_type="nll")
    logits, losses = hidden @ weight.T, []
    for at in range(TOKENS):
        if labels[at] == -100 or bool((ids[at] < 0).all()):
            losses.append(nll[at])
            continue
        q, p = merged(logits[at], ids[at], log_probs[at], options["tail"], options["temperature"])
        if options["divergence"] == "reverse":
            apart = kl(q, p)
        else:
            a = options["skew"] if options["divergence"] == "skewed" else 0.0
            apart = kl(p, a * p + (1 - a) * q)
        losses.append((1 - w) * nll[at] + w * weights[at] * apart)
    return torch.stack(losses)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("k", [1, K, VOCABULARY])
def test_distillation_is_its_definition(
    divergence: dict[str, Any], temperature: float, tail: str, k: int, reduction: str, way: str
) -> None:
    hidden, weight, labels, weights = make()
    ids, log_probs = make_teacher(k)
    options = {"teacher_ids": ids, "teacher_logprobs": log_probs, "distill_weight": 0.7, "tail": tail}
    options |= {"temperature": temperature, "skew": 0.1, **divergence}
    found = linear_cross_entropy(hidden, weight, labels, weights=weights, reduction=reduction, chunk_size=8, **options)
    wanted = distilled(hidden, weight, labels, weights, **options)
    assert_same(found, wanted if reduction == "none" else wanted.sum(), [hidden, weight], 1e-10)
    if k == VOCABULARY:
        return
    own = (weights, "nll", 0.0, ids, log_probs, 0.7, options["divergence"], options["skew"], tail, temperature)
    oracle = linear_cross_entropy_reference(LceInputs(hidden, weight, labels, -100, 0.0, 0.0, 8, *own), reduction)
    torch.testing.assert_close(oracle, found, rtol=1e-12, atol=1e-12)


def test_a_whole_vocabulary_is_the_dense_divergence(way: str) -> None:
    hidden, weight, labels, _ = make()
    ids, log_probs = make_teacher(VOCABULARY)
    found = linear_cross_entropy(
        hidden, weight, labels, teacher_ids=ids, teacher_logprobs=log_probs, distill_weight=1.0
    )
    dense = torch.zeros(TOKENS, VOCABULARY, dtype=torch.float64).scatter(1, ids, log_probs)
    student = (hidden @ weight.T).log_softmax(1)
    apart = torch.nn.functional.kl_div(student, dense, log_target=True, reduction="none").sum(1)
    assert_same(found, apart[labels != -100].sum(), [hidden, weight], 1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradients_stay_exact_where_the_student_is_certain(divergence: dict[str, Any], way: str) -> None:
    """The mass outside of the teacher's tokens is e-25 for the student: no difference of large numbers may show."""
    hidden, weight, labels, _ = make()
    with torch.no_grad():
        hidden *= 12
    ids = (hidden @ weight.T).topk(K).indices
    log_probs = torch.tensor([0.5, 0.2, 0.1, 0.1], dtype=torch.float64).log().expand(TOKENS, K)
    options = {"teacher_ids": ids, "distill_weight": 1.0, **divergence}
    exact = linear_cross_entropy(hidden, weight, labels, teacher_logprobs=log_probs, **options)
    single = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    found = linear_cross_entropy(*single, labels, teacher_logprobs=log_probs, **options)
    grads = torch.autograd.grad(found, single), torch.autograd.grad(exact, [hidden, weight])
    assert abs(found - exact) <= 1e-5 * exact
    assert all((got - true).norm() <= 1e-4 * true.norm() for got, true in zip(*grads, strict=True))


def test_half_precision_log_probabilities_that_sum_to_more_than_one() -> None:
    hidden, weight, labels, _ = make()
    ids = torch.tensor([[1, 2]]).expand(TOKENS, 2)
    log_probs = torch.tensor([[math.log(0.7), math.log(0.3005)]]).half().expand(TOKENS, 2)
    for divergence in ("forward", "reverse", "skewed"):
        loss = linear_cross_entropy(
            hidden, weight, labels, teacher_ids=ids, teacher_logprobs=log_probs, distill_weight=1.0,
            divergence=divergence,
        )  # fmt: skip
        assert loss.isfinite() and all(x.isfinite().all() for x in torch.autograd.grad(loss, [hidden, weight]))


MORE: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"weighted": True}]


def noted(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    """Loss and gradients; accuracy and entropy of each supervised token."""
    with token_statistics() as tally:
        loss = linear_cross_entropy(hidden, weight, labels, **options).sum()
        found = [loss, *torch.autograd.grad(loss, [hidden, weight])]
    return found, torch.cat(tally.correct), torch.cat(tally.entropy)


def assert_statistics(dtype: torch.dtype, options: dict[str, Any], of_student: int = 0) -> None:
    """Those of the student's whole distribution, and the loss is what it is without; `of_student`: a teacher names so
    many of the student's own best tokens, the label often among them."""
    hidden, weight, labels, weights = make(dtype)
    options = {**options, "chunk_size": 8}
    logits = (hidden @ weight.T).detach().double()
    labels[::4] = logits.argmax(1)[::4]
    if options.pop("weighted", False):
        options["weights"] = weights
    if of_student:
        _, options["teacher_logprobs"] = make_teacher(of_student)
        options["teacher_ids"] = torch.where(make_teacher(of_student)[0] < 0, -1, logits.topk(of_student).indices)
    found, correct, entropy = noted(hidden, weight, labels, **options)
    kept = labels != -100
    assert torch.equal(correct, (logits.argmax(1) == labels)[kept]) and correct.any() and not correct.all()
    wanted = torch.distributions.Categorical(logits=logits[kept]).entropy()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(entropy.double(), wanted, rtol=tolerance, atol=tolerance)
    assert not entropy.requires_grad
    loss = linear_cross_entropy(hidden, weight, labels, **options).sum()
    assert all(map(torch.equal, found, [loss, *torch.autograd.grad(loss, [hidden, weight])]))
    with ops.backend("reference"):
        _, same, near = noted(hidden, weight, labels, **options)
    assert torch.equal(same, correct)
    torch.testing.assert_close(near, entropy, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("more", MORE, ids=str)
@pytest.mark.parametrize("loss", TYPES, ids=str)
def test_accuracy_and_entropy_are_the_students_whatever_the_loss(
    loss: dict[str, Any], more: dict[str, Any], reduction: str, way: str
) -> None:
    for dtype in (torch.float32, torch.float64):
        assert_statistics(dtype, {**loss, **more, "reduction": reduction})


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "weighted": True}], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES[:4], ids=str)
@pytest.mark.parametrize("k", [1, K, VOCABULARY])
def test_accuracy_and_entropy_are_the_students_beside_a_teacher(
    k: int, divergence: dict[str, Any], more: dict[str, Any], reduction: str, way: str
) -> None:
    options = {**divergence, **more, "distill_weight": 0.7, "temperature": 2.0, "reduction": reduction}
    for dtype, tail in ((torch.float32, "bucket"), (torch.float64, "renormalize")):
        assert_statistics(dtype, {**options, "tail": tail}, of_student=k)


ALL = {"loss_type": "power", "alpha": 2.0, "label_smoothing": 0.1, "z_loss": 0.01, "distill_weight": 0.5}


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_torch_form_and_compiled_op_are_the_op(reduction: str, way: str) -> None:
    hidden, weight, labels, weights = make(torch.float32)
    ids, log_probs = make_teacher()
    options = {**ALL, "weights": weights, "teacher_ids": ids, "teacher_logprobs": log_probs, "reduction": reduction}

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, **options).sum() / 3

    wanted = [loss(hidden, weight), *torch.autograd.grad(loss(hidden, weight), [hidden, weight])]
    form = linear_cross_entropy_torch(hidden, weight, labels, **options).sum() / 3
    assert all(map(torch.equal, [form, *torch.autograd.grad(form, [hidden, weight])], wanted))
    torch._dynamo.reset()
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
    assert all(map(torch.equal, [value, *torch.autograd.grad(value, [hidden, weight])], wanted))


def test_opcheck() -> None:
    hidden, weight, labels, weights = make(torch.float32)
    own = (-100, 0.1, 0.01, 8, weights, "power", 2.0, *make_teacher(), 0.5, "skewed", 0.1, "bucket", 2.0, True)
    torch.library.opcheck(linear_cross_entropy_sum.op, (hidden, weight, labels, *own, "torch", True, True))
    torch.library.opcheck(linear_cross_entropy_fwd.op, (hidden, weight, labels, *own, "torch"))


def call(**changes: Any) -> Callable[[], Tensor]:
    hidden, weight, labels, _ = make()
    return lambda: linear_cross_entropy(hidden, weight, labels, **changes)


def teacher(**changes: Any) -> dict[str, Any]:
    ids, log_probs = make_teacher()
    return {"teacher_ids": ids, "teacher_logprobs": log_probs, "distill_weight": 0.5, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "focal"}, "loss_type must be one of nll, dft, power, threshold, got 'focal'"),
        ({"loss_type": "power"}, "'power' needs alpha"),
        ({"loss_type": "power", "alpha": 0.0}, "alpha must lie in"),
        ({"loss_type": "threshold", "threshold": 1.0}, "threshold must lie in"),
        ({"loss_type": "threshold"}, "'threshold' needs threshold"),
        ({"alpha": 1.0}, "alpha is not for 'nll'"),
        ({"weights": torch.full((TOKENS,), -1.0)}, "weights must be finite and at least 0"),
        ({"weights": torch.full((TOKENS,), math.nan)}, "weights must be finite and at least 0"),
        ({"weights": torch.ones(TOKENS + 1)}, "weights must have shape"),
        ({"distill_weight": 0.5}, "distill_weight needs teacher_ids"),
        ({"distill_weight": 1.5}, "distill_weight must lie in"),
        (teacher(divergence="js"), "divergence must be one of forward, reverse, skewed"),
        (teacher(tail="none"), "tail must be one of"),
        (teacher(temperature=0.0), "temperature must lie in"),
        (teacher(skew=1.0), "skew must lie in"),
        (teacher(teacher_ids=torch.zeros(TOKENS, K)), "teacher_ids must be int64 or int32"),
        (teacher(teacher_ids=torch.full((TOKENS, K), VOCABULARY)), "teacher_ids must lie in 0 .. 49"),
        (teacher(teacher_ids=torch.zeros(TOKENS, K, dtype=torch.int64)), "name a token twice"),
        (teacher(teacher_logprobs=torch.zeros(TOKENS, K + 1)), "teacher_logprobs must have shape"),
        (teacher(teacher_logprobs=torch.ones(TOKENS, K)), "must be log-probabilities"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)()
