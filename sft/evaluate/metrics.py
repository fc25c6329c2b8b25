"""From judged samples to the numbers of a suite."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from sft.evaluate.intervals import pass_at_1, pass_at_k, percentile

Sample = dict[str, Any]


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Everything in `metrics.json` that follows from the samples alone, whatever their order."""
    ordered = sorted(samples, key=lambda sample: (sample["problem"], sample["sample"]))
    outcomes = _by_problem(ordered)
    fewest = min((len(rights) for rights in outcomes), default=0)
    undecided = Counter(sample["reason"] for sample in ordered if sample["verdict"] == "undecided")
    return {
        **pass_at_1(outcomes).as_json(),
        "pass_at_k": {str(k): pass_at_k(outcomes, k) for k in _powers_of_two(fewest)},
        "verdicts": dict(Counter(sample["verdict"] for sample in ordered)),
        "undecided_reasons": dict(undecided),
        "by_group": _split(ordered, lambda sample: sample["group"]),
        "by_steps": _split(ordered, lambda sample: sample["steps"]),
        "by_group_and_steps": {
            group: _split([s for s in ordered if s["group"] == group], lambda sample: sample["steps"])
            for group in _kinds(ordered, lambda sample: sample["group"])
        },
        "tokens": {
            "all": _lengths(ordered),
            "right": _lengths([s for s in ordered if s["verdict"] == "right"]),
            "not_right": _lengths([s for s in ordered if s["verdict"] != "right"]),
        },
        "cut_off": sum(not sample["finished"] for sample in ordered) / len(ordered) if ordered else 0.0,
    }


def _by_problem(samples: Iterable[Sample]) -> list[list[bool]]:
    outcomes: defaultdict[int, list[bool]] = defaultdict(list)
    for sample in samples:
        # An undecided answer was not shown to be right.
        outcomes[sample["problem"]].append(sample["verdict"] == "right")
    return list(outcomes.values())


def _kinds(samples: Iterable[Sample], key: Callable[[Sample], Any]) -> list[Any]:
    return sorted({key(sample) for sample in samples if key(sample) is not None})


def _split(samples: Sequence[Sample], key: Callable[[Sample], Hashable]) -> dict[str, Any]:
    """pass@1 for each value of `key`, in the values' order (JSON keys are text)."""
    return {
        str(kind): pass_at_1(_by_problem(s for s in samples if key(s) == kind)).as_json()
        for kind in _kinds(samples, key)
    }


def _lengths(samples: Sequence[Sample]) -> dict[str, float] | None:
    """Tokens of the completions, the end token not counted; None without samples."""
    if not samples:
        return None
    tokens = [float(sample["tokens"]) for sample in samples]
    marks = {f"p{share}": percentile(tokens, share / 100) for share in (10, 50, 90, 99)}
    return {"mean": sum(tokens) / len(tokens), **marks, "max": max(tokens)}


def _powers_of_two(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(1, largest.bit_length()) if 1 << exponent <= largest]
