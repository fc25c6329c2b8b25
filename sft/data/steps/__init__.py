"""The steps that a data recipe can name. Each is one file; its settings are a section in `sft.recipe.steps`."""

from __future__ import annotations

import importlib
from typing import cast

from sft.data.steps.base import RowStep, Step, TableStep

__all__ = ["FIT", "HOLD_OUT", "STEPS", "TOKENIZE", "RowStep", "Step", "TableStep", "step_class"]

TOKENIZE, FIT, HOLD_OUT = "tokenize", "fit", "hold_out"
"""The steps that no recipe names: the plan puts them where they are needed."""

# Name in a recipe -> the class that does it. Imported when a recipe uses it: some need libraries that others don't.
STEPS = {
    "tokenize": "sft.data.steps.tokenize:Tokenize",
    "fit": "sft.data.steps.fit:Fit",
    "hold_out": "sft.data.steps.hold_out:HoldOut",
    "render": "sft.data.steps.render:Render",
    "explode_rollouts": "sft.data.steps.rollouts:ExplodeRollouts",
    "filter": "sft.data.steps.filter:Filter",
    "length": "sft.data.steps.length:Length",
    "verify": "sft.data.steps.verify:Verify",
    "quality": "sft.data.steps.quality.step:Quality",
    "dedup": "sft.data.steps.dedup.step:Dedup",
    "decontaminate": "sft.data.steps.decontaminate.step:Decontaminate",
    "select": "sft.data.steps.select.step:Select",
    "mix": "sft.data.steps.mix:Mix",
    "join": "sft.data.steps.join.step:Join",
    "score": "sft.data.steps.score.step:Score",
    "top_logprobs": "sft.data.steps.top_logprobs.step:TopLogprobs",
    "generate": "sft.data.steps.generate.step:Generate",
}


def step_class(name: str) -> type[Step]:
    """The class of the step `name`."""
    module, _, attribute = STEPS[name].partition(":")
    return cast(type[Step], getattr(importlib.import_module(module), attribute))
