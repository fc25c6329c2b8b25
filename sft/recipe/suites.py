"""Suites without a recipe: named on the command line, filled in from their files, and checked."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from sft.recipe.error_lines import explain
from sft.recipe.load import read_suite
from sft.recipe.merge import fill_suites, forget_suites, substitute
from sft.recipe.overrides import Override, apply_override, override_value, split_overrides
from sft.recipe.schema import EvaluateSection
from sft.recipe.yaml_marks import Document, Origin
from sft.utils.errors import UsageError

_INSIDE = "stages.0.evaluate"


def load_suites(names: Sequence[str], overrides: Sequence[str] = ()) -> EvaluateSection:
    """The suites of these names (packaged ones or files), with `overrides` such as `--suites.math500.max_length 4096`.

    Raises UsageError with a line per problem, at the suite's file and line.
    """
    origins = {("suites", place): Origin(f"--suite {name}", ()) for place, name in enumerate(names)}
    document = Document({"suites": list(names)}, {(): Origin("--suite", ()), **origins})
    fill_suites(document, ("suites",), read_suite)
    for key, text in split_overrides(overrides):
        apply_override(document, Override(key, override_value(key, text, inside=_INSIDE)))
    fill_suites(document, ("suites",), read_suite)
    substitute(document)
    forget_suites(document.value["suites"])
    document.value.pop("variables", None)
    try:
        return EvaluateSection.model_validate(document.value)
    except ValidationError as error:
        raise UsageError("\n".join(explain(error, document, EvaluateSection))) from None
