"""What became of every row, step by step: `funnel.json`, a table on the terminal, and what other views are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sft.data.engine.bad import bad_rows
from sft.data.engine.builder import Built
from sft.data.engine.plan import READ, Node
from sft.data.engine.shards import merged
from sft.data.steps import FIT, HOLD_OUT, TOKENIZE
from sft.data.steps.hold_out import HELD_OUT
from sft.utils.tables import numbers_table

if TYPE_CHECKING:
    from rich.table import Table

FUNNEL_FILE = "funnel.json"
LAST = "rows to train on"
HELD = "rows held out"
HEAD = ("step", "rows in", "rows out", "tokens in", "tokens out", "dropped", "seconds")
_UNKNOWN = "–"


@dataclass(frozen=True)
class FunnelLine:
    """One step of a funnel.

    Attributes:
        title, step: as in the funnel's entry; the last line, from rows to what is trained on, has the step "".
        rows_in, rows_out: rows that came and that went on; more go on where a step makes rows.
        tokens_in, tokens_out: for reading.
        reasons: why rows ended here and how many, the most frequent first.
        examples: of each reason some rows: id, detail, text.
        seconds: what the step took; None where it wasn't measured.
    """

    title: str
    step: str
    rows_in: int
    rows_out: int
    tokens_in: str
    tokens_out: str
    reasons: list[tuple[str, int]]
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def dropped(self) -> int:
        """Rows that ended here."""
        return sum(count for _, count in self.reasons)

    @property
    def cells(self) -> list[str]:
        """The line as the text under `HEAD`."""
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons) or _UNKNOWN
        rows = [f"{self.rows_in:,}", f"{self.rows_out:,}"]
        seconds = _UNKNOWN if self.seconds is None else f"{self.seconds:.1f}"
        return [self.title, *rows, self.tokens_in, self.tokens_out, dropped, seconds]


def funnel_entries(passes: Sequence[Built]) -> list[dict[str, Any]]:
    """A line's numbers for each step, in the order in which rows come to them: over all sources that share the step."""
    nodes: dict[str, list[Node]] = {}
    accounts: dict[str, list[dict[str, Any]]] = {}
    shards: Counter[str] = Counter()
    for built in passes:
        for node, account in zip(built.made.nodes, built.accounts, strict=True):
            nodes.setdefault(node.line, []).append(node)
            accounts.setdefault(node.line, []).append(account)
            shards[node.line] += len(built.shards)
    entries: dict[str, dict[str, Any]] = {}
    while waiting := [line for line in nodes if line not in entries]:
        for line in waiting:
            inputs = list(dict.fromkeys(before.line for node in nodes[line] for before in node.inputs))
            if all(before in entries for before in inputs):
                first = nodes[line][0]
                usage = [{"usage": account["usage"]} for account in accounts[line] if "usage" in account]
                entries[line] = {
                    **{"title": first.title, "step": first.step, "key": line, "inputs": inputs},
                    **merged(accounts[line]),
                    "shards": shards[line],
                    **(usage[0] if usage else {}),
                }
    return list(entries.values())


def totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole funnel in one line: rows read, made beside them, kept, dropped by step and reason, bad by reason.

    rows + made = kept + held_out (where some are) + dropped, which counts the bad ones too. `truncated`: kept, but cut.
    """
    dropped: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    for entry in entries:
        unusable = bad_rows(entry["step"], entry["reasons"])
        bad.update(unusable)
        if entry["step"] not in (READ, TOKENIZE):
            prefix = "" if entry["step"] == FIT else f"{entry['step']}: "
            dropped.update({f"{prefix}{reason}": count for reason, count in _reasons(entry).items()})
    if bad:
        dropped["bad"] = bad.total()
    ends = [entry for entry in entries if entry["step"] == FIT]
    held = sum(map(_held_out, entries))
    funnel = {
        "rows": sum(entry["taken"]["rows"] for entry in entries if entry["step"] == READ),
        "made": sum(entry["made"]["rows"] - entry["replaced"]["rows"] for entry in entries),
        "kept": sum(entry["kept"]["rows"] for entry in ends),
        **({"held_out": held} if any(entry["step"] == HOLD_OUT for entry in entries) else {}),
        "dropped": dict(sorted(dropped.items())),
        "bad": dict(sorted(bad.items())),
        "truncated": sum(entry["cut"] for entry in ends),
    }
    if funnel["rows"] + funnel["made"] != funnel["kept"] + held + dropped.total():
        raise AssertionError(f"one row was lost: {funnel}")
    return funnel


def funnel_lines(manifest: dict[str, Any]) -> list[FunnelLine]:
    """The funnel of a prepared stage: a line for each step, one for rows that are held out, the last from rows to what
    is trained on."""
    lines = []
    for entry in manifest["steps"]:
        lines.append(_line(entry))
        if held := _held_out(entry):
            lines.append(FunnelLine(HELD, entry["step"], held, held, _UNKNOWN, _UNKNOWN, []))
    return lines


def _held_out(entry: dict[str, Any]) -> int:
    """Rows that a step has set aside to be measured on: they aren't dropped."""
    held: int = entry["reasons"].get(HELD_OUT, 0) if entry["step"] == HOLD_OUT else 0
    return held


def _reasons(entry: dict[str, Any]) -> dict[str, int]:
    """Why rows were dropped at a step."""
    return {reason: n for reason, n in entry["reasons"].items() if reason != HELD_OUT or entry["step"] != HOLD_OUT}


def _line(entry: dict[str, Any]) -> FunnelLine:
    last = entry["step"] == FIT
    return FunnelLine(
        title=LAST if last else entry["title"],
        step="" if last else entry["step"],
        rows_in=entry["taken"]["rows"],
        rows_out=entry["kept"]["rows"],
        tokens_in=tokens_of(entry["taken"]),
        tokens_out=tokens_of(entry["kept"]),
        reasons=_most_first(_reasons(entry)),
        examples=entry["examples"],
        seconds=entry["seconds"],
    )


def has_steps(manifest: dict[str, Any]) -> bool:
    """Whether a recipe's steps had a say in the rows."""
    return any(entry["step"] not in (READ, TOKENIZE, FIT) for entry in manifest.get("steps", ()))


def funnel_table(lines: Sequence[FunnelLine], width: int | None = None) -> Table:
    """The funnel for a terminal `width` characters wide; where that is little, what each step took goes first."""
    rows = [line.cells for line in lines]
    # Names of steps and reasons are kept whole.
    words = (
        max((len(word) for cells in rows for word in cells[HEAD.index(name)].split()), default=0)
        for name in ("step", "dropped")
    )
    text = {name: max(12, longest) for name, longest in zip(("step", "dropped"), words, strict=True)}
    optional, title = ("tokens in", "seconds", "tokens out", "rows in"), "what became of the rows"
    return numbers_table(HEAD, rows, text=text, optional=optional, title=title, width=width)


def _most_first(reasons: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def tokens_of(counts: dict[str, Any]) -> str:
    """A count of tokens; a dash where no row has been measured yet, a sign where some haven't."""
    if counts["unmeasured"] and not counts["tokens"]:
        return _UNKNOWN
    return f"{counts['tokens']:,}" + ("+" if counts["unmeasured"] else "")
