"""What became of every row, step by step: `funnel.json`, a table on the terminal, and what other views are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sft.data.read.records import BAD

if TYPE_CHECKING:
    from rich.table import Table

FUNNEL_FILE = "funnel.json"
LAST = "rows to train on"
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


def funnel_lines(manifest: dict[str, Any]) -> list[FunnelLine]:
    """The funnel of a prepared stage: a line for each data step, and the last one, from rows to what is trained on."""
    entries = manifest.get("steps") or []
    return [*map(_line, entries), _last_line(manifest, entries)]


def _line(entry: dict[str, Any]) -> FunnelLine:
    return FunnelLine(
        title=entry["title"],
        step=entry["step"],
        rows_in=entry["taken"]["rows"],
        rows_out=entry["kept"]["rows"],
        tokens_in=tokens_of(entry["taken"]),
        tokens_out=tokens_of(entry["kept"]),
        reasons=_most_first(entry["reasons"]),
        examples=entry["examples"],
        seconds=entry["seconds"],
    )


def _last_line(manifest: dict[str, Any], entries: list[dict[str, Any]]) -> FunnelLine:
    before, funnel = totals(entries), manifest["funnel"]
    reasons = Counter(funnel["dropped"]) - Counter(before["dropped"])
    del reasons["bad"]
    reasons.update(
        {f"{BAD}{reason}": count for reason, count in (Counter(funnel["bad"]) - Counter(before["bad"])).items()}
    )
    given = [entry["kept"] for entry in last_entries(entries)]
    tokens = {name: sum(counts[name] for counts in given) for name in ("tokens", "unmeasured")}
    return FunnelLine(
        title=LAST,
        step="",
        rows_in=funnel["kept"] + reasons.total(),
        rows_out=funnel["kept"],
        tokens_in=tokens_of(tokens) if given else _UNKNOWN,
        tokens_out=f"{manifest['tokens']:,}",
        reasons=_most_first(reasons),
    )


def last_entries(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries whose rows no other step takes: what they keep together is what goes on."""
    taken = {key for entry in entries for key in entry["inputs"]}
    return [entry for entry in entries if entry["key"] not in taken]


def funnel_table(lines: Sequence[FunnelLine]) -> Table:
    """The funnel for the terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title="what became of the rows", title_justify="left")
    for heading in HEAD:
        table.add_column(heading, justify="left" if heading in ("step", "dropped") else "right")
    for line in lines:
        table.add_row(*line.cells)
    return table


def _most_first(reasons: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def tokens_of(counts: dict[str, Any]) -> str:
    """A count of tokens; a dash where no row has been measured yet, a sign where some haven't."""
    if counts["unmeasured"] and not counts["tokens"]:
        return _UNKNOWN
    return f"{counts['tokens']:,}" + ("+" if counts["unmeasured"] else "")
