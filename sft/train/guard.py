"""Steps that would do harm are left out, on all processes together; too many, and the stage returns to a checkpoint.

A step does harm when its loss or its gradient norm isn't finite, or spikes: it lies far above those of the steps
before, by the median and the median absolute deviation of their logarithms (the robust z-score of Iglewicz and Hoaglin,
1993; PaLM, arXiv 2204.02311 section 5.1, on spikes and on skipping their data). In logarithms, because gradient norms
are spread over orders of magnitude, and a loss falls by them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.train.agree import on_processes
from sft.utils.files import write_text
from sft.utils.tables import counted

if TYPE_CHECKING:
    from sft.recipe.guard_keys import GuardSection

FILE = "skipped_rows.jsonl"
"""In a stage's folder: a line for each step that was left out, with its rows."""

NAMES = ("loss", "gradient norm")

NORMAL = 1.4826
"""Median absolute deviations in a standard deviation of a normal distribution."""
LEAST_DEVIATION = 0.25
"""Of a logarithm: of numbers that hardly differ none spikes that isn't e^(0.25 spike) times the others, 7 times by
default; a source whose rows are harder isn't taken for a fault."""
LEAST_LOSS = 0.05
"""Nats. Below it a model knows its rows by heart, and its loss goes up and down by orders of magnitude."""


class Guard:
    """What becomes of each step. All processes see the same numbers, and come to the same.

    `clip`: the norm that gradients are clipped to (0: they aren't); one that isn't clipped is no spike. `folder`: the
    stage's; `kept`: what `state` gave for the checkpoint that training goes on from.
    """

    def __init__(
        self, settings: GuardSection, folder: Path, *, clip: float, kept: Mapping[str, Any] | None = None
    ) -> None:
        before = dict(kept or {})
        self._settings, self._path, self._clip = settings, folder / FILE, clip
        self._seen: list[list[float]] = [list(values) for values in before.get("seen", ([], []))]
        self.skipped: list[dict[str, Any]] = list(before.get("skipped", ()))
        self.rolled_back: list[dict[str, int]] = list(before.get("rolled_back", ()))
        self.why = ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"seen": self._seen, "skipped": self.skipped, "rolled_back": self.rolled_back}

    def judge(self, loss: float, norm: float) -> bool:
        """Whether the step of this `loss` (this process's share of it) and gradient `norm` is to be left out; `why`
        then says why. All processes must call this, before the step is taken."""
        shares = on_processes([loss, norm])
        of_all = [share[0] for share in shares]
        loss = math.fsum(of_all) / len(shares) if all(map(math.isfinite, of_all)) else math.nan
        norm = max((share[1] for share in shares), key=lambda value: (not math.isfinite(value) or value < 0, value))
        found = (loss, norm if norm >= 0 else math.inf)  # DeepSpeed says -1 for one that isn't finite
        self.why = self._fault(found)
        for values, value in zip(self._seen, found, strict=True):
            if math.isfinite(value):
                values.append(value)
                del values[: -self._settings.window]
        return bool(self.why)

    def _fault(self, found: Sequence[float]) -> str:
        for name, value in zip(NAMES, found, strict=True):
            if not math.isfinite(value):
                return f"its {name} is not a finite number"
        least = (LEAST_LOSS, max(self._clip, 1e-8))
        for name, value, values, floor in zip(NAMES, found, self._seen, least, strict=True):
            if value <= floor or self._settings.spike is None or 2 * len(values) < self._settings.window:
                continue
            score = robust_score(value, values, floor if name == NAMES[0] else 1e-8)
            if score > self._settings.spike:
                middle = statistics.median(values)
                return f"its {name}, {value:.4g}, spikes: {score:.1f} robust deviations above {middle:.4g}, the median"
        return ""

    def note(self, step: int, rows: Sequence[int], documents: Sequence[Sequence[str]], *, write: bool) -> None:
        """Keep that `step` was left out, with the numbers of its rows and the names of their documents."""
        line = {"step": step, "why": self.why, "rows": list(rows), "documents": [list(names) for names in documents]}
        self.skipped.append(line)
        if write:
            self.write()

    def write(self) -> None:
        """The file with the steps that were left out, as far as training has come."""
        if self.skipped or self._path.exists():
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in self.skipped))

    def recent(self, step: int) -> list[int]:
        """The steps that were left out, of the window that ends with `step` and begins after the last return."""
        since = max([step - self._settings.window, *(one["step"] for one in self.rolled_back)])
        return [line["step"] for line in self.skipped if since < line["step"] <= step]

    def is_too_much(self, step: int) -> bool:
        """Whether more steps were left out than may be."""
        return len(self.recent(step)) > self._settings.max_skipped

    def may_return(self) -> bool:
        """Whether the stage may go back to a checkpoint once more."""
        return len(self.rolled_back) < self._settings.rollbacks

    def told(self, step: int) -> str:
        """Why the stage ends at `step`, as the beginning of a sentence."""
        recent = self.recent(step)
        times = counted(len(self.rolled_back), "return")
        back = f", after {times} to a checkpoint" if self.rolled_back else ""
        return (
            f"{len(recent)} of the last {self._settings.window} steps would have done harm{back} (at step {recent[-1]} "
            f"{self.why}; the rows of all of them are in {self._path})"
        )


def robust_score(value: float, values: Sequence[float], floor: float) -> float:
    """By how many deviations the logarithm of `value` is above the median of those of `values`, all taken for no less
    than `floor`; the deviation is the median absolute one, and no less than LEAST_DEVIATION."""
    logs = [math.log(max(one, floor)) for one in values]
    middle = statistics.median(logs)
    deviation = NORMAL * statistics.median(abs(one - middle) for one in logs)
    return (math.log(max(value, floor)) - middle) / max(deviation, LEAST_DEVIATION)


def gate_deepspeed(engine: Any, harmful: Callable[[float], bool]) -> None:
    """Let a DeepSpeed engine ask `harmful` with each step's gradient norm, before the step is taken.

    A step that is left out leaves weights, masters and moments as they are, as one whose gradients overflow does.
    """
    optimizer = engine.optimizer
    for name in ("scaled_global_norm", "_get_norm_groups"):  # of ZeRO-1 and ZeRO-2, and of ZeRO-3
        if hasattr(optimizer, name):
            setattr(optimizer, name, _gated(getattr(optimizer, name), harmful))
            return
    engine._take_model_step = _gated_step(engine, harmful)


def _gated(norms: Callable[..., Any], harmful: Callable[[float], bool]) -> Callable[..., Any]:
    from deepspeed.runtime.utils import combine_grad_norm_groups

    def function(*args: Any, **kwargs: Any) -> Any:
        found = norms(*args, **kwargs)
        of_groups = isinstance(found, list)
        norm = combine_grad_norm_groups(found) if of_groups else found
        if not harmful(float(norm)):
            return found
        none = norm.new_full((), math.inf)
        return [none] if of_groups else none

    return function


def _gated_step(engine: Any, harmful: Callable[[float], bool]) -> Callable[..., None]:
    """DeepSpeed without ZeRO, whose optimizer knows no step that is left out."""
    from torch.nn.utils import get_total_norm

    original = engine._take_model_step

    def function(*args: Any, **kwargs: Any) -> None:
        norm = get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        if harmful(float(norm)):
            engine.zero_grad()
            engine.global_steps += 1
        else:
            original(*args, **kwargs)

    return function
