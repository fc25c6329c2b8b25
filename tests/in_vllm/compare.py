"""Our engine's answers and vLLM's, token for token; what may differ is a choice between equals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EVEN = 1e-5  # two tokens whose log-probabilities differ by less, in both engines, are equally good choices
CLOSE = 1e-4  # of log-probabilities


def same_answers(wanted: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], what: str) -> str:
    """Compare; a line that tells what was compared.

    An answer may leave the other where both engines hold the two tokens for equally likely; it is compared up to there.

    Raises:
        AssertionError: tokens or log-probabilities differ.
    """
    assert len(wanted) == len(found), f"{what}: {len(found)} answers to {len(wanted)} prompts"
    tokens = numbers = ties = 0
    worst = 0.0
    for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
        assert len(one["ids"]) == len(other["ids"]), f"{what}: answer {number} has another length"
        for place, pair in enumerate(zip(one["logprobs"], other["logprobs"], strict=True)):
            if one["ids"][place] != other["ids"][place]:
                assert _even(pair, one["ids"][place], other["ids"][place]), f"{what}: {number}, token {place}: {pair}"
                ties += 1
                break
            tokens += 1
            for mine, theirs in _shared(*pair):
                numbers, worst = numbers + 1, max(worst, abs(mine - theirs))
    assert tokens and worst < CLOSE, f"{what}: log-probabilities differ by {worst:.1e}"
    tied = f", {ties} ended early by a choice between equals" if ties else ""
    return f"{what}: {len(wanted)} answers, {tokens} tokens equal, {numbers} log-probabilities within {worst:.1e}{tied}"


def _shared(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[float, float]]:
    """Log-probabilities that both tell: of the token, and of the likeliest."""
    mine, theirs = ({str(key): value for key, value in told["top"].items()} for told in (one, other))
    assert len(mine.keys() & theirs.keys()) >= len(mine) - 1, (one, other)  # the last of the likeliest may be another
    return [(one["token"], other["token"])] + [(mine[key], theirs[key]) for key in mine.keys() & theirs.keys()]


def _even(pair: tuple[dict[str, Any], dict[str, Any]], first: int, second: int) -> bool:
    tops = [{str(key): value for key, value in told["top"].items()} for told in pair]
    return all(
        str(first) in top and str(second) in top and abs(top[str(first)] - top[str(second)]) < EVEN for top in tops
    )
