"""What became of every row, step by step: `funnel.json`, a table on the terminal, and figures."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sft.data.pipeline.reading import BAD

if TYPE_CHECKING:
    from rich.table import Table

FUNNEL_FILE = "funnel.json"


def totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole funnel in one line: rows read, rows made beside them, dropped by step and reason, bad by reason.

    rows + made = what went on from the last step + dropped + bad.
    """
    dropped: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    made = 0
    for entry in entries:
        made += entry["made"]["rows"] - entry["replaced"]["rows"]
        for reason, count in entry["reasons"].items():
            if entry["step"] == "read" and reason.startswith(BAD):
                bad[reason[len(BAD) :]] += count
            else:
                dropped[f"{entry['step']}: {reason}"] += count
    rows = sum(entry["taken"]["rows"] for entry in entries if entry["step"] == "read")
    return {"rows": rows, "made": made, "dropped": dict(sorted(dropped.items())), "bad": dict(sorted(bad.items()))}


def funnel_table(entries: list[dict[str, Any]]) -> Table:
    """The funnel for the terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title="what became of the rows", title_justify="left")
    for heading in ("step", "rows in", "rows out", "tokens in", "tokens out", "dropped", "seconds"):
        table.add_column(heading, justify="left" if heading in ("step", "dropped") else "right")
    for entry in entries:
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in _most_first(entry["reasons"]))
        table.add_row(
            entry["title"],
            f"{entry['taken']['rows']:,}",
            f"{entry['kept']['rows']:,}",
            tokens_of(entry["taken"]),
            tokens_of(entry["kept"]),
            dropped or "–",
            f"{entry['seconds']:.1f}",
        )
    return table


def _most_first(reasons: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def tokens_of(counts: dict[str, Any]) -> str:
    """A count of tokens; a dash where no row has been measured yet, a sign where some haven't."""
    if counts["unmeasured"] and not counts["tokens"]:
        return "–"
    return f"{counts['tokens']:,}" + ("+" if counts["unmeasured"] else "")
