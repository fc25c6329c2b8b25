"""A moving average of the weights while a stage trains: in float32, on the first process, and in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.recipe.outcome_keys import begins
from sft.utils.distributed import is_main

if TYPE_CHECKING:
    from sft.recipe.outcome_keys import EmaSection

FILE = "ema.safetensors"
"""The average, in a checkpoint; absent in those from before its start."""


class Ema(TrainerCallback):
    """After each step: average = decay * average + (1 - decay) * weights; it begins with the weights after `start`.

    The first process alone keeps it, of all trained parameters: each one has the same, under DDP, ZeRO-1 and ZeRO-2.
    `kept`: the checkpoint that training goes on from.
    """

    def __init__(self, model: Any, settings: EmaSection, kept: Path | None) -> None:
        from safetensors.torch import load_file

        self._model, self._settings, self._start = model, settings, 0
        self._held: dict[str, Tensor] = {}
        if is_main() and kept is not None and (kept / FILE).is_file():
            self._held = load_file(kept / FILE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the start's weights, or go on with what the checkpoint holds."""
        self._start = begins(self._settings, state.max_steps)
        if self._held:
            devices = {name: parameter.device for name, parameter in self._parameters().items()}
            self._held = {name: held.to(devices[name]) for name, held in self._held.items()}
        elif state.global_step == self._start:
            self._begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the step's weights in, before a checkpoint of it is saved."""
        if state.global_step == self._start:
            self._begin()
        elif self._held:
            weights = self._parameters()
            share = 1.0 - self._settings.decay
            torch._foreach_lerp_(list(self._held.values()), [weights[name].float() for name in self._held], share)

    def return_to(self, folder: Path) -> None:
        """Go on with what the checkpoint `folder` holds, as far as it has one."""
        from safetensors.torch import load_file

        if self._held and (folder / FILE).is_file():
            self._held = {name: held.to(self._held[name].device) for name, held in load_file(folder / FILE).items()}
        elif self._held:
            self._begin()

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint that isn't marked whole yet."""
        from safetensors.torch import save_file

        if self._held:
            save_file(self._held, folder / FILE)

    def weights(self, trained: dict[str, Any], *, rounded: bool = True) -> dict[str, Any]:
        """The state dict `trained` with the average in place of the trained parameters, on the first process.

        `rounded`: to the nearest of the type that each is trained in (`weights_dtype`); else in float32, as it is kept.
        """
        held = {name: held.cpu() for name, held in self._held.items()}
        if rounded:
            held = {name: value.to(trained[name].dtype) for name, value in held.items()}
        return {**trained, **held}

    def _begin(self) -> None:
        self._held = {name: parameter.float().clone() for name, parameter in self._parameters().items()}

    def _parameters(self) -> dict[str, Tensor]:
        if not is_main():
            return {}
        return {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}
