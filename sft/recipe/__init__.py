"""Recipes: one YAML file is one run. Imports nothing heavy."""

from sft.recipe.load import load_recipe, resolved_yaml
from sft.recipe.paths import RunPaths
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
from sft.utils.environment import environment

__all__ = [
    "DataSection",
    "EvaluateSection",
    "GenerateSource",
    "ModelSection",
    "PushSection",
    "Recipe",
    "ReportSection",
    "RunPaths",
    "Source",
    "Stage",
    "SuiteSection",
    "TrainSection",
    "environment",
    "load_recipe",
    "resolved_yaml",
]
