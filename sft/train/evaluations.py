"""Suites that are answered while a stage trains, every so many steps or tokens, without a trace in what is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.train.interrupt import StopSignals
from sft.train.live import answering_model, copied_bytes
from sft.train.probe import undisturbed
from sft.utils.distributed import gather, world_size
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.schema import EverySection
    from sft.train.trainer import SambayTrainer

Answer = Callable[[Any, int, Callable[[], None]], Mapping[str, Mapping[str, Any]]]
"""What a model answers after a step, on all processes: (model, step, check) -> metrics by suite. It calls `check` now
and then, which raises Stopped where a signal has arrived; what is answered by then is kept."""


class EndedAtOnce(Exception):  # noqa: N818 (nothing went wrong)
    """The step that training goes on from is its last one."""


def key_of(suite: str, name: str) -> str:
    """What a line of the log calls a number; trackers show it as `eval/SUITE/NAME`."""
    return f"eval_{suite}/{name}"


def as_logged(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What a line of the log says of metrics by suite."""
    numbers: dict[str, float] = {}
    for suite, found in metrics.items():
        told = {"pass_at_1": found["pass_at_1"], "tokens": found["tokens"]["all"]["mean"], "cut_off": found["cut_off"]}
        numbers |= {key_of(suite, name): value for name, value in told.items()}
    return numbers


def passed(suite: str, state: TrainerState) -> list[tuple[int, float]]:
    """(step, pass@1) of each evaluation in the log, in their order."""
    key = key_of(suite, "pass_at_1")
    return [(int(line["step"]), line[key]) for line in state.log_history if key in line]


class Evaluations(TrainerCallback):
    """Asks for answers when they are due and logs what they come to.

    That follows from the log, which is part of each checkpoint: a step that is done again is asked again, and looked up
    by the content of its weights. A signal ends it unfinished; the run that goes on from there asks first.

    Args:
        dtype: what the run's models answer in, "float32" or "bfloat16".
    """

    def __init__(
        self, trainer: SambayTrainer, every: EverySection, answer: Answer, signals: StopSignals, dtype: str
    ) -> None:
        self._trainer, self._every, self._answer, self._signals = trainer, every, answer, signals
        self._dtype = dtype

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What was due after the step that training goes on from."""
        size = copied_bytes(self._trainer.model, self._dtype)
        if size:
            stage = self._trainer.identity["stage"]
            say(f"{stage}: evaluations hold a copy of its weights meanwhile, {size / 1e9:.2f} GB on each process")
        if state.global_step and self._is_due(state):
            self._look(state)
            if control.should_training_stop:
                raise EndedAtOnce

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before a checkpoint of this step is saved, which then holds it in its log."""
        if self._is_due(state):
            self._look(state)

    def _is_due(self, state: TrainerState) -> bool:
        lines = [line for line in state.log_history if any(name.endswith("/pass_at_1") for name in line)]
        if self._every.steps is not None:
            done = any(line["step"] == state.global_step for line in lines)
            return state.global_step % self._every.steps == 0 and not done
        assert self._every.tokens is not None
        before = lines[-1]["tokens"] if lines else 0
        return int(self._trainer.counters["tokens"]) // self._every.tokens > before // self._every.tokens

    def _look(self, state: TrainerState) -> None:
        self._trainer.pause()
        with undisturbed(self._trainer.model), answering_model(self._trainer, self._dtype) as model:
            metrics = self._answered(model, state.global_step)
        if metrics is None:
            self._trainer.go_on()
            return
        self._trainer.log_aside({"tokens": int(self._trainer.counters["tokens"]), **as_logged(metrics)})

    def _answered(self, model: Any, step: int) -> Mapping[str, Mapping[str, Any]] | None:
        """The metrics, on all processes; None where a signal came first on one of them."""
        try:
            if world_size() == 1:
                with self._signals.heard():
                    metrics = self._answer(model, step, self._signals.check)
            else:
                # Not in the middle of a word between two processes: they count those.
                metrics = self._answer(model, step, self._signals.check)
            done = True
        except KeyboardInterrupt:
            if self._signals.received is None and world_size() == 1:
                raise
            done = False
        # Also where one has died: the others finish what it had begun, but can't train on without it.
        return metrics if all(gather(done)) else None
