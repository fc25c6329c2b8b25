"""Numbers that describe a prepared stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft.data.prepare import PreparedStage

PERCENTILES = (0, 25, 50, 75, 90, 99, 100)


@dataclass(frozen=True)
class Statistics:
    """Counts of a prepared stage. Lengths are in tokens, of documents; `fill` is tokens over room, for packed rows."""

    rows_read: int
    documents: int
    packs: int
    tokens: int
    supervised_tokens: int
    fill: float | None
    documents_per_pack: float
    percentiles: dict[int, int]
    truncated: int
    held_out: tuple[int, int] | None
    """Documents that are held out, and their trained tokens."""


def document_lengths(prepared: PreparedStage) -> NDArray[np.int64]:
    """The length of every document (n,), in the order of the rows."""
    column = prepared.dataset.data.column("seq_lengths")
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def histogram(lengths: NDArray[np.int64], bins: int) -> list[tuple[int, int, int]]:
    """(from, to, count) of at most `bins` + 1 ranges `from <= length < to` of round, equal width, up to the longest."""
    if not len(lengths):
        return []
    longest = int(lengths.max()) + 1
    power = 10 ** max(math.floor(math.log10(longest / bins)), 0)
    width = next(step * power for step in (1, 2, 5, 10) if step * power * bins >= longest)
    counts = np.bincount(lengths // width)
    return [(number * width, (number + 1) * width, int(count)) for number, count in enumerate(counts)]


def statistics(prepared: PreparedStage) -> Statistics:
    """Count what the store holds."""
    manifest, held = prepared.manifest, prepared.validation
    lengths = document_lengths(prepared)
    room = manifest["packs"] * (manifest["recipe"]["max_length"] or 0)
    return Statistics(
        rows_read=manifest["rows"],
        documents=manifest["documents"],
        packs=manifest["packs"],
        tokens=manifest["tokens"],
        supervised_tokens=manifest["supervised_tokens"],
        fill=manifest["tokens"] / room if manifest["recipe"]["packing"] and room else None,
        documents_per_pack=manifest["documents"] / max(manifest["packs"], 1),
        percentiles={p: int(np.percentile(lengths, p, method="nearest")) for p in PERCENTILES} if len(lengths) else {},
        truncated=manifest["funnel"]["truncated"],
        held_out=(held.manifest["documents"], held.manifest["supervised_tokens"]) if held else None,
    )


def labelled(counts: Statistics) -> list[tuple[str, str]]:
    """The statistics as (label, text) lines, for tables."""
    share = 100 * counts.supervised_tokens / max(counts.tokens, 1)
    lines = [
        ("rows read", f"{counts.rows_read:,}"),
        ("documents kept", f"{counts.documents:,}"),
        ("truncated", f"{counts.truncated:,}"),
        ("rows to train on", f"{counts.packs:,} ({counts.documents_per_pack:.1f} documents each)"),
        ("tokens", f"{counts.tokens:,}"),
        ("trained tokens", f"{counts.supervised_tokens:,} ({share:.1f}%)"),
    ]
    if counts.held_out is not None:
        lines.append(("held out", "{:,} documents, whose loss is of {:,} tokens".format(*counts.held_out)))
    if counts.fill is not None:
        lines.append(("fill of packed rows", f"{100 * counts.fill:.1f}%"))
    names = {0: "shortest", 50: "median", 100: "longest"}
    lengths = ", ".join(f"{names.get(p, f'{p}%')} {number:,}" for p, number in counts.percentiles.items())
    return [*lines, ("document lengths", lengths)]
