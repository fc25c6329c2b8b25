"""What came of a preparation: the warnings it is worth, and when it is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sft.data.engine.bad import refuse_bad_rows, where_bad
from sft.utils.errors import UserError

log = logging.getLogger(__name__)


def check_outcome(manifest: dict[str, Any], passes: list[Path], max_bad_fraction: float) -> None:
    """Say what was dropped; raise UserError when too much was, or nothing is left."""
    funnel, files = manifest["funnel"], f"{passes[-1].parent}/*/aside-*.parquet"
    rows = funnel["rows"] + funnel["made"]
    where = where_bad(passes, sum(funnel["bad"].values()))
    refuse_bad_rows("the stage's data", funnel["bad"], rows, max_bad_fraction, where)
    if funnel["kept"] == 0:
        raise UserError(f"No row is left to train on ({_counts(funnel['dropped'])}){_length_hint(manifest)}.")
    dropped = dict(funnel["dropped"])
    bad, held = dropped.pop("bad", 0), funnel.get("held_out", 0)
    if held:
        log.info("%d of %d rows are held out", held, rows)
    if bad:
        log.warning("%d of %d rows are bad (%s): %s", bad, rows, _counts(funnel["bad"]), where)
    if dropped:
        told = (sum(dropped.values()), rows, _counts(dropped), files)
        log.warning("%d of %d rows dropped (%s): %s; `sft prepare --explain ROW` tells of one", *told)
    if funnel["truncated"]:
        log.warning("%d of %d rows cut at max_length, without an end token: %s", funnel["truncated"], rows, files)


def _length_hint(manifest: dict[str, Any]) -> str:
    """What to change where the rows' lengths are why none is left."""
    settings, last = manifest["recipe"], manifest["steps"][-1]
    if "over_length" not in last["reasons"]:
        return ": the chat template marks none of their tokens as trained" if last["taken"]["rows"] else ""
    change = "raise it" if settings["over_length"] == "truncate" else "raise it, or set data.over_length to truncate"
    longest = ", ".join(example["detail"] for example in last["examples"]["over_length"])
    return f": some have {longest}, and train.max_length is {settings['max_length']}; {change}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items())
