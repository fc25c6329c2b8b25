"""sambay-sft: staged supervised fine-tuning of hybrid SSM/attention reasoning models.

The library in a few names; the command `sft` is built on the same ones:

    import sft

    recipe = sft.load_recipe("my.yaml", ["--stages.distill.train.learning_rate", "2e-5"])
    rows = sft.prepare(recipe)["distill"].dataset       # what the stage will train on
    result = sft.run(recipe)                            # prepare, train and evaluate all stages; again: continue
    metrics = sft.evaluate(recipe, stage="distill")     # metrics by point and suite
    folder = sft.export(recipe)                         # the folder that goes to the Hub

`sft.models` holds the model and registers it with transformers' Auto classes. `sft.run` and `sft.evaluate` are packages
too: calling them is calling the functions of these names in `sft.run.library`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import sft.evaluate
import sft.run

if TYPE_CHECKING:
    from sft.recipe import load_recipe
    from sft.run.library import export, prepare

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "export", "load_recipe", "models", "prepare", "run"]

# Nothing heavy is imported before it is used: `sft --help` has to answer at once.
_HOMES = {"load_recipe": "sft.recipe", "prepare": "sft.run.library", "export": "sft.run.library"}


class _CallablePackage(ModuleType):
    """A package that shares its name with a function of the library."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(import_module("sft.run.library"), self.__name__.rpartition(".")[2])(*arguments, **options)


for _package in (sft.evaluate, sft.run):
    sys.modules[_package.__name__].__class__ = _CallablePackage


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "models":
        return import_module("sft.models")
    raise AttributeError(f"module 'sft' has no attribute {name!r}")
