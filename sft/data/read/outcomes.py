"""What may become of a row: it goes on, it ends here, or it becomes other rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from sft.data.read.record import Record


@dataclass(frozen=True, slots=True)
class Kept:
    """The row goes on (changed or not). `cut`: what it was, where it doesn't go on whole."""

    record: Record
    cut: str | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """The row ends here. `reason` is one of a few words, which are counted; `detail` says what exactly was seen."""

    record: Record
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Replaced:
    """The row `record` became other rows (its rollouts, its copies), of which some may be dropped at once."""

    record: Record
    kept: list[Record] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)


Outcome = Kept | Dropped | Replaced
