"""A stage that doesn't get on is ended: where each of its processes stands is written down, and the same command, or a
launcher that starts again by itself, continues from the last checkpoint."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.train.alerts import Alerts
from sft.utils.distributed import rank
from sft.utils.error_codes import STALLED

GRACE = 5.0
"""Seconds between a process's stack and its end, so that the others, which wait for it, write theirs down too before
a launcher ends them."""


class Watchdog(TrainerCallback):
    """Ends the process when no micro-batch was done for `seconds`; its stacks go to `folder`/rank-N.txt.

    Checkpoints, evaluations and all else that is no training time aren't watched.
    """

    def __init__(self, seconds: float, folder: Path, stage: str, alerts: Alerts) -> None:
        self._seconds, self._folder, self._stage, self._alerts = seconds, folder, stage, alerts
        self._last: float | None = None
        self._step = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """The stage gets on."""
        self._last = time.monotonic()

    def rest(self) -> None:
        """What comes now may take as long as it takes, until the next `beat`."""
        self._last = None

    def close(self) -> None:
        """Nothing is watched any more."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Watch from now on."""
        self._step = state.global_step
        self.beat()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Its rows are there."""
        self.beat()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A micro-batch is done."""
        self.beat()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A step is done."""
        self._step = state.global_step
        self.beat()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 5)):
            last = self._last
            if last is not None and time.monotonic() - last > self._seconds:
                self._end(time.monotonic() - last)

    def _end(self, waited: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{rank()}.txt"
        with open(path, "w", encoding="utf-8") as handle:
            handle.write(f"rank {rank()}: nothing done for {waited:.0f} s after step {self._step}\n\n")
            handle.flush()
            faulthandler.dump_traceback(file=handle, all_threads=True)
        sentence = (
            f"sft: Stage {self._stage} has not got on for {waited:.0f} s after step {self._step}: where rank {rank()} "
            f"stands is in {path}. The same command continues from the last whole checkpoint.\n"
        )
        self._alerts("stalled", self._step, f"nothing was done for {waited:.0f} s; where it stands is in {path}")
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, sentence.encode())
        time.sleep(min(GRACE, self._seconds))
        os._exit(STALLED)
