"""What somebody should look at while a stage trains, as JSON lines in the run's folder: for scripts that watch it."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.train.memorised import ACCURACY
from sft.utils.distributed import is_main, rank
from sft.utils.say import say

KINDS = {
    "diverging": "a step was left out, the stage went back to a checkpoint, or its loss is no number",
    "stalled": "a process got no further, and ends",
    "disk-low": "the next checkpoint won't fit",
    "memorising": "nearly every trained token is the likeliest one, or the loss of held-out rows rises",
    "idle": "the steps of a line of the log had tokens to train, and loss and gradient are 0",
}
"""Kind of an alert -> what has happened."""

BY_HEART, OVER = 0.99, 0.95
"""Of trained tokens that are the likeliest ones: from where on rows are known by heart, and below which no more."""
ENOUGH = 1000
"""Trained tokens, of one line of the log or the latest ones, that tell so: of a few, all may be right by chance."""
RISEN = 1.05
"""Times the lowest loss of held-out rows so far: one that is so high has risen."""


class Alerts(TrainerCallback):
    """Appends to `path` a line for each alert: time (UTC), stage, step, rank, kind (of KINDS), message."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path, self._stage = path, stage
        self._by_heart, self._lowest, self._told_rise = False, math.inf, False
        self._recent: list[tuple[float, float]] = []
        self._trained = 0.0
        self._idle = False

    def __call__(self, kind: str, step: int, message: str) -> None:
        """Add one. A disk that takes no more is no reason to stop."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
        time = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"time": time, "stage": self._stage, "step": step, "rank": rank(), "kind": kind, "message": message}
        try:
            with open(self._path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            say(f"{self._stage}: the alert {kind} can't be written to {self._path}: {error}")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Know what a stage that goes on has told already: its checkpoint's log says so."""
        for logs in state.log_history if is_main() else ():
            self._seen(logs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """See whether the stage learns its rows by heart, or nothing at all; each is told once, until it is over."""
        for kind, message in self._seen(logs) if is_main() and logs else ():
            self(kind, state.global_step, message)
            if kind == "idle":
                say(f"{self._stage}: {message}")

    def _seen(self, logs: dict[str, Any]) -> list[tuple[str, str]]:
        """Take a line of the log in; kind and message of what it begins."""
        told, accuracy, loss = [], self._accuracy(logs), logs.get("eval_loss")
        if "loss" in logs:
            # A line without a token to train tells no accuracy.
            idle = ACCURACY in logs and logs["loss"] == 0 and logs.get("grad_norm") == 0
            if idle and not self._idle:
                text = "loss and gradient are 0, so nothing is learned: no token is as likely as `loss.threshold`"
                told.append(("idle", f"{text} asks for, or all weights of rows are 0"))
            self._idle = idle
        if accuracy is not None:
            if accuracy >= BY_HEART and not self._by_heart:
                told.append(("memorising", f"{accuracy:.1%} of the trained tokens are the likeliest ones"))
            self._by_heart = accuracy >= (OVER if self._by_heart else BY_HEART)
        if loss is not None:
            rises = loss > RISEN * self._lowest
            if rises and not self._told_rise:
                text = f"the loss of held-out rows has risen from {self._lowest:.4f} to {loss:.4f}"
                told.append(("memorising", text))
            self._told_rise, self._lowest = rises, min(self._lowest, loss)
        return told

    def _accuracy(self, logs: dict[str, Any]) -> float | None:
        """Of the latest ENOUGH trained tokens; None where there are fewer, or a line tells of none. A line that doesn't
        say how many it is of counts by itself."""
        if ACCURACY not in logs:
            return None
        total = logs.get("supervised_tokens")
        tokens = ENOUGH if total is None else total - self._trained
        self._trained = self._trained if total is None else total
        self._recent.append((tokens, logs[ACCURACY]))
        while sum(n for n, _ in self._recent[1:]) >= ENOUGH:
            del self._recent[0]
        there = sum(n for n, _ in self._recent)
        return sum(n * accuracy for n, accuracy in self._recent) / there if there >= ENOUGH else None


def read_alerts(path: Path) -> list[dict[str, Any]]:
    """All that have been written to `path`; a line that was cut off by a kill is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
