"""What a run tells while it trains: the terminal, metrics.jsonl and TensorBoard; and the stop after a signal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.train.agree import over_processes
from sft.train.interrupt import StopSignals
from sft.utils.files import write_text
from sft.utils.progress import ProgressLine
from sft.utils.say import say


def has_numbers(logs: Mapping[str, Any]) -> bool:
    """Whether a line of a trainer's log is one of metrics.jsonl: of a step, held-out rows, or answers to suites."""
    return "loss" in logs or any(name.startswith("eval_") for name in logs)


class MetricsFile(TrainerCallback):
    """Append one JSON line per logging step to `path`, which begins with what the resumed run has really done."""

    def __init__(self, path: Path) -> None:
        self.path, self._whole = path, True

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
        """One line: step, epoch, loss, learning_rate, grad_norm and the counters; or of what is held out.

        After a line that couldn't be written, or not in whole, the file is made anew.
        """
        if not state.is_world_process_zero or not logs or not has_numbers(logs):
            return
        whole, self._whole = self._whole, False
        if whole:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(_line(state.global_step, logs))
        else:
            write_metrics(self.path, state.log_history)
        self._whole = True


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """metrics.jsonl anew from a trainer's log: what a checkpoint holds, and not what a kill or a hand left there."""
    write_text(path, "".join(_line(entry["step"], entry) for entry in history if has_numbers(entry)))


def _line(step: int, logs: dict[str, Any]) -> str:
    return json.dumps({"step": step, **logs}, allow_nan=False) + "\n"


class EventsFile(TrainerCallback):
    """Append to `path` a JSON line for each checkpoint written, and for each start that goes on from one: a report
    tells with them why steps took longer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that goes on."""
        if state.global_step:
            self._append("restart", state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint."""
        self._append("checkpoint", state)

    def _append(self, event: str, state: TrainerState) -> None:
        if state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": state.global_step, "event": event}) + "\n")


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
        signals.learn(signum)
    return signum or None


def tensorboard_callback(folder: Path, resumed_step: int) -> list[TrainerCallback]:
    """transformers' TensorBoard callback, writing to `folder`; later steps of a killed run are hidden. None where the
    folder can't be written: training goes on without."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    try:
        return [TensorBoardCallback(SummaryWriter(log_dir=str(folder), purge_step=resumed_step + 1))]
    except OSError as error:
        say(f"TensorBoard can't tell of the training ({error}): it goes on without")
        return []


class Progress(TrainerCallback):
    """Progress on stderr, with the newest numbers."""

    def __init__(self, stage: str) -> None:
        self.stage, self._line = stage, ProgressLine(stage, "steps")
        self._numbers: list[str] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where it begins."""
        self._show(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step; the last one is shown with its numbers."""
        if state.global_step < state.max_steps:
            self._show(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the newest numbers; the loss of held-out rows has a line of its own."""
        if logs and "loss" in logs:
            self._numbers = _numbers(logs)
        if logs and "eval_loss" in logs:
            where = f"{state.global_step:,}/{state.max_steps:,} steps"
            say(f"{self.stage}: {where}, loss of held-out rows {logs['eval_loss']:.4f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the end, and leave the terminal."""
        if state.global_step >= state.max_steps:
            self._show(state)
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also after an error."""
        self._line.close()

    def _show(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self._line(state.global_step, state.max_steps, self._numbers)


def _numbers(logs: dict[str, Any]) -> list[str]:
    """The most important first: the last ones are left out where there is little room."""
    parts = [f"loss {logs['loss']:.4f}", f"{logs.get('tokens_per_second', 0.0):,.0f} tok/s"]
    parts.append(f"lr {logs.get('learning_rate', 0.0):.2e}")
    return [*parts, f"grad {logs['grad_norm']:.3f}"] if "grad_norm" in logs else parts
