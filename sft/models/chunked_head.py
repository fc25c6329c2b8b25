"""The loss of models that aren't SambaY, in chunks: their own would make the logits of every token at once.

With 150 thousand words in the vocabulary and 16 thousand tokens in a row, the logits and their gradient in float32 are
20 GB, for a model that may itself have 1 GB.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from sambay_kernels import linear_cross_entropy
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from sft.models.sambay.contract_phi4flash import check_beside, loss_divisor

BESIDE_LABELS = ("loss_weights", "teacher_ids", "teacher_logprobs")
"""What a model whose loss is ours takes beside labels, said of each of them; `loss_options` are those of the op."""
_IGNORE = -100
_KNOWN_OUTPUTS = {"loss", "logits", "past_key_values", "cache", "hidden_states", "attentions"}
# Large enough that a soft cap on the logits, which leaves small ones as they are, shows.
_MAGNIFIED = 1024.0


def chunk_loss(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Give `model` the fused linear cross entropy in place of its own loss, where both are shown to be the same.

    They are when the output projection is a plain linear layer without bias or adapters, its input is what the backbone
    returns, its output is the logits untouched (no scale, no soft cap), and the loss is their mean cross entropy and
    nothing more. The model is asked for all that by running `inputs`; it has to be in eval mode.

    Args:
        model: a causal language model of transformers, or peft's wrapper around one.
        inputs: a small batch with labels, as its forward takes it.
    Returns:
        Whether it was done. The forward then gives the loss alone where there are labels, and is as before without.
    """
    base = _base(model)
    head, backbone = base.get_output_embeddings(), base.get_decoder()
    if type(head) is not nn.Linear or head.bias is not None or backbone is None or backbone is base:
        return False
    if "forward" in vars(base) or not _is_plain(model, backbone, head, inputs):
        return False
    _install(base, backbone, head)
    return True


def unchunk_loss(model: Any) -> None:
    """Give `model` its own forward back."""
    base = _base(model)
    if hasattr(vars(base).get("forward"), "chunks_loss"):
        del base.forward, base.get_output_embeddings().forward


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def _is_plain(model: Any, backbone: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> bool:
    """Whether logits and loss are those that the backbone's output and the head's weight give."""
    seen: dict[str, Any] = {}

    def returned(_module: Any, _args: Any, output: Any) -> None:
        seen["hidden"] = output[0]

    def magnified(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen["read"] = args[0]
        return (args[0] * _MAGNIFIED,)

    def projected(_module: Any, _args: Any, output: Tensor) -> None:
        seen["logits"] = output

    hooks = [backbone.register_forward_hook(returned), head.register_forward_hook(projected)]
    hooks.append(head.register_forward_pre_hook(magnified))
    try:
        logits = model(**{**inputs, "labels": None}, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not seen.keys() >= {"hidden", "read", "logits"} or logits.shape != seen["logits"].shape:
        return False
    if not torch.equal(seen["read"], seen["hidden"]) or not torch.equal(logits.float(), seen["logits"].float()):
        return False
    output = model(**inputs, use_cache=False)
    if not {name for name, value in output.items() if value is not None} <= _KNOWN_OUTPUTS:
        return False
    expected = F.cross_entropy(output.logits.float().flatten(0, 1), _targets(inputs["labels"]), ignore_index=_IGNORE)
    return bool(torch.isclose(output.loss.float(), expected, rtol=1e-4))


def _targets(labels: Tensor) -> Tensor:
    """What each token of `(B, T)` has to predict, `(B * T,)`."""
    return _next(labels, _IGNORE)


def _next(values: Tensor, last: int) -> Tensor:
    """What stands at the next token, `(B, T, ...)` -> `(B * T, ...)`; `last` behind a row's end."""
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], last)], 1).flatten(0, 1)


def _install(base: Any, backbone: nn.Module, head: Any) -> None:
    own, project = base.forward, head.forward

    def head_forward(hidden: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        # Here and not in the model's forward: ZeRO-3 has the weight at hand in its own module's forward only.
        return project(hidden) if targets is None else linear_cross_entropy(hidden, head.weight, targets, **options)

    @functools.wraps(own)
    def forward(*args: Any, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if labels is None:
            return own(*args, **kwargs)
        options = dict(kwargs.pop("loss_options", None) or {})
        told = {name.removeprefix("loss_"): kwargs.pop(name, None) for name in BESIDE_LABELS}
        beside = {name: _next(value, 0) for name, value in check_beside(labels, told).items()}
        hidden, targets = backbone(*args, **kwargs).last_hidden_state, _targets(labels)
        summed = head(hidden.flatten(0, 1), targets, **options, **beside)
        return CausalLMOutput(
            loss=summed / loss_divisor(num_items_in_batch, targets != _IGNORE, beside.get("weights"), summed)
        )

    forward.chunks_loss = True  # type: ignore[attr-defined]
    base.forward, head.forward = forward, head_forward
