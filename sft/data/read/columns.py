"""Which column of a source is what."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sft.utils.errors import UsageError, UserError

log = logging.getLogger(__name__)

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
# Tried in this order: of a set with `problem`, `solution` and a bare final `answer`, the worked solution is learned.
PAIR_COLUMNS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("problem", "generated_solution"),
    ("question", "solution"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("instruction", "output"),
)
# Alpaca's rows: what the instruction is about stands in a column of its own, which a row may lack.
INPUT_OF = {"instruction": "input"}
# Looked for in every row: of a JSON Lines file the first rows needn't have them.
OPTIONAL_COLUMNS = ("system", "tools", "chat_template_kwargs")
ID_COLUMNS = ("id", "uuid", "unique_id", "problem_id")


@dataclass(frozen=True)
class ColumnMap:
    """Which column of a source is what. Of `OPTIONAL_COLUMNS`, "" is one that the recipe leaves out."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    input: str | None = None
    system: str | None = None
    id: str | None = None
    answer: str | None = None
    domain: str | None = None
    reasoning: str | None = None
    tools: str | None = None
    chat_template_kwargs: str | None = None

    def optional(self, role: str) -> str:
        """The column of one of `OPTIONAL_COLUMNS`, which a row may lack; "" where it is left out."""
        found: str | None = getattr(self, role)
        return role if found is None else found

    def needed(self) -> set[str]:
        """Every column that a row may be made of."""
        return {*self.described().values(), *filter(None, map(self.optional, OPTIONAL_COLUMNS))}

    def described(self) -> dict[str, str]:
        """The roles that have a column, for the manifest."""
        return {role: column for role, column in vars(self).items() if column}


def choose_columns(
    name: str, present: Iterable[str], asked: Mapping[str, str | None] | None, *, problems: bool = False
) -> ColumnMap:
    """Decide which of the columns `present` in source `name` is what; `asked` is the recipe's own choice, in
    which null leaves an optional column out.

    With `problems` the rows are problems alone, and only the prompt's column is looked for.

    Raises UserError naming the columns there are when none is known or one that the recipe names isn't there. A missing
    `id` column alone is no error, since a recipe's data may be replaced by local files: rows are then named by place.
    """
    columns = sorted(set(present))
    given = {role: column for role, column in (asked or {}).items() if column is not None}
    left_out = set(asked or {}) - set(given)
    optional = ("input", *OPTIONAL_COLUMNS)
    if left_out - set(optional):
        listed = ", ".join(optional)
        raise UsageError(f"{name}: columns.{min(left_out - set(optional))} is null, which only {listed} can be.")
    if "id" in given and given["id"] not in columns:
        log.warning("%s: there is no column '%s' for ids; rows are named by their place", name, given.pop("id"))
    for role, column in given.items():
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"did you mean '{near[0]}'? It has" if near else "it has"
            raise UserError(
                f"{name}: columns.{role} names a column '{column}' that isn't there; {hint}: {_list(columns)}."
            )
    if "messages" in given and {"prompt", "input", "completion"} & set(given):
        raise UsageError(f"{name}: `columns` maps both messages and prompt/completion; a row can be only one of them.")
    chosen = _problem_column(name, columns, given) if problems else _conversation_columns(name, columns, given)
    for role in ("answer", "domain", "reasoning"):
        chosen[role] = given.get(role)
    chosen["input"] = None if "input" in left_out else given.get("input", INPUT_OF.get(chosen.get("prompt") or ""))
    if chosen["reasoning"] and not chosen.get("completion"):
        raise UsageError(f"{name}: `columns.reasoning` stands in front of a completion's column: name that too.")
    for role in OPTIONAL_COLUMNS:
        chosen[role] = "" if role in left_out else given.get(role, role if role in columns else None)
    chosen["id"] = given.get("id") or next((column for column in ID_COLUMNS if column in columns), None)
    return ColumnMap(**chosen)


def _conversation_columns(name: str, columns: list[str], given: dict[str, str]) -> dict[str, str | None]:
    if "messages" in given:
        return {"messages": given["messages"]}
    wanted_prompt, wanted_completion = given.get("prompt"), given.get("completion")
    if wanted_prompt and wanted_completion:
        return {"prompt": wanted_prompt, "completion": wanted_completion}
    if not (wanted_prompt or wanted_completion):
        for column in MESSAGE_COLUMNS:
            if column in columns:
                return {"messages": column}
    for prompt, completion in PAIR_COLUMNS:
        pair = {"prompt": wanted_prompt or prompt, "completion": wanted_completion or completion}
        if set(pair.values()) <= set(columns) and pair["prompt"] != pair["completion"]:
            return dict(pair)
    if named := {"prompt", "completion"} & set(given):
        (missing,) = {"prompt", "completion"} - named
        raise UserError(
            f"{name}: `columns` names no {missing} beside the {named.pop()}; which column is it? "
            f"It has {_list(columns)}."
        )
    raise UserError(
        f"{name}: can't tell which columns to learn from; it has {_list(columns)}. Name them in the source's "
        "`columns`, e.g. {prompt: question, completion: answer} or {messages: conversation}."
    )


def _problem_column(name: str, columns: list[str], given: dict[str, str]) -> dict[str, str | None]:
    if {"messages", "completion"} & set(given):
        raise UsageError(f"{name}: `rows: problems` takes the column of the prompt alone, not those of an answer.")
    known = (given.get("prompt"), *(prompt for prompt, _ in PAIR_COLUMNS))
    prompt = next((column for column in known if column in columns), None)
    if prompt is None:
        raise UserError(
            f"{name}: can't tell which column holds the problem; it has {_list(columns)}. Set columns.prompt."
        )
    return {"prompt": prompt}


def _list(columns: list[str]) -> str:
    shown = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    return shown or "no columns"
