"""What activation checkpointing keeps, and where: counted, and without a bit of difference in the gradients."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from live_memory import LiveBytes, Pass
from tiny_sambay import tiny_model
from torch import Tensor
from train_toys import tiny_qwen

from sft.train import offload
from sft.train.recompute import set_recomputation

IDS = torch.randint(1, 96, (1, 60), generator=torch.Generator().manual_seed(3))


def gradients(model: Any, passes: int = 1) -> list[Tensor]:
    model.zero_grad()
    borders = torch.tensor([0, 23, 60], dtype=torch.int32)
    packed = {"cu_seq_lens_q": borders, "max_length_q": 40} if hasattr(model.config, "mamba_d_state") else {}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False, **packed).loss
    for left in reversed(range(passes)):
        loss.backward(retain_graph=left > 0)
    return [loss.detach(), *[parameter.grad.clone() for parameter in model.parameters()]]


def checkpointed(model: Any, **how: bool) -> Any:
    set_recomputation(model, **how)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


class Journal(list):
    """What goes over the link, in order, as ("out" or "back", which input)."""

    def __init__(self, patch: pytest.MonkeyPatch, model: Any) -> None:
        sent: dict[int, int] = {}
        send, fetch = offload.Link.send, offload.Link.fetch

        def note_send(link: Any, tensor: Tensor) -> Any:
            held = send(link, tensor)
            sent[id(held)] = len(sent)
            self.append(("out", sent[id(held)]))
            return held

        def note_fetch(link: Any, held: Any) -> Any:
            self.append(("back", sent[id(held)]))
            return fetch(link, held)

        patch.setattr(offload.Link, "send", note_send)
        patch.setattr(offload.Link, "fetch", note_fetch)
        for index, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, i=index: self.append(("mlp", i)))


@pytest.mark.parametrize("make", [lambda: tiny_model(seed=5), tiny_qwen], ids=["sambay", "qwen"])
def test_inputs_leave_in_order_and_come_back_one_block_ahead(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gradients(checkpointed(make()))
    model = checkpointed(make(), offload=True)
    depth, journal = len(model.model.layers), Journal(monkeypatch, model)
    found = gradients(model)
    assert all(map(torch.equal, found, wanted))
    forward = [event for i in range(depth) for event in (("out", i), ("mlp", i))]
    # The topmost input is fetched when it is needed, and each other one before the block above it begins.
    backward = [("back", depth - 1)]
    for i in reversed(range(depth)):
        backward += [("back", i - 1), ("mlp", i)] if i else [("mlp", 0)]
    assert journal == forward + backward


def test_a_kept_graph_goes_back_twice_and_a_dropped_one_never(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gradients(checkpointed(tiny_qwen()), passes=2)
    model = checkpointed(tiny_qwen(), offload=True)
    with torch.no_grad():
        model(input_ids=IDS)
    model(input_ids=IDS)  # without a backward pass
    assert all(map(torch.equal, gradients(model, passes=2), wanted))
    inputs = model.model.layers[0]._gradient_checkpointing_func.func.__self__
    gc.collect()
    assert inputs._last() is None, "the host's copies go with the graph"


def test_live_memory_does_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the host's memory is not counted."""
    away = []
    send = offload.Link.send

    def uncounted(link: Any, tensor: Tensor) -> Any:
        held = send(link, tensor)
        next(mode for mode in modes if isinstance(mode, LiveBytes)).elsewhere(held)
        away.append(held.shape)
        return held

    modes: list[LiveBytes] = []
    monkeypatch.setattr(offload.Link, "send", uncounted)
    small = {"vocab_size": 512, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    own = {"use_reentrant": False}
    moved = []
    for layers in (8, 12):
        away.clear()
        how = {"set_up": lambda m: set_recomputation(m, offload=True), "modes": modes}
        moved.append(Pass(4096, own, num_hidden_layers=layers, **how, **small))
        assert len(away) == layers
    assert moved[1].live == moved[0].live and moved[1].peak == moved[0].peak
    assert Pass(4096, own, num_hidden_layers=8, **small).live - moved[0].live == 8 * 4096 * 256 * 4


@pytest.mark.parametrize("offloaded", [False, True])
def test_selective_computes_whole_attention_once(offloaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from sambay_kernels.ops.differential_attention import op as attention

    monkeypatch.setenv("SAMBAY_KERNELS", "torch")
    windows: list[int] = []
    maps = attention.diff_maps

    def noted(inputs: Any) -> Any:
        windows.append(inputs.window)
        return maps(inputs)

    monkeypatch.setattr(attention, "diff_maps", noted)
    counts, results = [], []
    for selective in (False, True):
        windows.clear()
        model = checkpointed(tiny_model(seed=5), selective=selective, offload=offloaded and selective)
        found = gradients(model)
        counts.append({window: windows.count(window) for window in set(windows)})
        results.append(found)
    assert all(map(torch.equal, *results))
    assert counts == [{24: 4, 0: 4}, {24: 4, 0: 2}]


def test_selective_keeps_what_other_models_attend_with() -> None:
    def attended(selective: bool) -> list[str]:
        from torch.utils._python_dispatch import TorchDispatchMode

        names: list[str] = []

        class Names(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                names.append(func._schema.name)
                return func(*args, **(kwargs or {}))

        with Names():
            gradients(checkpointed(tiny_qwen(), selective=selective))
        return [name for name in names if name == "aten::_scaled_dot_product_flash_attention_for_cpu"]

    assert (len(attended(False)), len(attended(True))) == (4, 2)


def test_the_next_stage_begins_anew_and_a_copy_of_the_model_can_be_made() -> None:
    model = checkpointed(tiny_qwen(), selective=True, offload=True)
    copy.deepcopy(model)
    checkpointed(model)
    assert model.model.layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": False}
