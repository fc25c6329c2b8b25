"""Held-out problems with gold answers, read from a suite's source, and the prompts that ask for them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sft.answers.choices import LETTERS, options_in
from sft.answers.extract import gold_answer
from sft.data.read.sources import open_source
from sft.data.text.thinking import MARKS, THINK_OPEN, Broken, Thought, canonical, find_thinking
from sft.recipe.schema import ChoicesSection, SuiteSection, Templates
from sft.tokenizers.control import ControlTokens
from sft.tokenizers.prompt import prompt_text, refuse_spelt
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
    """One problem: its text, the gold answer, what it is grouped by (None where the data doesn't say), and the choices
    that the suite has listed in it (letter -> text; None: it hasn't, but the text may)."""

    id: str
    text: str
    gold: str
    group: str | None
    steps: int | None
    options: Mapping[str, str] | None = None

    def choices(self) -> dict[str, str]:
        """The choices that the text lists; empty without."""
        return options_in(self.text) if self.options is None else dict(self.options)


def load_problems(suite: SuiteSection) -> list[Problem]:
    """As `load_suite`, without where they are from."""
    return load_suite(suite)[0]


def load_suite(suite: SuiteSection) -> tuple[list[Problem], dict[str, Any]]:
    """The suite's problems in the source's order, and of a data set of the Hub what it is (`OpenSource.origin`).

    Raises UserError for a source without problems, for one without a column that is needed, and for a row that can't
    be used: results on silently fewer problems would not be comparable.
    """
    opened = open_source(suite.source)
    problems: list[Problem] = []
    names = opened.columns()
    columns = find_columns(suite, sorted(names)) if names is not None else {}
    wrong = suite.choices.wrong if suite.choices is not None else []
    for row in opened.read({*columns.values(), *wrong} or None):
        if len(problems) == suite.max_problems:
            break
        if row.value is None:
            raise UserError(f"{row.source}:{row.line}: {row.bad.detail if row.bad else 'unreadable row'}")
        place, default_id = f"{row.source}:{row.line}", f"{Path(row.source).name}:{row.line}"
        problem = _problem(row.value, columns, place, default_id)
        if suite.choices is not None:
            problem = _with_choices(problem, str(row.value[columns["answer"]]), row.value, suite.choices, place)
        problems.append(problem)
    if not problems:
        raise UserError(f"Suite {suite.name}: {opened.name} has no rows; name a source with problems.")
    return problems, opened.origin


def find_columns(suite: SuiteSection, row: Collection[str]) -> dict[str, str]:
    """Which column is what, from the suite's `columns`, its source's, and the names columns usually have."""
    chosen: dict[str, str] = dict((suite.columns or {}).items())
    mapped: dict[str, str] = dict((suite.source.columns or {}).items())
    for role, theirs in (("problem", "prompt"), ("answer", "completion"), ("id", "id")):
        name = mapped.get(theirs)
        # A GSM8K-like completion ends in the answer; a column of answers is better where there is one.
        if name is not None and not (role == "answer" and "answer" in row):
            chosen.setdefault(role, name)
    wrong = [("choices.wrong", name) for name in (suite.choices.wrong if suite.choices else ())]
    for role, name in (*chosen.items(), *wrong):
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


def _with_choices(problem: Problem, right: str, row: Mapping[str, Any], section: ChoicesSection, place: str) -> Problem:
    """The problem with its choices below it: the wrong ones in their order, the right one among them at the place that
    the SHA-256 of seed and problem says, whatever else is asked."""
    wrong = [row.get(name) for name in section.wrong]
    for name, value in zip(section.wrong, wrong, strict=True):
        if not isinstance(value, str | int | float) or not str(value).strip():
            raise UserError(f"{place}: column {name!r} (choices.wrong) is empty or no text: {value!r:.80}")
    choices = [str(value).strip() for value in wrong]
    digest = hashlib.sha256(f"{section.seed}:{problem.text}".encode()).digest()
    place_of_right = int.from_bytes(digest[:8]) % (len(choices) + 1)
    choices.insert(place_of_right, right.strip())
    options = dict(zip(LETTERS, choices, strict=False))
    listed = "\n".join(f"{letter}) {choice}" for letter, choice in options.items())
    text = f"{problem.text.strip()}\n\n{listed}"
    return replace(problem, text=text, gold=LETTERS[place_of_right], options=options)


def render_prompt(tokenizer: Any, problem: Problem, suite: SuiteSection, defaults: Templates | None) -> str:
    """The text that asks the model: chat template around the prompt template, up to where the answer begins.

    Template and system prompt are the suite's, or else those that the stage's data was trained with; a suite whose
    system prompt is empty has none. Raises UserError for a problem that spells a control token out: it would forge a
    turn.
    """
    return prompt_text(tokenizer, _messages(problem, suite, defaults), _called(problem, suite))


def check_prompts(tokenizer: Any, problems: Sequence[Problem], suite: SuiteSection, defaults: Templates | None) -> None:
    """Raise UserError for a suite whose problems `render_prompt` would refuse; the chat template sees the first one
    alone."""
    control = ControlTokens(tokenizer)
    for problem in problems:
        refuse_spelt(control, _messages(problem, suite, defaults), _called(problem, suite))
    render_prompt(tokenizer, problems[0], suite, defaults)


def _called(problem: Problem, suite: SuiteSection) -> str:
    return f"Suite {suite.name}: problem {problem.id}"


def _messages(problem: Problem, suite: SuiteSection, defaults: Templates | None) -> list[dict[str, str]]:
    template = suite.prompt_template or (defaults.prompt_template if defaults else None) or "{prompt}"
    if "{prompt}" not in template:
        raise UserError(f"Suite {suite.name}: prompt_template has no {{prompt}}, so the problem would not be asked.")
    system = suite.system_prompt
    if system is None and defaults is not None:
        system = defaults.system_prompt
    messages = [{"role": "system", "content": system}] if system else []
    # Not str.format: templates speak of \boxed{}.
    messages.append({"role": "user", "content": template.replace("{prompt}", problem.text)})
    return messages


def after_thinking(prompt: str, completion: str) -> str:
    """A completion as the judge reads it: its thinking in the judge's marks, also where the prompt has opened it."""
    thought = _thinking(prompt, completion)
    if isinstance(thought, Thought):
        return canonical(thought)
    return THINK_OPEN if isinstance(thought, Broken) and not thought.closed else completion


def thinking_state(prompt: str, completion: str) -> Literal["closed", "open", "none"]:
    """Whether a completion thought and ended it, was still thinking at its end, or has no thinking."""
    thought = _thinking(prompt, completion)
    if thought is None:
        return "none"
    return "open" if isinstance(thought, Broken) and not thought.closed else "closed"


def _thinking(prompt: str, completion: str) -> Thought | Broken | None:
    opened = next((marks.open for marks in MARKS if prompt.rstrip().endswith(marks.open)), "")
    return find_thinking(opened + completion)
