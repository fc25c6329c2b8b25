"""Held-out problems with gold answers, read from a suite's source, and the prompts that ask for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.answers.extract import gold_answer
from sft.data.read.sources import open_source
from sft.recipe.schema import SuiteSection, Templates
from sft.tokenizers.prompt import prompt_text
from sft.utils.errors import UserError

# Columns by the names they have in common data sets, the most specific first.
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "final_answer", "gold", "ground_truth", "solution", "completion"),
    "group": ("family", "group", "subject"),
    "steps": ("steps",),
    "id": ("id", "unique_id", "problem_id"),
}
_REQUIRED = ("problem", "answer")


@dataclass(frozen=True)
class Problem:
    """One problem: its text, the gold answer, and what it is grouped by (None where the data doesn't say)."""

    id: str
    text: str
    gold: str
    group: str | None
    steps: int | None


def load_problems(suite: SuiteSection) -> list[Problem]:
    """The suite's problems in the source's order.

    Raises UserError for a source without problems, for one without a column that is needed, and for a row that can't
    be used: results on silently fewer problems would not be comparable.
    """
    opened = open_source(suite.source)
    problems: list[Problem] = []
    names = opened.columns()
    columns = find_columns(suite, sorted(names)) if names is not None else {}
    for row in opened.read(set(columns.values()) or None):
        if len(problems) == suite.max_problems:
            break
        if row.value is None:
            raise UserError(f"{row.source}:{row.line}: {row.bad.detail if row.bad else 'unreadable row'}")
        problems.append(_problem(row.value, columns, f"{row.source}:{row.line}", f"{Path(row.source).name}:{row.line}"))
    if not problems:
        raise UserError(f"Suite {suite.name}: {opened.name} has no rows; name a source with problems.")
    return problems


def find_columns(suite: SuiteSection, row: Collection[str]) -> dict[str, str]:
    """Which column is what, from the suite's `columns`, its source's, and the names columns usually have."""
    chosen: dict[str, str] = dict((suite.columns or {}).items())
    mapped: dict[str, str] = dict((suite.source.columns or {}).items())
    for role, theirs in (("problem", "prompt"), ("answer", "completion"), ("id", "id")):
        name = mapped.get(theirs)
        # A GSM8K-like completion ends in the answer; a column of answers is better where there is one.
        if name is not None and not (role == "answer" and "answer" in row):
            chosen.setdefault(role, name)
    for role, name in chosen.items():
        if name not in row:
            raise UserError(
                f"Suite {suite.name}: there is no column {name!r} (for {role}); the columns are {', '.join(row)}."
            )
    for role, names in COLUMN_NAMES.items():
        found = next((name for name in names if name in row and name not in chosen.values()), None)
        if found is not None:
            chosen.setdefault(role, found)
    missing = [role for role in _REQUIRED if role not in chosen]
    if missing:
        raise UserError(
            f"Suite {suite.name}: no column is the {missing[0]}; set `columns: {{{missing[0]}: ...}}` of the suite to "
            f"one of {', '.join(row)}."
        )
    return chosen


def _problem(row: Mapping[str, Any], columns: Mapping[str, str], place: str, default_id: str) -> Problem:
    values = {role: row.get(name) for role, name in columns.items()}
    for role in _REQUIRED:
        value = values[role]
        # Answers may be numbers; nothing else may.
        usable = isinstance(value, str) or (role == "answer" and isinstance(value, int | float))
        if not usable or not str(value).strip():
            raise UserError(f"{place}: column {columns[role]!r} ({role}) is empty or no text: {value!r:.80}")
    steps = values.get("steps")
    if steps is not None and not (isinstance(steps, int | float) and int(steps) == steps):
        raise UserError(f"{place}: column {columns['steps']!r} (steps) is not a whole number: {steps!r:.80}")
    return Problem(
        id=str(values["id"]) if values.get("id") is not None else default_id,
        text=str(values["problem"]),
        gold=gold_answer(values["answer"]),
        group=str(values["group"]) if values.get("group") is not None else None,
        steps=int(steps) if steps is not None else None,
    )


def render_prompt(tokenizer: Any, problem: Problem, suite: SuiteSection, defaults: Templates | None) -> str:
    """The text that asks the model: chat template around the prompt template, up to where the answer begins.

    Template and system prompt are the suite's, or else those that the stage's data was trained with. Raises UserError
    for a problem that spells a control token out: it would forge a turn.
    """
    template = suite.prompt_template or (defaults.prompt_template if defaults else None) or "{prompt}"
    if "{prompt}" not in template:
        raise UserError(f"Suite {suite.name}: prompt_template has no {{prompt}}, so the problem would not be asked.")
    system = suite.system_prompt or (defaults.system_prompt if defaults else None)
    messages = [{"role": "system", "content": system}] if system else []
    # Not str.format: templates speak of \boxed{}.
    messages.append({"role": "user", "content": template.replace("{prompt}", problem.text)})
    return prompt_text(tokenizer, messages, f"Suite {suite.name}: problem {problem.id}")
