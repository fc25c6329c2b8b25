"""Linear layers see multiples of 64 rows, and nobody else sees a difference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_sambay import tiny_model
from torch import Tensor, nn

from sft.models.rounded_rows import ROWS, rounded_rows


def watched(model: nn.Module, run: Callable[[], Tensor]) -> tuple[list[Tensor], set[int]]:
    """The loss, every gradient, and the numbers of rows that linear layers were given."""
    model.zero_grad(set_to_none=True)
    seen: set[int] = set()
    layers = [x for x in model.modules() if isinstance(x, nn.Linear) and x is not model.get_output_embeddings()]
    # Hooks run in the order they were made: these come after those that fill rows up.
    hooks = [x.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[-2])) for x in layers]
    loss = run()
    loss.backward()
    for hook in hooks:
        hook.remove()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)], seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 64, 100])
def test_values_and_gradients_stay_and_rows_are_rounded(tokens: int, checkpointing: bool) -> None:
    model = tiny_model().double().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(1, 90, (1, tokens + 1), generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    plain, counts = watched(model, run)
    with rounded_rows(model):
        rounded, filled = watched(model, run)
    after, again = watched(model, run)
    for one, other in zip(plain, rounded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert filled and all(count % ROWS == 0 for count in filled)
    assert again == counts and all(map(torch.equal, plain, after))


def test_nothing_is_done_unasked() -> None:
    model = tiny_model()
    with rounded_rows(model, wanted=False):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
