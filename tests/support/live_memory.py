"""Memory without memory: the bytes of tensors that are alive, counted while a model runs on tensors without values."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that come into being inside, each until its last tensor is gone: `live` and `peak` bytes.

    Which tokens a mask says is a question of values, which fake tensors don't have: `nonzero` finds all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._counted: set[int] = set()

    def known(self, tensors: Any) -> None:
        """These were there before, and don't count."""
        self._known.update(_key(tensor) for tensor in tensors)

    def elsewhere(self, tensor: Tensor) -> None:
        """This one isn't in the memory that is counted."""
        if _key(tensor) in self._counted:
            self._give(_key(tensor), tensor.untyped_storage().nbytes())
            self._known.add(_key(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            (mask,) = args
            assert mask.dim() == 1
            return torch.arange(mask.shape[0], device=mask.device)[:, None]
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and _key(value) not in self._known:
                self._take(value)
        return out

    def _take(self, tensor: Tensor) -> None:
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        self._known.add(key)
        self._counted.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor.untyped_storage(), self._give, key, size)

    def _give(self, key: int, size: int) -> None:
        self._known.discard(key)
        if key in self._counted:
            self._counted.remove(key)
            self.live -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Pass:
    """One training pass of a SambaY without values: bfloat16 products, every token supervised.

    `set_up` is called with the model, `modes` gets who counts; `half`: weights in bfloat16, as `weights_dtype` has it.

    Attributes:
        live: bytes that wait for the backward pass when the forward pass is done.
        peak: the most that lived at once, without a weight's gradient once it is whole.
        parameters, held: how many there are, and their bytes.
    """

    def __init__(
        self,
        tokens: int,
        checkpointing: dict[str, Any] | None,
        set_up: Callable[[Any], None] | None = None,
        modes: list[LiveBytes] | None = None,
        half: bool = False,
        backward: bool = True,
        **config: Any,
    ) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM

        with FakeTensorMode():
            model = Phi4FlashForCausalLM(Phi4FlashConfig(**config)).train()
            if half:
                halve(model)
            if set_up is not None:
                set_up(model)
            if checkpointing is not None:
                model.activation_checkpointing_enable(checkpointing)
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            ids = torch.zeros(1, tokens, dtype=torch.long)
            with LiveBytes() as count:
                if modes is not None:
                    modes[:] = [count]
                count.known(model.parameters())
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    loss = model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=tokens).loss
                self.live = count.live
                if backward:
                    loss.backward()
                self.peak = count.peak
            self.parameters = sum(p.numel() for p in model.parameters())
            self.held = sum(p.numel() * p.element_size() for p in model.parameters())


def halve(model: Any) -> None:
    """As sft.train.optimizer.hold_weights, which changes the weights' data: that can't be done without values."""
    from sft.train.optimizer import takes_decay

    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and takes_decay(f"{prefix}.{name}", parameter):
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(parameter, dtype=torch.bfloat16))
    model.lm_head.weight = model.model.embed_tokens.weight
