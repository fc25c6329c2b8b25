"""Whether there is room for what a stage will write: asked before its first step, and before each checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.train.agree import over_processes
from sft.utils.distributed import decide, is_main
from sft.utils.errors import UserError
from sft.utils.tables import counted

if TYPE_CHECKING:
    from sft.train.trainer import SambayTrainer

MOMENTS = {"sgd": 4, "adafactor": 1, "adagrad": 4, "rmsprop": 4, "lion": 4, "8bit": 2}
"""Bytes of an optimizer's state for each weight, by what its name holds; of all others two float32."""
BESIDE = 1 << 20
"""Bytes of the tokenizer and all that is small."""


class Room:
    """The disk that the stage's folder is on. All processes call these alike; the first one looks."""

    def __init__(self, trainer: SambayTrainer, stage: str) -> None:
        self._folder, self._stage = Path(str(trainer.args.output_dir)), stage
        self._weights = weights_bytes(trainer.model)
        self.checkpoint = checkpoint_bytes(trainer)

    def check_start(self, saves: int, limit: int | None) -> None:
        """Raise UserError when the checkpoints of a stage that has `saves` to write yet, and its result, don't fit.

        `limit`: how many are kept, beside the one that is written. Those that are there make room for new ones.
        """
        decide(lambda: self._check_start(saves, limit))

    def _check_start(self, saves: int, limit: int | None) -> None:
        there = len(list(self._folder.glob("checkpoint-*")))
        most = saves + there if limit is None else min(saves + there, limit + 1)
        new = max(most - there, min(saves, 1))
        needed = new * self.checkpoint + self._weights
        free = self._free()
        if free < needed:
            raise UserError(
                f"There isn't room for stage {self._stage}: {counted(new, 'checkpoint')} of {told(self.checkpoint)} "
                f"and its result need {told(needed)} at {self._folder}, and {told(free)} are free. Make room, lower "
                "save_total_limit or raise save_steps, or set another output_dir."
            )

    def check_save(self, step: int) -> None:
        """Raise UserError when the checkpoint of `step` doesn't fit. What is there is left alone."""
        # Not by `decide`, whose messages go through the launcher's store: a launcher that has died mustn't keep the
        # processes that it leaves behind from saving.
        free, needed = over_processes([self._free(), self.checkpoint] if is_main() else [0, 0])
        if free < needed:
            raise UserError(
                f"There isn't room for checkpoint-{step} of stage {self._stage}: it needs {told(needed)} at "
                f"{self._folder}, and {told(free)} are free. Make room and give the same command again; it continues "
                "from the last whole checkpoint."
            )

    def saved(self, folder: Path) -> None:
        """Learn from a checkpoint that is written how large they are."""
        self.checkpoint = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def low(self) -> str:
        """That the next checkpoint won't fit, when none is being written; empty where it will."""
        free = self._free()
        return (
            f"{told(free)} are free, and a checkpoint takes {told(self.checkpoint)}" if free < self.checkpoint else ""
        )

    def _free(self) -> int:
        there = next(at for at in (self._folder, *self._folder.parents) if at.is_dir())
        return shutil.disk_usage(there).free


def weights_bytes(model: Any) -> int:
    """Bytes of what a stage hands on: all weights in float32, or the adapters."""
    adapters = hasattr(model, "peft_config")
    return 4 * sum(_size(p) for p in model.parameters() if p.requires_grad or not adapters) + BESIDE


def checkpoint_bytes(trainer: SambayTrainer) -> int:
    """Bytes of a checkpoint, before there is one: the weights, the optimizer's state, DeepSpeed's copies of both."""
    trained = sum(_size(p) for p in trainer.model.parameters() if p.requires_grad)
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    state = next((size for part, size in MOMENTS.items() if part in name), 8)
    if name == "sgd" and "momentum" not in (trainer.args.optim_args or ""):
        state = 0
    copies = 8 if trainer.is_deepspeed_enabled else 0
    average = 4 if trainer.ema is not None else 0
    return weights_bytes(trainer.model) + (state + copies + average) * trained


def _size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves a parameter empty


def told(size: int) -> str:
    """Bytes as a disk's maker counts them."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
