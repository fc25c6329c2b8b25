"""MLPs over long rows in chunks of tokens: the same gradients and products, with a chunk's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_memory import Pass
from tiny_sambay import tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sft.models.sambay import chunked_phi4flash

IDS = torch.randint(1, 96, (1, 60), generator=torch.Generator().manual_seed(3))
BORDERS = torch.tensor([0, 23, 60], dtype=torch.int32)


def step(model: Any, autocast: bool = False) -> tuple[list[Tensor], int]:
    """Loss and gradients of the trained parameters, and the FLOPs that they took."""
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False, cu_seq_lens_q=BORDERS, max_length_q=40).loss
        loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters() if p.requires_grad]], counter.get_total_flops()


def checkpointed(model: Any) -> Any:
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


@pytest.mark.parametrize("chunk", [7, 25])
def test_chunks_give_the_same_gradients_by_as_many_products(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpointed(tiny_model(seed=5, dtype=torch.float64))
    wanted, flops = step(model)
    monkeypatch.setattr(chunked_phi4flash, "CHUNK", chunk)
    found, same = step(model)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert same == flops


def test_under_autocast_and_with_frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for frozen in (False, True):
        model = checkpointed(tiny_model(seed=5))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen and "mlp" in name))
        exact, _ = step(model)
        wanted, _ = step(model, autocast=True)
        with monkeypatch.context() as patch:
            patch.setattr(chunked_phi4flash, "CHUNK", 7)
            found, _ = step(model, autocast=True)
        for got, plain, true in zip(found, wanted, exact, strict=True):
            assert got.dtype == true.dtype
            assert (got - true).norm() <= 1.05 * (plain - true).norm() + 1e-6 * true.norm()


def test_adapters_are_trained_too_and_dropout_keeps_rows_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        settings = LoraConfig(r=2, target_modules=["fc1", "fc2"], lora_dropout=dropout, init_lora_weights=False)
        model = checkpointed(get_peft_model(tiny_model(seed=5), settings))
        torch.manual_seed(1)
        wanted, _ = step(model)
        with monkeypatch.context() as patch:
            patch.setattr(chunked_phi4flash, "CHUNK", 7)
            torch.manual_seed(1)
            found, _ = step(model)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_row_is_never_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    own |= {"intermediate_size": 4096, "num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    tokens = 2048
    whole = Pass(tokens, {"use_reentrant": False}, **own)
    monkeypatch.setattr(chunked_phi4flash, "CHUNK", 512)
    chunked = Pass(tokens, {"use_reentrant": False}, **own)
    row = tokens * 2 * 4096 * 2  # the gate and the value, bfloat16
    assert whole.peak > 2 * row and chunked.peak < 1.2 * row
    assert chunked.live == whole.live
