"""What a training step keeps in memory, counted on the published model without its values."""

from __future__ import annotations

import pytest
import torch
from live_memory import Pass
from tiny_sambay import tiny_model

pytest.importorskip("torch._subclasses.fake_tensor")

BLOCK = {"use_reentrant": False}
GIB = 1 << 30


def test_the_published_model_keeps_no_more_than_its_block_inputs_and_what_layers_share() -> None:
    """Of 16K tokens: with every layer's memory, keys and values it was 8.3 GiB."""
    tokens, width, inner = 16384, 2560, 5120
    found = Pass(tokens, BLOCK, backward=False)
    inputs = 32 * width * 4  # of every layer; the residual stream is float32
    shared = 2 * inner * 2  # the memory, and the projection that holds the shared keys and values
    ends = 2 * width * 4  # of the final norm and of the loss
    assert 0 <= found.live - tokens * (inputs + shared + ends) < tokens * 64
    assert found.live < 6.6 * GIB


def test_a_full_fine_tune_in_bfloat16_fits_one_a100_at_32k() -> None:
    """Weights, gradients, AdamW's moments in float32, and the most of activations, in 80 GB less what CUDA takes."""
    found = Pass(32768, BLOCK, half=True)
    assert found.held < 2.01 * found.parameters
    assert found.peak < 15 * GIB
    assert 2 * found.held + 8 * found.parameters + found.peak < 60 * GIB


def test_layers_whose_outputs_nobody_reads_return_hidden_states_alone() -> None:
    model = tiny_model().train()
    made = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, args, out, i=index: made.update({i: (args, out)}))
    ids = torch.arange(1, 31)[None]
    model(input_ids=ids, labels=ids, use_cache=False)
    others = {i: [x is not None for x in out[1:]] for i, (_, out) in made.items()}
    taken = {i: [x is not None for x in args[1:4]] for i, (args, _) in made.items()}
    nothing, memory, shared = [False] * 3, [True, False, False], [False, True, True]
    assert others == {i: {4: memory, 5: shared}.get(i, nothing) for i in range(8)}
    assert taken == {i: {6: memory, 7: shared}.get(i, nothing) for i in range(8)}
