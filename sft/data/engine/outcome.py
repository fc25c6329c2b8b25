"""What came of a preparation: its manifest, the warnings it is worth, and when it is refused."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import sft
from sft.data.engine.accounts import FUNNEL_FILE, totals
from sft.data.engine.job import Job, Tally
from sft.data.engine.side_files import DROPPED_FILE, QUARANTINE_FILE, TRUNCATED_FILE, SideFiles
from sft.utils.errors import UserError

log = logging.getLogger(__name__)


def make_manifest(job: Job, tally: Tally, side: SideFiles, shards: list[dict[str, Any]], packs: int) -> dict[str, Any]:
    inputs = [{**identity, **counted} for identity, counted in zip(job.identity["inputs"], tally.sources, strict=True)]
    funnel = _funnel(job, tally, side)
    stepped = {"inputs": job.stepped.leaves, "steps": job.stepped.entries} if job.stepped else {"inputs": inputs}
    return {
        "key": job.key,
        **{name: job.identity[name] for name in ("format", "recipe", "tokenizer")},
        **stepped,
        "sambay_sft": sft.__version__,
        "funnel": funnel,
        "rows": funnel["rows"],
        "documents": len(tally.lengths),
        "packs": packs,
        "tokens": sum(tally.lengths),
        "supervised_tokens": tally.supervised,
        "max_document_length": max(tally.lengths, default=0),
        "length_seen": {"shortest": tally.shortest or 0, "longest": tally.longest},
        "shards": shards,
    }


def _funnel(job: Job, tally: Tally, side: SideFiles) -> dict[str, Any]:
    """rows + made = kept + dropped, where `dropped` counts the bad ones too and `made` is what steps made of others."""
    plain: dict[str, Any] = {"rows": tally.rows, "made": 0, "dropped": {}, "bad": {}}
    before = totals(job.stepped.entries) if job.stepped else plain
    bad: Counter[str] = Counter(before["bad"]) + side.bad
    dropped: Counter[str] = Counter(before["dropped"]) + side.dropped
    if bad:
        dropped["bad"] = bad.total()
    kept = len(tally.lengths)
    if before["rows"] + before["made"] != kept + dropped.total():
        raise AssertionError(f"{before['rows']} rows read, {kept} kept and {dropped.total()} dropped: one was lost")
    return {
        "rows": before["rows"],
        **({"made": before["made"]} if job.stepped else {}),
        "kept": kept,
        "dropped": dict(sorted(dropped.items())),
        "bad": dict(sorted(bad.items())),
        "truncated": side.truncated,
    }


def check_outcome(manifest: dict[str, Any], path: Path, job: Job) -> None:
    """Say what was dropped; raise UserError when too much was, or nothing is left."""
    for source in manifest["inputs"]:
        if source["rows"] == 0:
            raise UserError(f"{source['source']}: the data is empty, there is no row in it.")
    funnel = manifest["funnel"]
    bad, limit = funnel["dropped"].get("bad", 0), job.data.max_bad_fraction
    # Bad rows of a source that goes through steps were judged as it was read.
    if "steps" not in manifest and bad > limit * funnel["rows"]:
        raise UserError(
            f"{bad} of {funnel['rows']} rows are bad ({_counts(funnel['bad'])}), more than data.max_bad_fraction "
            f"{limit:g} allows; see them in {path / QUARANTINE_FILE}, then mend the data or raise the limit."
        )
    if funnel["kept"] == 0:
        raise UserError(f"No row is left to train on ({_counts(funnel['dropped'])}){_length_hint(manifest)}.")
    stepped = "steps" in manifest
    _tell(funnel, path, stepped)


def _tell(funnel: dict[str, Any], path: Path, stepped: bool) -> None:
    rows, dropped = funnel["rows"] + funnel.get("made", 0), dict(funnel["dropped"])
    bad = dropped.pop("bad", 0)
    if bad:
        where = path / (FUNNEL_FILE if stepped else QUARANTINE_FILE)
        log.warning("%d of %d rows are bad (%s): %s", bad, rows, _counts(funnel["bad"]), where)
    if dropped:
        where = path / (FUNNEL_FILE if stepped else DROPPED_FILE)
        log.warning("%d of %d rows dropped (%s): %s", sum(dropped.values()), rows, _counts(dropped), where)
    if funnel["truncated"]:
        where = path / TRUNCATED_FILE
        log.warning("%d of %d rows cut at max_length, without an end token: %s", funnel["truncated"], rows, where)


def _length_hint(manifest: dict[str, Any]) -> str:
    seen, settings = manifest["length_seen"], manifest["recipe"]
    if seen["longest"] == 0:
        return "" if "steps" in manifest else ": every row is bad"
    if settings["max_length"] is None or seen["longest"] <= settings["max_length"]:
        return ": the chat template marks none of their tokens as trained"
    change = "raise it" if settings["over_length"] == "truncate" else "raise it, or set data.over_length to truncate"
    return (
        f": the rows have {seen['shortest']} to {seen['longest']} tokens and train.max_length is "
        f"{settings['max_length']}; {change}"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items())
