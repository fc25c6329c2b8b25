"""Recipes: one YAML file is one run. Imports nothing heavy."""

from sft.recipe.layout import RunLayout
from sft.recipe.load import load_recipe, resolved_yaml
from sft.recipe.manifest import environment
from sft.recipe.schema import (
    DataSection,
    EvaluateSection,
    GenerateSource,
    ModelSection,
    PushSection,
    Recipe,
    ReportSection,
    Source,
    Stage,
    SuiteSection,
)
from sft.recipe.train_keys import TrainSection

__all__ = [
    "DataSection",
    "EvaluateSection",
    "GenerateSource",
    "ModelSection",
    "PushSection",
    "Recipe",
    "ReportSection",
    "RunLayout",
    "Source",
    "Stage",
    "SuiteSection",
    "TrainSection",
    "environment",
    "load_recipe",
    "resolved_yaml",
]
