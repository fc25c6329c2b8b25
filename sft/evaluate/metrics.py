"""From judged samples to the numbers of a suite."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from sft.answers.extract import visible
from sft.evaluate.intervals import pass_at_1, pass_at_k, percentile
from sft.evaluate.majority import majority_at_k
from sft.evaluate.suites import after_thinking, thinking_state
from sft.evaluate.verdicts import Sample


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """Everything in `metrics.json` that follows from the samples alone, whatever their order (docs/evaluation.md)."""
    ordered = sorted(samples, key=lambda sample: (sample["problem"], sample["sample"]))
    outcomes = _by_problem(ordered)
    fewest = min((len(rights) for rights in outcomes), default=0)
    votes = _votes(ordered)
    undecided = Counter(sample["reason"] for sample in ordered if sample["verdict"] == "undecided")
    return {
        **pass_at_1(outcomes).as_json(),
        "pass_at_k": {str(k): pass_at_k(outcomes, k) for k in _powers_of_two(fewest)},
        "majority_at_k": {str(k): majority_at_k(votes, k) for k in sorted({*_powers_of_two(fewest), fewest} - {0, 1})},
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
        "cut_off": _share(not sample["finished"] for sample in ordered),
        "empty": _share(sample["finished"] and not _said(sample) for sample in ordered),
        "thinking": _thinking(ordered),
    }


def _by_problem(samples: Iterable[Sample]) -> list[list[bool]]:
    outcomes: defaultdict[int, list[bool]] = defaultdict(list)
    for sample in samples:
        # An undecided answer was not shown to be right.
        outcomes[sample["problem"]].append(sample["verdict"] == "right")
    return list(outcomes.values())


def _votes(samples: Iterable[Sample]) -> list[list[tuple[str | None, bool]]]:
    votes: defaultdict[int, list[tuple[str | None, bool]]] = defaultdict(list)
    for sample in samples:
        votes[sample["problem"]].append((sample["answer"], sample["verdict"] == "right"))
    return list(votes.values())


def _share(marks: Iterable[bool]) -> float:
    found = list(marks)
    return sum(found) / len(found) if found else 0.0


def _said(sample: Sample) -> str:
    """What a sample says outside of its thinking."""
    return visible(after_thinking(sample["prompt"], sample["completion"])).strip()


def _thinking(samples: Sequence[Sample]) -> dict[str, float]:
    """The shares of samples that closed their thinking, were in it at their end, and had none."""
    states = [thinking_state(sample["prompt"], sample["completion"]) for sample in samples]
    return {state: _share(one == state for one in states) for state in ("closed", "open", "none")}


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
