"""What transformers, TRL and peft may hand to the model: honoured, or refused by name; nothing is swallowed.

This file travels with a pushed checkpoint; it may import only torch and transformers, and its neighbours relatively.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)

# transformers 5.24 renamed the outputs' field; the old name would be announced as deprecated at every call.
CACHE_FIELD = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def refuse_unknown(keywords: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse keywords the forward doesn't know, unless they are None.

    Raises:
        TypeError: naming the keyword, and known names that look like it.
    """
    for name, value in keywords.items():
        if value is not None:
            near = [f"`{match}`" for match in difflib.get_close_matches(name, [*known], n=3, cutoff=0.6)]
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(f"SambaY's forward doesn't know the keyword `{name}`{hint}")


def one_cache(past_key_values: Cache | None, cache: Cache | None, config: Any) -> DynamicCache | None:
    """The cache, under whichever of its two names it came, if it is of the kind that SambaY decodes with.

    Raises:
        ValueError: when there are two, or when it is of another kind: static, quantized, offloaded, without room for
            the states of Mamba layers, or filled from outside with keys and values alone.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names for one thing: give one of them")
    given: Any = cache if past_key_values is None else past_key_values
    if given is None:
        return None
    advice = "use DynamicCache(config=model.config), or leave it out (cache_implementation too)"
    if not isinstance(given, DynamicCache):
        raise ValueError(f"SambaY can't decode with a {type(given).__name__}: {advice}")
    if getattr(given, "offloading", False):
        raise ValueError(f"SambaY can't decode with an offloaded cache: its states are changed in place; {advice}")
    layers: list[Any] = given.layers
    scans = range(0, config.memory_layer + 1, 2)
    if len(layers) != config.num_hidden_layers or not all(hasattr(layers[i], "recurrent_states") for i in scans):
        raise ValueError(
            "this DynamicCache wasn't made for SambaY: it has no room for Mamba's states (so is that of peft's prefix "
            f"tuning); {advice}"
        )
    if given.get_seq_length() and any(layers[i].recurrent_states[0] is None for i in scans):
        raise ValueError("this cache holds keys and values but no Mamba states: a prefix of keys can't be prepended")
    return given


def tell_no_cache() -> None:
    """Say, once, that a cache which was asked for isn't made."""
    logger.warning_once("use_cache=True: there is no cache while training with gradient checkpointing")


def check_second_borders(cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None) -> None:
    """Queries and keys are the same tokens here, so their documents must be the same.

    Raises:
        ValueError: when the two differ (on CUDA their values by an assertion of the device: nothing waits).
    """
    if cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q:
        return
    if cu_seq_lens_q is None or cu_seq_lens_q.shape != cu_seq_lens_k.shape:
        raise ValueError("cu_seq_lens_k needs cu_seq_lens_q, equal to it: queries and keys are the same tokens")
    same = cu_seq_lens_q == cu_seq_lens_k.to(cu_seq_lens_q.device)
    require(same.all(), "cu_seq_lens_q and cu_seq_lens_k must be equal")


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError unless a 0-d bool tensor is true; a CUDA device asserts it by itself, and no one waits.

    Raises:
        ValueError: with `message`.
    """
    if condition.is_cuda:
        torch._assert_async(condition, message)
    elif condition.device.type != "meta" and not condition.tolist():
        raise ValueError(message)


def check_cache_position(cache_position: Tensor | None, past_length: int, width: int) -> None:
    """Tokens are always appended to the cache; older callers of transformers say where.

    Raises:
        ValueError: when they say another place.
    """
    if cache_position is not None and cache_position.tolist() != list(range(past_length, past_length + width)):
        raise ValueError(
            f"cache_position must be {past_length} to {past_length + width - 1}, the places behind the cache's tokens; "
            "leave it out"
        )


def refuse_per_row_adapters(model: nn.Module) -> None:
    """peft's mixed batches give every row of a linear layer's input its adapter; here its rows are packed tokens.

    Raises:
        ValueError: when peft has hooked such a choice into a layer of `model`.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            for name in ("adapter_names", "alora_offsets"):
                if isinstance(hook, functools.partial) and hook.keywords.get(name) is not None:
                    raise ValueError(
                        f"`{name}` (an adapter by row) can't be used with SambaY, whose layers see packed tokens: run "
                        "the rows of each adapter on their own, after model.set_adapter(name)"
                    )


def check_logits_to_keep(logits_to_keep: Any) -> None:
    """Refuse what says of no columns that they are kept.

    Raises:
        ValueError: for another type, a negative number, a tensor of no or more than two dimensions.
    """
    if isinstance(logits_to_keep, Tensor):
        fits = logits_to_keep.dim() in (1, 2)
    else:
        fits = isinstance(logits_to_keep, int) and logits_to_keep >= 0
    if not fits:
        raise ValueError(f"logits_to_keep must be a number of columns or a tensor of columns, not {logits_to_keep!r}")


def check_labels(batch_shape: torch.Size, **labels: Tensor | None) -> None:
    """Refuse labels that aren't one for each token of the batch. Raises ValueError naming them."""
    for name, given in labels.items():
        if given is not None and given.shape != batch_shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; these tokens need {tuple(batch_shape)}")


def check_beside(labels: Tensor | None, beside: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is said of the labels, without what isn't given.

    Raises:
        ValueError: when it isn't said of each label `(B, T)`, or of none.
    """
    given = {name: value for name, value in beside.items() if value is not None}
    for name, value in given.items():
        if labels is None:
            raise ValueError(f"{name}: there are no labels that they could be said of")
        shape = value.shape if name == "weights" else value.shape[:-1]
        if shape != labels.shape:
            raise ValueError(f"{name} have shape {tuple(value.shape)}; these labels need {tuple(labels.shape)} of them")
    return given


def skips_logits(asked: bool | None, with_loss: bool, training: bool) -> bool:
    """Whether the loss alone is computed: as asked, by default in training. Raises ValueError without labels."""
    if asked and not with_loss:
        raise ValueError("skip_logits leaves nothing to compute where there are no labels")
    return with_loss and (training if asked is None else asked)


def loss_divisor(count: Any, supervised: Tensor, weights: Tensor | None, summed: Tensor) -> Tensor:
    """What the summed loss is divided by, in its type; 1 for nothing at all.

    Args:
        count: the number of items, or the sum of their weights; None: that of the `supervised` tokens given here.
    """
    if count is None:
        count = supervised.sum() if weights is None else (weights.double() * supervised).sum()
    divisor = torch.as_tensor(count, device=summed.device).to(summed.dtype)
    return torch.where(divisor > 0, divisor, 1.0)


def keep_columns(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The columns of `(B, T, hidden)` whose logits are wanted.

    Args:
        logits_to_keep: the last so many (0: all); or columns `(n,)`, or columns of each row `(B, n)`; or a bool mask
            `(B, T)`, which gives `(number of true, hidden)`.
    """
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:]
    if logits_to_keep.dim() == 2 and logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)
    return hidden[:, logits_to_keep]
