"""What a stage hands on, and when it ends: averages, the best checkpoint, a stop once the rows are known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model, model_validator

from sft.recipe.problems import KeyProblem, Section, raise_problems

if TYPE_CHECKING:
    from sft.recipe.schema import Stage


HANDS_ON = "hands_on"
"""The part of a stage's key that says what it hands on: its training, and so its checkpoints, are the same without."""


class EmaSection(Section):
    """An exponential moving average of the weights, in float32, kept in the checkpoints."""

    decay: float = Field(gt=0, lt=1, description="Share of the average that a step leaves, e.g. 0.999.")
    start: float = Field(
        default=0.0,
        ge=0,
        description="Step, or, under 1, fraction of all steps, whose weights it begins with. 0: those of the start.",
    )


class StopSection(Section):
    """When a stage ends before its last step."""

    token_accuracy: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="End the stage at the first line of the log (`logging_steps`) whose mean_token_accuracy is this.",
    )
    metric: str | None = Field(
        default=None,
        description="With patience: the suite, of those that `evaluate.every` asks, whose pass@1 is watched.",
    )
    patience: int | None = Field(
        default=None,
        gt=0,
        description="End the stage once so many evaluations in a row were no better at `metric` than one before them.",
    )

    @model_validator(mode="after")
    def _check(self) -> StopSection:
        if (self.metric is None) != (self.patience is None):
            key, other = ("metric", "patience") if self.patience is None else ("patience", "metric")
            raise_problems("stop_when", [KeyProblem((key,), f"goes with {other}", getattr(self, key))])
        if self.token_accuracy is None and self.metric is None:
            reason = "needs token_accuracy, or metric and patience"
            raise_problems("stop_when", [KeyProblem((), reason, None)])
        return self

    @property
    def suite(self) -> str | None:
        """The suite that `metric` is of."""
        return self.metric and self.metric.partition(".")[0]


# `with` is a word of Python's own, so that a class can't declare it.
_WITH: Any = {
    "with": (
        Literal["start"] | None,
        Field(default=None, description="Interpolate with the weights that the stage started from (WiSE-FT)."),
    )
}
_WithStart: Any = create_model("_WithStart", __base__=Section, **_WITH)


class AverageSection(_WithStart):
    """What is averaged at a stage's end, in float64 and rounded once, and handed on."""

    last: int | None = Field(
        default=None, gt=0, description="So many of the newest checkpoints, the last step's included."
    )
    checkpoints: list[int | str] | None = Field(
        default=None, min_length=1, description="These checkpoints: steps, or names such as checkpoint-200."
    )
    ema: bool = Field(default=False, description="The average that `train.ema` keeps.")
    weight: float | None = Field(
        default=None, gt=0, lt=1, description="Weight of what was trained; the start's is the rest. With `with: start`."
    )

    @property
    def with_start(self) -> bool:
        """Whether the stage's starting weights take part."""
        return getattr(self, "with") == "start"

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are named, in their order."""
        return [int(str(name).removeprefix("checkpoint-")) for name in self.checkpoints or ()]


def hands_on(stage: Stage) -> dict[str, Any] | None:
    """All that what a stage hands on follows from, beside its training; None: it hands on its last step's weights."""
    if stage.average is None and stage.keep_best is None:
        return None
    train = stage.train
    told: dict[str, Any] = {"average": stage.average and stage.average.model_dump()}
    if stage.keep_best or (stage.average and stage.average.last):
        told |= {"save_strategy": train.save_strategy, "save_steps": train.save_steps}
    if stage.keep_best:
        suites = [suite for suite in stage.evaluate.suites if suite.name == stage.keep_best.partition(".")[0]]
        told |= {
            "keep_best": stage.keep_best,
            "of": train.save_total_limit,
            "suite": [one.model_dump() for one in suites],
            **_answers(stage),
        }
    return told


def stops(stage: Stage) -> dict[str, Any] | None:
    """All that a stop before the last step follows from; None: there is none."""
    if stage.stop_when is None:
        return None
    told, evaluate = stage.stop_when.model_dump(exclude_none=True), stage.evaluate
    if stage.stop_when.token_accuracy is not None:
        told |= {key: getattr(stage.train, key) for key in ("logging_steps", "logging_first_step")}
    if stage.stop_when.metric is not None and evaluate.every is not None:
        watched = [suite for suite in evaluate.while_training() if suite.name == stage.stop_when.suite]
        told |= {
            "every": evaluate.every.model_dump(include={"steps", "tokens"}),
            "suite": [suite.model_dump(exclude={"batch_size"}) for suite in watched],
            **_answers(stage),
        }
    return told


def _answers(stage: Stage) -> dict[str, Any]:
    """The type that answers are given in, where the recipe says it; a run keeps what it began with by itself."""
    return {} if stage.evaluate.bf16 is None else {"bf16": stage.evaluate.bf16}


def outcome_problems(stage: Stage) -> list[KeyProblem]:
    """What can't be, as far as the recipe alone tells it, by its place in the stage."""
    average = [found._replace(loc=("average", *found.loc)) for found in _average_problems(stage)]
    return [*average, *_limits(stage), *_ema_problems(stage), *_best_problems(stage), *_stop_problems(stage)]


