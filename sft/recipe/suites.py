"""Suites that the command line names: filled in from their files and checked, beside a recipe or without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from sft.recipe.error_lines import explain
from sft.recipe.load import read_suite
from sft.recipe.merge import fill_suites, forget_suites, substitute
from sft.recipe.overrides import Override, apply_override, override_value, split_overrides
from sft.recipe.schema import EvaluateSection, SuiteSection
from sft.recipe.yaml_marks import Document, Origin
from sft.utils.errors import UsageError

_INSIDE = "stages.0.evaluate"
_OF_STAGES = ("before_first_stage", "every")
"""Keys of the section that say when a stage's suites are asked."""


def load_suites(names: Sequence[str], overrides: Sequence[str] = ()) -> EvaluateSection:
    """The suites of these names (packaged ones or files), with `overrides` such as `--suites.math500.max_length 4096`.

    Raises UsageError with a line per problem, at the suite's file and line, and for keys that need a stage.
    """
    document = Document({"suites": list(names)}, {(): Origin("--suite", ())})
    for place, name in enumerate(names):
        document.origins |= dict.fromkeys(
            (("suites", place), ("suites", place, "suite")), Origin(f"--suite {name}", ())
        )
    fill_suites(document, ("suites",), read_suite)
    for key, text in split_overrides(overrides):
        if key.partition(".")[0] in _OF_STAGES:
            raise UsageError(f"--{key} has no effect without a recipe, where no stage is trained: leave it out")
        apply_override(document, Override(key, override_value(key, text, inside=_INSIDE)))
    fill_suites(document, ("suites",), read_suite)
    substitute(document)
    forget_suites(document.value["suites"])
    document.value.pop("variables", None)
    try:
        return EvaluateSection.model_validate(document.value)
    except ValidationError as error:
        raise UsageError("\n".join(explain(error, document, EvaluateSection))) from None


@dataclass(frozen=True)
class Chosen:
    """What a command asks of a section's suites: which (its own by name, packaged ones, files; empty: its own), the
    first `limit` problems of each, `samples` answers to each problem."""

    suites: tuple[str, ...] = ()
    limit: int | None = None
    samples: int | None = None

    def __bool__(self) -> bool:
        return self != Chosen()

    @property
    def label(self) -> str:
        """What the folder of such answers is called behind its usual name: they don't replace those to all problems."""
        limit = f"-limit-{self.limit}" if self.limit is not None else ""
        return limit + (f"-samples-{self.samples}" if self.samples is not None else "")

    def of(self, section: EvaluateSection) -> EvaluateSection:
        """The section with these suites. Raises UsageError for one that isn't there, and for two of one name."""
        own = {suite.name: suite for suite in section.suites}
        found = [own[name] if name in own else load_suites([name]).suites[0] for name in self.suites]
        for name, suite in zip(self.suites, found, strict=True):
            if (suite.name in own and name not in own) or sum(suite.name == other.name for other in found) > 1:
                raise UsageError(f"--suite {name}: another suite is called {suite.name} already: give it another name")
        return section.model_copy(update={"suites": [self._cut(suite) for suite in found or section.suites]})

    def _cut(self, suite: SuiteSection) -> SuiteSection:
        limits = [limit for limit in (self.limit, suite.max_problems) if limit is not None]
        samples = self.samples or suite.samples_per_problem
        return suite.model_copy(update={"max_problems": min(limits, default=None), "samples_per_problem": samples})
