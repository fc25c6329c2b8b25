"""The kernels of decoding: a step over slots, and the choice of a token."""

from __future__ import annotations

import pytest
import torch
from choice_toys import SETTINGS, assert_as_defined
from decoder_toys import STATES, Shape, empty_slots, in_type, random_decoder
from packed_ops import backend
from sambay_kernels import DecoderStep
from sambay_kernels.ops.choose_token import triton as choosing
from sambay_kernels.ops.decoder_step import triton as stepping
from sambay_kernels.ops.decoder_step.torch import decoder_step_torch

NAMES = ["peaked", "few equals", "tied", "barred"]


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_the_token_is_that_of_the_definition(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting by some of the logits; on a GPU by all."""
    monkeypatch.setattr(choosing, "PIECE", 128)
    assert_as_defined(NAMES[number], torch.bfloat16, "cpu", 300, range(number, len(SETTINGS), 3))


@pytest.mark.parametrize(
    ("shape", "steps"),
    [(Shape(windows=(7,)), 24), (Shape(key_heads=4, group=1, hidden=40, head_dim=10, windows=(5,)), 12)],
)
def test_steps_match_the_definition(shape: Shape, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings go round, pages and chunks of keys are crossed, sequences take part in any order."""
    monkeypatch.setattr(stepping, "CHUNK", 16)
    monkeypatch.setattr(stepping, "BLOCK", 16)
    exact = random_decoder(shape)
    single = in_type(exact, torch.float32)
    want, found = (empty_slots(w, slots=2, page_size=5, longest=25) for w in (exact, single))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randperm(2, generator=generator)[: 2 - step % 2]
        tokens = torch.randint(0, shape.vocab, (len(rows),), generator=generator)
        a = decoder_step_torch(exact, want, tokens, rows)
        b = stepping.decoder_step_triton(single, found, tokens, rows)
        assert float((a - b).abs().max()) < 1e-4 * float(a.abs().max())
    assert shape.windows[0] < int(want.lengths.min()) and (steps == 12 or int(want.lengths.max()) > stepping.CHUNK)
    for name in STATES:
        assert torch.allclose(getattr(want, name).double(), getattr(found, name).double(), atol=1e-4), name


def test_logits_of_some_rows_alone_are_refused() -> None:
    weights = in_type(random_decoder(Shape()), torch.float32)
    with backend("triton"):
        step = DecoderStep(weights)
    slots, token = empty_slots(weights, slots=1, page_size=5, longest=25), torch.tensor([1])
    assert not step.takes_runs
    with pytest.raises(ValueError, match="leave out `wanted`"):
        step(slots, token, torch.tensor([0]), torch.tensor([True]))
    assert slots.lengths.tolist() == [0]