def _average_problems(stage: Stage) -> Iterator[KeyProblem]:
    average = stage.average
    if average is None:
        return
    kinds = [key for key in ("last", "checkpoints", "ema") if getattr(average, key)]
    if stage.train.use_peft:
        reason = (
            "can't be of adapters: an average of their A and of their B isn't that of their products; train all "
            "weights, or leave it out"
        )
        yield KeyProblem((), reason, None)
    if len(kinds) > 1:
        yield KeyProblem((kinds[1],), f"can't stand beside {kinds[0]}: what is averaged is one of them", None)
    if not kinds and not average.with_start:
        yield KeyProblem((), "needs one of last, checkpoints, ema and `with: start`", None)
    if average.with_start != (average.weight is not None):
        key, other = ("weight", "`with: start`") if average.weight is not None else ("with", "weight")
        yield KeyProblem((key,), f"goes with {other}", None)
    for place, name in enumerate(average.checkpoints or ()):
        if not str(name).removeprefix("checkpoint-").isdecimal() or (isinstance(name, str) and name.isdecimal()):
            yield KeyProblem(("checkpoints", place), f"is a step, or checkpoint-STEP, got {name!r}", name)
            return
    if len(set(average.steps())) < len(average.steps()):
        yield KeyProblem(("checkpoints",), "names one checkpoint twice", average.checkpoints)


def _limits(stage: Stage) -> Iterator[KeyProblem]:
    """Checkpoints that are asked for and never saved, or not kept until they are averaged."""
    average, train = stage.average, stage.train
    if average is None or not (average.last or average.checkpoints):
        return
    if any(found.loc[:1] == ("checkpoints",) for found in _average_problems(stage)):
        return
    if average.checkpoints and stage.stop_when is not None:
        reason = "can't stand beside stop_when, which may end the stage before they are saved: set last"
        yield KeyProblem(("average", "checkpoints"), reason, average.checkpoints)
    key, steps = ("last", []) if average.last else ("checkpoints", average.steps())
    wanted = average.last or len(steps)
    if train.save_strategy == "no":
        yield KeyProblem(("average", key), "needs checkpoints, and save_strategy is `no`: set steps or epoch", wanted)
    elif train.save_total_limit is not None and train.save_total_limit < wanted:
        reason = f"needs {wanted} checkpoints, and save_total_limit keeps {train.save_total_limit}: raise it"
        yield KeyProblem(("average", key), reason, wanted)
    elif train.max_steps > 0 and train.save_strategy == "steps":
        yield from unsaved(stage, scheduled(stage, train.max_steps, train.max_steps, 1))


def unsaved(stage: Stage, saved: list[int]) -> Iterator[KeyProblem]:
    """What `average` asks for that isn't among the steps that are saved."""
    average = stage.average
    if average is not None and average.last and average.last > len(saved):
        reason = f"needs {average.last} checkpoints, and {len(saved)} are saved: lower save_steps"
        yield KeyProblem(("average", "last"), reason, average.last)
    for place, step in enumerate(average.steps() if average is not None else ()):
        if step not in saved:
            reason = f"no checkpoint is saved at step {step}: with these save_steps the first is at {saved[0]}"
            yield KeyProblem(("average", "checkpoints", place), f"{reason}, the last at {saved[-1]}", step)


def without_choice(stage: Stage, saved: list[int]) -> Iterator[KeyProblem]:
    """A `keep_best` that has one checkpoint to choose from. `saved`: the steps that are saved; empty: not known yet."""
    limit = stage.train.save_total_limit
    if stage.keep_best is None:
        return
    if limit == 1:
        reason = "has one checkpoint to choose from, which is what save_total_limit keeps: raise it"
        yield KeyProblem(("keep_best",), reason, stage.keep_best)
    elif len(saved) == 1:
        reason = f"has one checkpoint to choose from, that of step {saved[0]:,}: save more often"
        yield KeyProblem(("keep_best",), reason, stage.keep_best)


def without_end(stage: Stage, steps: int) -> Iterator[KeyProblem]:
    """What of `stop_when` is never looked at before the last of the stage's `steps`, which ends it anyway."""
    asked, every, train = stage.stop_when, stage.evaluate.every, stage.train
    if asked is None:
        return
    if asked.metric is not None and every is not None and every.steps is not None and every.steps >= steps:
        reason = f"goes by answers after each {every.steps:,} steps, and the stage has {steps:,}: lower evaluate.every"
        yield KeyProblem(("stop_when", "metric"), reason, asked.metric)
    lines = math.ceil(steps * train.logging_steps) if train.logging_steps < 1 else int(train.logging_steps)
    first = train.logging_first_step and steps > 1
    if asked.token_accuracy is not None and lines >= steps and not first:
        reason = f"goes by lines of the log, and none comes before the last of the stage's steps ({steps:,}): lower "
        yield KeyProblem(("stop_when", "token_accuracy"), f"{reason}logging_steps", asked.token_accuracy)


