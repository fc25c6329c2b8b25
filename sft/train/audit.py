"""The gradient audit: every trainable tensor must get a gradient in the first backward pass of a run.

A parameter that silently gets none (an adapter behind a detached tensor, a branch that never runs) would be saved and
pushed as if it had been trained. The published SambaY code leaves 34 of 146 LoRA adapters so.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sft.utils.errors import UserError


class GradientAudit:
    """Notes which parameters of `model` receive a gradient; works under DDP and DeepSpeed, which free `.grad` early."""

    def __init__(self, model: nn.Module) -> None:
        self._waiting: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._total = len(self._waiting)
        self._seen: set[str] = set()
        self._handles: list[RemovableHandle] = [self._watch(name, p) for name, p in self._waiting.items()]

    def _watch(self, name: str, parameter: nn.Parameter) -> RemovableHandle:
        def note(_: Tensor) -> None:
            self._seen.add(name)

        # On the gradient's way into the leaf: engines that partition gradients take them away right after it.
        return parameter.register_hook(note)

    def missing(self) -> list[str]:
        """Names of trainable tensors that have had no gradient so far."""
        return [name for name in self._waiting if name not in self._seen]

    def finish(self) -> None:
        """Stop watching; raise UserError when a trainable tensor had no gradient."""
        missing = self.missing()
        self.close()
        if missing:
            shown = ", ".join(missing[:12]) + (f" and {len(missing) - 12} more" if len(missing) > 12 else "")
            raise UserError(
                f"{len(missing)} of {self._total} trainable tensors got no gradient in the first backward pass, so "
                f"training would leave them as they are: {shown}. Freeze them or leave them out (for LoRA: remove "
                "their modules from lora_target_modules)."
            )

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
