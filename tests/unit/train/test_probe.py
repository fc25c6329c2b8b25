"""The probes at start: models that mix documents are refused, whatever they are called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from train_toys import tiny_qwen, tiny_sambay

from sft.train.collator import PackedCollator, PaddedCollator
from sft.train.probe import choose_collator, loss_scaling, packing_probe
from sft.utils.errors import UserError


class Toy(nn.Module):
    """An embedding, a mixing function over the row, a head; told apart only by how it mixes."""

    def __init__(self, mix: Any, loss: str = "sum") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50)
        self.mix, self.loss = mix, loss
        self.config = SimpleNamespace(sliding_window=None)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(
        self, input_ids: Any, labels: Any = None, num_items_in_batch: Any = None, use_cache: bool = False, **kwargs: Any
    ) -> Any:
        logits = self.head(self.mix(self.embed(input_ids), kwargs))
        if labels is None:
            return SimpleNamespace(logits=logits)
        losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        count = (labels[:, 1:] != -100).sum()
        loss = {
            "sum": losses.sum() / (num_items_in_batch or count),
            "mean": losses.sum() / count,
            "odd": losses.sum() / (num_items_in_batch or 1) ** 0.5,
        }[self.loss]
        return SimpleNamespace(logits=logits, loss=loss)


def per_document(x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """A running sum that starts anew with each document."""
    if "cu_seq_lens_q" not in kwargs:
        return x.cumsum(1)
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    return torch.cat([part.cumsum(1) for part in x.split(lengths, dim=1)], dim=1)


def running_sum(x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """A scan's state carried across documents, weakly."""
    return x + 1e-3 * x.cumsum(1)


def convolution(x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """A causal convolution over the flattened row: the last tokens of a document reach the next one."""
    return x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def lookahead(x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Sees the first token of the next document."""
    return x + 0.5 * nn.functional.pad(x, (0, 0, 0, 1))[:, 1:]


class GradientLeak(torch.autograd.Function):
    """Right forwards, but its backward spreads gradients over the whole row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + 1e-6 * gradient.sum(1, keepdim=True)


@pytest.mark.parametrize("make", [tiny_qwen, tiny_sambay], ids=["qwen3", "sambay"])
@pytest.mark.parametrize("collator", [PackedCollator(), PaddedCollator()], ids=["packed", "padded"])
def test_models_that_keep_documents_apart_pass(make, collator):
    packing_probe(make(), collator)


@pytest.mark.parametrize("mix", [running_sum, convolution, lookahead])
def test_leaks_are_refused_and_say_where(mix):
    with pytest.raises(
        UserError, match=r"Toy doesn't keep documents of one batch apart: changing the document.* change"
    ):
        packing_probe(Toy(mix))


def test_leak_in_the_backward_pass_alone_is_refused():
    with pytest.raises(UserError, match="document 2's loss has a gradient at document 1's embeddings"):
        packing_probe(Toy(lambda x, kwargs: GradientLeak.apply(per_document(x, kwargs))))


def test_leak_only_in_training_mode_is_refused():
    model = Toy(lambda x, kwargs: running_sum(x, kwargs) if model.training else per_document(x, kwargs))
    with pytest.raises(UserError, match="gradient at document 1's embeddings"):
        packing_probe(model)


def test_a_transformers_hybrid_without_packing_is_trained_padded_or_refused():
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )
    model = Lfm2ForCausalLM(config)
    with pytest.raises(
        UserError, match=r"Lfm2ForCausalLM (refuses several documents|doesn't keep documents) .* (packed|changes)"
    ):
        packing_probe(model)
    with pytest.raises(UserError, match="Set `packing: false`"):
        choose_collator(model, packing=True, pad_token_id=0)
    assert isinstance(choose_collator(model, packing=False, pad_token_id=0), PaddedCollator)


def test_packable_models_are_flattened_even_when_the_stage_does_not_pack():
    assert isinstance(choose_collator(tiny_qwen(), packing=False, pad_token_id=0), PackedCollator)


def test_a_model_that_mixes_even_padded_rows_is_refused():
    with pytest.raises(UserError, match="apart"):
        choose_collator(Toy(lambda x, kwargs: x + x.mean((0, 1))), packing=False, pad_token_id=0)


def test_broken_weights_are_told():
    model = tiny_qwen()
    model.get_input_embeddings().weight.data[:] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        packing_probe(model)


def test_the_probe_leaves_no_trace():
    model = tiny_sambay()
    model.train()
    model.model.layers[0].eval()
    next(model.parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    packing_probe(model)
    loss_scaling(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_how_the_loss_is_scaled_is_found_out(kind):
    assert loss_scaling(Toy(per_document, kind)) == kind


def test_an_odd_loss_is_refused():
    with pytest.raises(UserError, match="gradient accumulation would change what is trained"):
        loss_scaling(Toy(per_document, "odd"))
