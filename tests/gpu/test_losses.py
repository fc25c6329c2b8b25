"""Every loss on a GPU against float64 on the same GPU: values, gradients, accuracy and entropy."""

from __future__ import annotations

from typing import Any

import packed_ops as ops
import pytest
import torch
from sambay_kernels import linear_cross_entropy, token_statistics
from torch import Tensor

pytestmark = pytest.mark.gpu

TOKENS, WIDTH, VOCABULARY, K = 300, 256, 20_000, 24
TYPES: list[dict[str, Any]] = [
    {"loss_type": "nll"},
    {"loss_type": "dft"},
    {"loss_type": "power", "alpha": 0.5},
    {"loss_type": "threshold", "threshold": 1e-4},
    *(
        {"divergence": divergence, "tail": tail, "temperature": 2.0, "distill_weight": 0.7}
        for divergence in ("forward", "reverse", "skewed")
        for tail in ("bucket", "renormalize")
    ),
]


def make(autocast: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Hidden states, head, labels, weights of tokens, and a teacher that is silent on every third token."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, device="cuda", generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, device="cuda", generator=generator) * 0.1
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda", generator=generator)
    weights = torch.rand(TOKENS, device="cuda", generator=generator)
    if autocast:
        hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()
    likely = (hidden @ weight.T).argmax(1)
    labels[::2] = likely[::2]
    labels[::7] = -100
    noise = torch.randn(TOKENS, VOCABULARY, device="cuda", generator=generator)
    log_probs, ids = noise.mul_(3).log_softmax(1).topk(K)
    ids[::3] = -1
    ids[::5, K // 2 :] = -1
    return hidden, weight, labels, {"weights": weights}, {"teacher_ids": ids, "teacher_logprobs": log_probs.half()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "z_loss": 1e-4}], ids=str)
@pytest.mark.parametrize("loss", TYPES, ids=str)
def test_a_loss_its_gradients_and_statistics(loss: dict[str, Any], extra: dict[str, float], autocast: bool) -> None:
    hidden, weight, labels, weights, teacher = make(autocast)
    options = {**loss, **extra, **weights, **(teacher if "divergence" in loss else {})}
    results, seen = [], []
    for wide, backend in ((torch.float32, "auto"), (torch.float64, "torch")):
        leaves = [x.to(wide).requires_grad_() for x in (hidden, weight)]
        rounded = torch.autocast("cuda", torch.bfloat16, enabled=autocast and wide == torch.float32)
        with ops.backend(backend), rounded, token_statistics() as tally:
            losses = linear_cross_entropy(*leaves, labels, reduction="none", **options)
        results.append([losses, *torch.autograd.grad(losses.sum(), leaves)])
        seen.append((torch.cat(tally.correct), torch.cat(tally.entropy)))
    for index, (found, want) in enumerate(zip(*results, strict=True)):
        assert ops.rms_error(found, want) <= (1e-5 if index == 0 or not autocast else 3e-3)
    assert torch.equal(seen[0][0], seen[1][0]) and seen[0][0].any() and not seen[0][0].all()
    torch.testing.assert_close(seen[0][1].double(), seen[1][1], rtol=1e-5, atol=1e-4)
