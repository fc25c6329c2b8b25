"""What a run tells while it trains: the terminal, metrics.jsonl and TensorBoard; and the stop after a signal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.train.agree import over_processes
from sft.train.interrupt import StopSignals
from sft.utils.files import write_text

_NUMBERS = {"loss", "eval_loss"}
"""What makes a line of a trainer's log one of metrics.jsonl: of a training step, or of the held-out rows."""

LINE_EVERY = 5.0
"""Seconds between progress lines where the terminal can't redraw."""


class MetricsFile(TrainerCallback):
    """Append one JSON line per logging step to `path`, which begins with what the resumed run has really done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the checkpoint's own log."""
        if state.is_world_process_zero:
            write_metrics(self.path, state.log_history)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line: step, epoch, loss, learning_rate, grad_norm and the counters; or the loss of held-out rows."""
        if state.is_world_process_zero and logs and _NUMBERS & logs.keys():
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(_line(state.global_step, logs))


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """metrics.jsonl anew from a trainer's log: what a checkpoint holds, and not what a kill or a hand left there."""
    write_text(path, "".join(_line(entry["step"], entry) for entry in history if _NUMBERS & entry.keys()))


def _line(step: int, logs: dict[str, Any]) -> str:
    return json.dumps({"step": step, **logs}, allow_nan=False) + "\n"


class StopOnSignal(TrainerCallback):
    """At the end of the step in which a signal came: save a checkpoint and stop, on all processes together."""

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask all processes whether one of them was told to stop."""
        if share_signal(self.signals):
            control.should_save = True
            control.should_training_stop = True
        return control


def share_signal(signals: StopSignals) -> int | None:
    """The signal that this or another process has received, which is then received by all. All must call this."""
    (signum,) = over_processes([signals.received or 0], torch.distributed.ReduceOp.MAX)
    if signum:
        signals.received = signum
    return signum or None


def tensorboard_callback(folder: Path, resumed_step: int) -> TrainerCallback:
    """transformers' TensorBoard callback, writing to `folder`; later steps of a killed run are hidden."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder), purge_step=resumed_step + 1))


class Progress(TrainerCallback):
    """Progress on stderr: a redrawn bar on a terminal, else a line every few seconds."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._bar: Any = None
        self._task: Any = None
        self._last_line = 0.0
        self._began = (0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self._began = (state.global_step, time.monotonic())
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Remaining(),
        )
        self._bar = Progress(*columns, TextColumn("{task.fields[numbers]}", markup=False), console=Console(stderr=True))
        self._task = self._bar.add_task(self.stage, total=state.max_steps, completed=state.global_step, numbers="")
        self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest numbers."""
        if state.is_world_process_zero and logs and "eval_loss" in logs:
            self._held_out(state, logs)
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        numbers = _numbers(logs)
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, numbers=numbers)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY or state.global_step in (self._began[0] + 1, state.max_steps):
            self._last_line = now
            left = self._left(state, now)
            print(
                f"{self.stage}: step {state.global_step}/{state.max_steps}  {numbers}{left}",
                file=sys.stderr,
                flush=True,
            )

    def _held_out(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """A line of its own, above the bar where there is one."""
        step = f"{state.global_step}/{state.max_steps}"
        line = f"{self.stage}: step {step}  loss of held-out rows {logs['eval_loss']:.4f}"
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, state: TrainerState, now: float) -> str:
        done = state.global_step - self._began[0]
        if done < 2 or state.global_step >= state.max_steps:
            return ""
        seconds = (now - self._began[1]) / done * (state.max_steps - state.global_step)
        return f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"


def _numbers(logs: dict[str, Any]) -> str:
    parts = [f"loss {logs['loss']:.4f}", f"lr {logs.get('learning_rate', 0.0):.2e}"]
    if "grad_norm" in logs:
        parts.append(f"grad {logs['grad_norm']:.3f}")
    return "  ".join([*parts, f"{logs.get('tokens_per_second', 0.0):,.0f} tok/s"])
