"""What a run's models answer in: what the recipe says, how they are stored, what the run began with, the machine.

An evaluation is of what is exported, whose weights are stored in `model.dtype`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft.train.precision import Precision, machine_precision
from sft.utils.files import read_sealed, write_sealed
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import EvaluateSection


def answering_precision(paths: RunPaths, section: EvaluateSection) -> Precision:
    """What models are held in, and compute in, when they answer the suites of `section`.

    A run keeps what its answers began with, on whatever machine.
    """
    if section.bf16 is not None:
        return Precision(section.bf16)
    if paths.recipe.model.dtype == "float32":
        return Precision(False, ", as model.dtype says")
    if (kept := read_sealed(paths.answering)) is not None:
        return Precision(kept["dtype"] == "bfloat16", ", as this run's answers began")
    return _of_the_machine(paths)


def begin_answering(paths: RunPaths, section: EvaluateSection, point: str | None = None) -> Precision:
    """The same, noted for the run where nobody has said it; by the main process. `point`: which tells it."""
    found = answering_precision(paths, section)
    if section.bf16 is None and paths.recipe.model.dtype != "float32" and read_sealed(paths.answering) is None:
        write_sealed(paths.answering, {"dtype": found.dtype})
    if point is not None and found.why:
        say(f"{point}: answers in {found}")
    return found


def _of_the_machine(paths: RunPaths) -> Precision:
    import torch

    from sft.train.handover import default_dtype

    found = machine_precision(gpu=torch.cuda.is_available())
    if not found.bf16 and default_dtype(paths) != "float32":
        return Precision(True, f", for float32 would take too much memory{found.why}")
    return found
