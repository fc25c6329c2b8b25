"""Whether a stage computes in bfloat16: what the recipe says, the launcher, what the run has begun with, the machine.

Weights, their gradients and the optimizer's state are in float32 either way, unless `weights_dtype` says otherwise:
bfloat16 is what autocast multiplies in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sft.train.checkpoints import MARKER, checkpoint_folders
from sft.train.engine import launched_precision
from sft.utils.files import read_sealed
from sft.utils.processor import bf16_unit

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Stage
    from sft.recipe.train_keys import TrainSection


class Precision(NamedTuple):
    """Whether bfloat16 is computed in, else float32; and why, which is empty where the recipe says so."""

    bf16: bool
    why: str = ""

    @property
    def dtype(self) -> str:
        """The type's name."""
        return "bfloat16" if self.bf16 else "float32"

    def __str__(self) -> str:
        return f"{self.dtype}{self.why}"


def precision_of(stage: Stage, paths: RunPaths, *, resume: bool = True) -> Precision:
    """What `stage` computes in. A run keeps what it began with, on whatever machine; `resume`: so does this stage."""
    said = _said(stage.train)
    if said is not None:
        return said
    kept = _kept(stage, paths, resume)
    if kept is None:
        return _machine(stage.train)
    return Precision(kept == "bfloat16", ", as this run began")


def expected_precision(train: TrainSection) -> Precision:
    """The same without a look at what the run has done."""
    return _said(train) or _machine(train)


def _said(train: TrainSection) -> Precision | None:
    launched = launched_precision()  # which refuses what isn't run here, whatever the recipe says
    if train.bf16 is not None:
        return Precision(train.bf16)
    if train.weights_dtype == "bfloat16":
        return Precision(True, ", as its weights are")
    return Precision(True, ", as accelerate's configuration says") if launched == "bf16" else None


def _machine(train: TrainSection) -> Precision:
    import torch

    return machine_precision(gpu=torch.cuda.is_available() and not train.use_cpu)


def machine_precision(*, gpu: bool) -> Precision:
    """What this machine, or its GPU, computes fastest in without harm to what is learned."""
    if gpu:
        return Precision(True, ", on a GPU")
    unit = bf16_unit()
    if unit is None:
        return Precision(False, ": this processor has no instructions for bfloat16's matrix products")
    return Precision(True, f": this processor multiplies its matrices in hardware ({unit})")


def _kept(stage: Stage, paths: RunPaths, resume: bool) -> str | None:
    """What the stage's newest checkpoint was computed in, else the last stage before it that didn't say it either."""
    if resume:
        for _, folder in reversed(checkpoint_folders(paths.stage_dir(stage.name))):
            if marker := read_sealed(folder / MARKER):
                return str(marker["identity"]["precision"])
    names = [other.name for other in paths.recipe.stages]
    for name in reversed(names[: names.index(stage.name)]):
        done: dict[str, Any] = read_sealed(paths.stage_manifest(name)) or {}
        if done and done["recipe"]["train"]["bf16"] is None:
            return str(done["precision"])
    return None