def scheduled(stage: Stage, end: int, max_steps: int, steps_of_an_epoch: int) -> list[int]:
    """The steps up to `end` whose checkpoints the recipe asks for; a signal may have had others saved.

    `max_steps`: those of the whole stage; the step that it ends at, be it before them, is `end` when that is asked for.
    """
    train = stage.train
    if train.save_strategy == "no":
        return []
    every = math.ceil(max_steps * train.save_steps) if train.save_steps < 1 else int(train.save_steps)
    every = steps_of_an_epoch if train.save_strategy == "epoch" else every
    return [*range(every, end, every), end]


def _ema_problems(stage: Stage) -> Iterator[KeyProblem]:
    ema, average = stage.train.ema, stage.average
    if average is not None and average.ema and ema is None:
        yield KeyProblem(("average", "ema"), "needs `train.ema`, which keeps that average", True)
    if ema is None:
        return
    if ema.start > 1 and ema.start % 1:
        reason = "is a whole number of steps, or, under 1, a fraction of all of them"
        yield KeyProblem(("train", "ema", "start"), reason, ema.start)
    elif stage.train.max_steps > 0:
        yield from unreached(stage, stage.train.max_steps)
    if stage.train.use_peft:
        reason = (
            "can't be of adapters: an average of their A and of their B isn't that of their products; train all "
            "weights, or leave it out"
        )
        yield KeyProblem(("train", "ema"), reason, None)
    if stage.keep_best or (average is not None and not average.ema):
        key = "keep_best" if stage.keep_best else "average"
        reason = f"has no effect where `{key}` says what is handed on: leave it out, or set `average: {{ema: true}}`"
        yield KeyProblem(("train", "ema"), reason, None)


def begins(ema: EmaSection, max_steps: int) -> int:
    """The step after which a moving average begins, in a stage of `max_steps`."""
    return math.ceil(max_steps * ema.start) if ema.start < 1 else int(ema.start)


def unreached(stage: Stage, max_steps: int) -> Iterator[KeyProblem]:
    """A moving average that would begin after the last step."""
    ema = stage.train.ema
    if ema is not None and begins(ema, max_steps) > max_steps:
        reason = f"is where the average begins, and the stage ends at step {max_steps}: lower it"
        yield KeyProblem(("train", "ema", "start"), reason, ema.start)


def _best_problems(stage: Stage) -> Iterator[KeyProblem]:
    if stage.keep_best is None:
        return
    names = [suite.name for suite in stage.evaluate.suites]
    suite, _, metric = stage.keep_best.partition(".")
    if suite not in names:
        reason = f"names no suite of this stage: {', '.join(names) or 'it has none'}"
        yield KeyProblem(("keep_best",), reason, stage.keep_best)
    elif metric not in ("", "pass_at_1"):
        yield KeyProblem(("keep_best",), f"chooses by pass_at_1, got {metric!r}: set {suite}", stage.keep_best)
    if stage.average is not None:
        yield KeyProblem(("keep_best",), "can't stand beside average: one of them says what is handed on", None)
    if stage.train.save_strategy == "no":
        yield KeyProblem(("keep_best",), "needs checkpoints, and save_strategy is `no`: set steps or epoch", None)
    elif suite in names:
        known = stage.train.max_steps > 0 and stage.train.save_strategy == "steps"
        end = stage.train.max_steps
        yield from without_choice(stage, scheduled(stage, end, end, 1) if known else [])


def _stop_problems(stage: Stage) -> Iterator[KeyProblem]:
    """A metric that no evaluation while training gives, and what is never looked at."""
    if stage.train.max_steps > 0:
        yield from without_end(stage, stage.train.max_steps)
    asked = stage.stop_when.metric if stage.stop_when is not None else None
    if asked is None:
        return
    names = [suite.name for suite in stage.evaluate.while_training()]
    suite, _, metric = asked.partition(".")
    if suite not in names:
        known = ", ".join(names) or "set `evaluate: {every: 200 steps, suites: [...]}`"
        yield KeyProblem(
            ("stop_when", "metric"), f"names no suite that is asked while the stage trains: {known}", asked
        )
    elif metric not in ("", "pass_at_1"):
        yield KeyProblem(("stop_when", "metric"), f"watches pass_at_1, got {metric!r}: set {suite}", asked)


def handed_on(stage: Mapping[str, Any]) -> str:
    """What a stage hands on, by `average` and `steps` of its manifest; empty where it is its last step's weights."""
    parents = stage.get("average") or []
    names = [parent["name"] for parent in parents]
    if names in ([], [f"checkpoint-{stage.get('steps')}"]):
        return ""
    if len(names) == 1:
        return "the moving average of its weights" if names == ["ema"] else names[0]
    told = {"trained": "its last step", "ema": "its moving average", "start": "its start"}
    parts = [f"{parent['weight']:.3g} of {told.get(name, name)}" for name, parent in zip(names, parents, strict=True)]
    return f"the sum of {' and '.join(parts)}"
