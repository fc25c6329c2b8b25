"""Which column of a source is what."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Mapping
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
    ("instruction", "response"),
)
# What may stand beside a conversation, and what sets call it. Looked for in every row: of a JSON Lines file the first
# rows needn't have it. `input`: what an instruction is about (Alpaca, Dolly); `history`: turns before it.
BESIDE = {
    "input": ("input", "context"),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
OF_PAIRS = ("input", "history")
ID_COLUMNS = ("id", "uuid", "unique_id", "problem_id")
LABELS = ("label", "kto_tag")
MEDIA = ("images", "image", "videos", "audios")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
UNREAD = (*MEDIA, "chosen", *REJECTED)
"""Columns that other trainers learn from, and this one can't."""
NAMED = ("messages", "prompt", "completion")


@dataclass(frozen=True)
class ColumnMap:
    """Which column of a source is what. Of what stands `BESIDE`, "" is a column that is left out.

    `label`: says of an answer whether it is a good one. `named`: the recipe says itself where the conversation is, so
    that no other column's meaning is guessed.
    """

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    input: str | None = None
    history: str | None = None
    system: str | None = None
    id: str | None = None
    answer: str | None = None
    domain: str | None = None
    reasoning: str | None = None
    tools: str | None = None
    chat_template_kwargs: str | None = None
    label: str | None = None
    named: bool = False

    def optional(self, role: str) -> str:
        """The column of what stands `BESIDE` the conversation, which a row may lack; "" where it is left out."""
        found: str | None = getattr(self, role)
        return BESIDE[role][0] if found is None else found

    def needed(self) -> set[str]:
        """Every column that a row may be made of."""
        return {*self.described().values(), *filter(None, map(self.optional, BESIDE))}

    def described(self) -> dict[str, str]:
        """The roles that have a column, for the manifest."""
        return {role: column for role, column in vars(self).items() if column and role != "named"}


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
    if left_out - set(BESIDE):
        raise UsageError(
            f"{name}: columns.{min(left_out - set(BESIDE))} is null, which only {', '.join(BESIDE)} can be."
        )
    if "id" in given and given["id"] not in columns:
        log.warning("%s: there is no column '%s' for ids; rows are named by their place", name, given.pop("id"))
    for role, column in given.items():
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"did you mean '{near[0]}'? It has" if near else "it has"
            raise UserError(
                f"{name}: columns.{role} names a column '{column}' that isn't there; {hint}: {_list(columns)}."
            )
    if "messages" in given and {"prompt", "completion", *OF_PAIRS} & set(given):
        raise UsageError(f"{name}: `columns` maps both messages and prompt/completion; a row can be only one of them.")
    named = bool(set(NAMED) & set(given))
    if not (named or problems):
        _refuse_unread(name, columns)
    chosen = _problem_column(name, columns, given) if problems else _conversation_columns(name, columns, given)
    for role in ("answer", "domain", "reasoning"):
        chosen[role] = given.get(role)
    if chosen["reasoning"] and not chosen.get("completion"):
        raise UsageError(f"{name}: `columns.reasoning` stands in front of a completion's column: name that too.")
    used = {*given.values(), *chosen.values()}
    for role in BESIDE:
        fits = role not in OF_PAIRS or (chosen.get("prompt") and (role != "input" or chosen["prompt"] == "instruction"))
        chosen[role] = given.get(role, "" if role in left_out or not fits else _beside(name, role, columns, used))
    if chosen["input"] is None:
        chosen["input"] = "input"
    chosen["id"] = given.get("id") or next((column for column in ID_COLUMNS if column in columns), None)
    label = None if named else next((column for column in LABELS if column in columns and column not in used), None)
    return ColumnMap(**chosen, label=label, named=named)


def _beside(name: str, role: str, columns: list[str], used: Collection[str | None]) -> str | None:
    """The column of what stands beside a conversation; None where the rows that were looked at have none."""
    found = [column for column in BESIDE[role] if column in columns and column not in used]
    if len(found) > 1:
        raise UserError(
            f"{name}: has the columns {' and '.join(found)}, which both may be the {role}: say in the source's "
            f"`columns` which one is, e.g. {{{role}: {found[0]}}}."
        )
    # A column of the usual name that is something else, as the recipe says, isn't looked at in later rows either.
    return found[0] if found else "" if BESIDE[role][0] in used else None


def _refuse_unread(name: str, columns: list[str]) -> None:
    """Raise UserError for rows that say more than is learned here, unless the recipe names what is."""
    if media := [column for column in MEDIA if column in columns]:
        raise UserError(
            f"{name}: has a column {media[0]}, and only text is trained here. To learn the text alone, name its "
            f"columns in the source's `columns`, e.g. {_named(columns) or '{messages: messages}'}."
        )
    if not {"chosen", *REJECTED} & set(columns):
        return
    asks = (*MESSAGE_COLUMNS, *(prompt for prompt, _ in PAIR_COLUMNS))
    prompt = next((column for column in asks if column in columns), None)
    if "chosen" in columns:
        use = f"{{prompt: {prompt}, completion: chosen}}" if prompt else "{messages: chosen}"
        whole = ", or {messages: chosen} where that holds the prompt too" if prompt else ""
    else:
        use, whole = _named(columns) or "{prompt: question, completion: answer}", ""
    raise UserError(
        f"{name}: holds preference data ({', '.join(c for c in columns if c in ('chosen', *REJECTED))}), and there is "
        f"no preference training here. To learn the better answers, say so in the source's `columns`: {use}{whole}."
    )


def _named(columns: list[str]) -> str:
    """What a recipe would say to have the columns read that are found by name; empty where none are."""
    try:
        found = _conversation_columns("", columns, {})
    except UserError:
        return ""
    return f"{{{', '.join(f'{role}: {column}' for role, column in found.items())}}}"


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
        f"{name}: {_told(columns)}Name the columns in the source's `columns`, e.g. {{prompt: question, completion: "
        "answer} or {messages: conversation}."
    )


def _told(columns: list[str]) -> str:
    """Why no conversation is found; of a known other kind of rows, what they are."""
    if "text" in columns:
        return (
            f"holds texts (it has {_list(columns)}), and what is trained here are answers to what "
            "somebody asks: give each row `messages`, or a prompt and a completion. "
        )
    if "input_ids" in columns:
        return (
            f"holds token ids (it has {_list(columns)}), and rows are tokenised here: give the texts that they were "
            "made from. "
        )
    return f"can't tell which columns to learn from; it has {_list(columns)}. "


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
