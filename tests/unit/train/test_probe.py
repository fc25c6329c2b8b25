"""The probes at start: models that mix documents are refused, whatever they are called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from train_toys import tiny_qwen, tiny_sambay, toy_recipe

from sft.train.collator import PackedCollator, PaddedCollator
from sft.train.probe import TrainedPath, choose_collator, loss_scaling, packing_probe
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


# ---- the path that is trained, and no other ----


def window_of_512(x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """A sliding window whose edge forgets that the row holds several documents: off by one, at 512."""
    return per_document(x, kwargs) + 1e-3 * nn.functional.pad(x, (0, 0, 512, 0))[:, : x.shape[1]]


def edge_inside_a_document(x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Leaks only from within documents longer than 512: the token there sees the row's first one."""
    longer = torch.zeros(x.shape[1])
    if "cu_seq_lens_q" in kwargs:
        starts = kwargs["cu_seq_lens_q"]
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            longer[start + 512 : end] = 1
    return per_document(x, kwargs) + longer[None, :, None] * x[:, :1].detach()


@pytest.mark.parametrize("mix", [window_of_512, edge_inside_a_document])
def test_a_leak_at_the_edge_of_the_real_window_is_refused(mix):
    model = Toy(mix)
    packing_probe(model)
    model.config.sliding_window = 512
    with pytest.raises(UserError, match="Toy doesn't keep documents of one batch apart"):
        packing_probe(model)
    # Rows that are too short for it never get there.
    packing_probe(model, path=TrainedPath(tokens=512))


def test_documents_longer_than_the_window_take_part_where_rows_can_hold_them():
    seen: list[int] = []

    def measured(x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        seen.append(x.shape[1])
        return per_document(x, kwargs)

    model = Toy(measured)
    model.config.sliding_window = [None, 512, 4096]
    packing_probe(model, path=TrainedPath(tokens=600))
    assert max(seen) == 19 + 512 + 9 + 26 and seen.count(max(seen)) == 4
    seen.clear()
    packing_probe(model)
    assert max(seen) == 19 + 4096 + 9 + 26


def test_a_leak_under_autocast_alone_is_refused():
    model = Toy(lambda x, kwargs: (running_sum if torch.is_autocast_enabled("cpu") else per_document)(x, kwargs))
    packing_probe(model)
    with pytest.raises(UserError, match="apart"):
        packing_probe(model, path=TrainedPath(autocast=torch.bfloat16))


@pytest.mark.parametrize("leak", [running_sum, lambda x, kwargs: x + 1e-2 * x.cumsum(1).detach()])
def test_a_leak_in_the_training_forward_alone_is_refused(leak):
    """Also one that has no gradient: values are compared there too."""
    model = Toy(lambda x, kwargs: leak(x, kwargs) if model.training else per_document(x, kwargs))
    with pytest.raises(
        UserError, match=r"document 1's|in training, changing the documents around it changes document 2"
    ):
        packing_probe(model)


def test_a_leak_where_gradients_are_wanted_is_refused():
    """A kernel that is taken for training alone, whatever the mode."""
    model = Toy(
        lambda x, kwargs: x + 1e-2 * x.cumsum(1).detach() if torch.is_grad_enabled() else per_document(x, kwargs)
    )
    with pytest.raises(UserError, match="in training, changing the documents around it"):
        packing_probe(model)


def test_a_leak_of_the_second_document_into_the_others_is_refused_in_training():
    model = Toy(
        lambda x, kwargs: x + nn.functional.pad(x.detach()[:, 19:], (0, 0, 0, 19)) if model.training else x.clone()
    )
    with pytest.raises(UserError, match="in training"):
        packing_probe(model)


def test_a_leak_under_activation_checkpointing_alone_is_refused():
    class Checkpointed(Toy):
        checkpointing: Any = None

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
            self.checkpointing = gradient_checkpointing_kwargs

    model = Checkpointed(lambda x, kwargs: (running_sum if model.checkpointing else per_document)(x, kwargs))
    assert isinstance(choose_collator(model, packing=True, pad_token_id=0), PackedCollator)
    path = TrainedPath(checkpointing={"use_reentrant": False, "selective": True})
    with pytest.raises(UserError, match="apart"):
        choose_collator(model, packing=True, pad_token_id=0, path=path)
    assert model.checkpointing == {"use_reentrant": False}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_qwen, tiny_sambay], ids=["qwen3", "sambay"])
def test_models_that_keep_documents_apart_pass_on_the_trained_path(make, autocast):
    """With the published window, activation checkpointing, and adapters that drop out."""
    from peft import LoraConfig, get_peft_model

    window = {"sliding_window": 512} if make is tiny_sambay else {}
    targets = LoraConfig(target_modules=r".*\.(q_proj|v_proj|Wqkv|fc1)", lora_dropout=0.3, task_type="CAUSAL_LM")
    model = get_peft_model(make(**window), targets)
    path = TrainedPath(autocast=autocast, checkpointing={"use_reentrant": False})
    collator = choose_collator(model, packing=True, pad_token_id=0, path=path)
    assert isinstance(collator, PackedCollator) and loss_scaling(model, collator, path) == "sum"


def test_the_path_is_that_of_the_stage(tmp_path):
    from sft.recipe.paths import RunPaths
    from sft.train.arguments import build_arguments

    train = {"bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 3, "max_length": 64}
    recipe = toy_recipe(tmp_path, train, {"max_length": None})
    one, two = (build_arguments(stage, RunPaths(recipe), bf16=False) for stage in recipe.stages)
    assert TrainedPath.of(one, 64) == TrainedPath(torch.bfloat16, {"use_reentrant": False}, 192)
    assert TrainedPath.of(two, None) == TrainedPath()


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_how_the_loss_is_scaled_is_found_out(kind):
    assert loss_scaling(Toy(per_document, kind)) == kind


def test_an_odd_loss_is_refused():
    with pytest.raises(UserError, match="gradient accumulation would change what is trained"):
        loss_scaling(Toy(per_document, "odd"))
