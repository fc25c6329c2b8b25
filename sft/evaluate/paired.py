"""Two models' samples of a suite, paired by what was asked and what is right, and all that is told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft.evaluate.comparison import (
    Detectable,
    Difference,
    Shares,
    detectable,
    mean_difference,
    share_difference,
)
from sft.evaluate.intervals import Estimate, pass_at_1
from sft.evaluate.majority import majority_at_k
from sft.evaluate.metrics import Sample
from sft.evaluate.sample_files import SuiteSamples
from sft.utils.errors import UserError
from sft.utils.tables import counted

Key = tuple[str, str]
# What answers don't follow from, or what is compared otherwise.
_NO_PROTOCOL = ("batch_size", "seed", "samples_per_problem", "example_prompt")
# A vote of fewer is one sample's.
_FEWEST_VOTES = 3


@dataclass(frozen=True)
class Shown:
    """One model's answers to a problem: how many of its samples are right, and the commonest answer of those that are,
    or aren't, whichever are more: with its verdict and one of its completions. `answer_known`: whether the samples say
    it; then None is no answer."""

    right: int
    samples: int
    answer: str | None
    verdict: str
    completion: str | None
    answer_known: bool

    @property
    def share(self) -> float:
        """The share of right samples."""
        return self.right / self.samples


@dataclass(frozen=True)
class Changed:
    """A problem that more than half of one model's samples solve, and less than half of the other's."""

    id: str | None
    question: str
    gold: str
    a: Shown
    b: Shown

    def as_json(self) -> dict[str, Any]:
        """As `sft compare --json` has it."""
        return {"id": self.id, "question": self.question, "gold": self.gold, "a": vars(self.a), "b": vars(self.b)}


@dataclass(frozen=True)
class Comparison:
    """Everything about a suite that two models were asked.

    Attributes:
        suite: its name; both, where they differ.
        problems: those that both were asked: all numbers are of them. `only`: how many one alone was asked.
        samples: of either.
        scores: each one's pass@1.
        pass_at_1, majority, cut_off, tokens: differences, None where the samples don't say; `votes` is majority@k's k.
        unpaired: the interval that pass@1's difference would have on problems of their own; `correlation`: why not.
        gained, lost: the problems that changed sides, the largest changes first.
        power: what differences are seen.
        notes: sentences on what else is different.
    """

    suite: str
    problems: int
    only: tuple[int, int]
    samples: tuple[int, int]
    scores: tuple[Estimate, Estimate]
    pass_at_1: Difference
    unpaired: Difference
    correlation: float
    votes: int
    majority: Difference | None
    cut_off: Difference | None
    tokens: Difference | None
    gained: list[Changed]
    lost: list[Changed]
    power: Detectable
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """As `sft compare --json` has it."""
        intervals = {f"interval_{side}": [score.low, score.high] for side, score in zip("ab", self.scores, strict=True)}
        unpaired = self.unpaired.as_json()["interval"]
        one = self.pass_at_1.as_json() | intervals
        majority = None if self.majority is None else {"k": self.votes, **self.majority.as_json()}
        return {
            "suite": self.suite,
            "problems": self.problems,
            "only_in": dict(zip("ab", self.only, strict=True)),
            "samples": dict(zip("ab", self.samples, strict=True)),
            "pass_at_1": {**one, "unpaired_interval": unpaired, "correlation": self.correlation},
            "majority": majority,
            "cut_off": self.cut_off and self.cut_off.as_json(),
            "tokens": self.tokens and self.tokens.as_json(),
            "power": self.power.as_json(),
            "gained": [change.as_json() for change in self.gained],
            "lost": [change.as_json() for change in self.lost],
            "notes": self.notes,
        }


@dataclass(frozen=True)
class _Pair:
    """Both models' samples of one problem."""

    question: str
    gold: str
    a: list[Sample]
    b: list[Sample]


def compare_samples(a: SuiteSamples, b: SuiteSamples, detect: float | None = None) -> Comparison:
    """Compare two models on the problems that both were asked: question and gold answer are the same, whatever their
    number, order and id. `detect`: a difference of pass@1 whose price is asked.

    Raises UserError where they share no problem.
    """
    asked = _asked(a.samples, b.samples)
    mine, theirs = _by_problem(a.samples, asked), _by_problem(b.samples, asked)
    pairs = [_Pair(*key, samples, theirs[key]) for key, samples in mine.items() if key in theirs]
    if not pairs:
        raise UserError(f"{a.path} and {b.path} share no problem: question and gold answer have to be the same")
    only_a, only_b = mine.keys() - theirs.keys(), theirs.keys() - mine.keys()
    shares = _shares(pairs, _is_right)
    votes = min(min(len(pair.a), len(pair.b)) for pair in pairs)
    changed = sorted(_changed(pairs), key=lambda change: -abs(change.b.share - change.a.share))
    return Comparison(
        suite=a.suite if a.suite == b.suite else f"{a.suite} and {b.suite}",
        problems=len(pairs),
        only=(len(only_a), len(only_b)),
        samples=(int(shares.samples_a.sum()), int(shares.samples_b.sum())),
        scores=(_score(pair.a for pair in pairs), _score(pair.b for pair in pairs)),
        pass_at_1=share_difference(shares),
        unpaired=share_difference(shares, paired=False),
        correlation=shares.correlation,
        votes=votes,
        majority=_majority(pairs, votes),
        cut_off=share_difference(_shares(pairs, _is_cut_off)) if _all_have(pairs, "finished", bool) else None,
        tokens=_lengths(pairs) if _all_have(pairs, "tokens", int) else None,
        gained=[change for change in changed if change.b.share > change.a.share],
        lost=[change for change in changed if change.b.share < change.a.share],
        power=detectable(shares, detect),
        notes=[*a.notes, *b.notes, *_notes(a, b, pairs), *_other_golds(only_a, only_b)],
    )


# ---- pairing ----


def _asked(*sides: Sequence[Sample]) -> str:
    """The key of what was asked: the question, or the prompt where samples are from before questions were kept."""
    return "question" if all("question" in sample for samples in sides for sample in samples) else "prompt"


def _by_problem(samples: Sequence[Sample], asked: str) -> dict[Key, list[Sample]]:
    found: dict[Key, list[Sample]] = {}
    for sample in samples:
        text = sample.get(asked, sample.get("question"))
        found.setdefault((str(text).strip(), str(sample["gold"]).strip()), []).append(sample)
    return found


def _is_right(sample: Sample) -> bool:
    return bool(sample["verdict"] == "right")


def _is_cut_off(sample: Sample) -> bool:
    return not sample["finished"]


def _shares(pairs: Sequence[_Pair], holds: Callable[[Sample], bool]) -> Shares:
    """The share of samples of which something holds, by problem."""
    a, b = ([sum(map(holds, side)) / len(side) for side in sides] for sides in _sides(pairs))
    return Shares.of(a, b, *([len(side) for side in sides] for sides in _sides(pairs)))


def _sides(pairs: Sequence[_Pair]) -> tuple[list[list[Sample]], list[list[Sample]]]:
    return [pair.a for pair in pairs], [pair.b for pair in pairs]


def _score(sides: Iterator[list[Sample]]) -> Estimate:
    return pass_at_1([list(map(_is_right, side)) for side in sides])


def _majority(pairs: Sequence[_Pair], votes: int) -> Difference | None:
    """The difference of majority@k; None for votes of too few, and where an answer isn't known: it is no silence."""
    if votes < _FEWEST_VOTES or not _all_say(pairs, "answer"):
        return None
    a, b = (
        [majority_at_k([[(sample["answer"], _is_right(sample)) for sample in side]], votes) for side in sides]
        for sides in _sides(pairs)
    )
    return share_difference(Shares.of(a, b, *([len(side) for side in sides] for sides in _sides(pairs))))


def _lengths(pairs: Sequence[_Pair]) -> Difference:
    a, b = ([sum(sample["tokens"] for sample in side) / len(side) for side in sides] for sides in _sides(pairs))
    return mean_difference(a, b)


def _all_have(pairs: Sequence[_Pair], key: str, kind: type) -> bool:
    return all(isinstance(sample.get(key), kind) for pair in pairs for sample in (*pair.a, *pair.b))


def _all_say(pairs: Sequence[_Pair], key: str) -> bool:
    """Whether every sample has the key: then null is a value, too."""
    return all(key in sample for pair in pairs for sample in (*pair.a, *pair.b))


# ---- problems that changed sides ----


def _changed(pairs: Sequence[_Pair]) -> Iterator[Changed]:
    for pair in pairs:
        a, b = _shown(pair.a), _shown(pair.b)
        if (a.share - 0.5) * (b.share - 0.5) < 0:
            name = next((str(sample["id"]) for sample in (*pair.a, *pair.b) if sample.get("id") is not None), None)
            yield Changed(name, pair.question, pair.gold, a, b)


def _shown(samples: Sequence[Sample]) -> Shown:
    right = sum(map(_is_right, samples))
    alike = [sample for sample in samples if _is_right(sample) == (2 * right > len(samples))] or list(samples)
    counts = Counter(sample.get("answer") for sample in alike)
    chosen = max(alike, key=lambda sample: counts[sample.get("answer")])
    answer, completion = chosen.get("answer"), chosen.get("completion")
    return Shown(right, len(samples), answer, chosen["verdict"], completion, "answer" in chosen)


# ---- what else is different ----


def _notes(a: SuiteSamples, b: SuiteSamples, pairs: Sequence[_Pair]) -> Iterator[str]:
    yield from _protocols(a.settings, b.settings)
    if _same_words(pairs):
        yield "Both gave the same answers, word for word."
    if other := sum(_judged_otherwise(pair) for pair in pairs):
        yield f"{counted(other, 'answer')} of B were judged otherwise than A's, word for word the same: by other rules."
    if prompts := sum(map(_asked_otherwise, pairs)):
        yield f"{prompts} of the {len(pairs)} problems were asked with another prompt: the difference is that of both."
    undecided = [sum(sample["verdict"] == "undecided" for side in sides for sample in side) for sides in _sides(pairs)]
    if any(undecided):
        yield f"Undecided answers count as not right: {undecided[0]} of A, {undecided[1]} of B."
    for name, sides in zip("AB", _sides(pairs), strict=True):
        counts = [len(side) for side in sides]
        if min(counts) < max(counts):
            yield f"{name} has from {min(counts)} to {max(counts)} samples of a problem."


def _protocols(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    if unknown := [name for name, settings in (("A", a), ("B", b)) if not settings]:
        yield f"How the samples of {' and '.join(unknown)} were made isn't known: maybe not alike."
    elif other := [key for key in {**a, **b} if key not in _NO_PROTOCOL and a.get(key) != b.get(key)]:
        told = ", ".join(f"{key} {_value(a.get(key))} and {_value(b.get(key))}" for key in other)
        yield f"Not made alike: {told}: the difference is that of models and settings together."


def _value(value: Any) -> str:
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _same_words(pairs: Sequence[_Pair]) -> bool:
    """Whether both gave the same completions, or answers, where no more than those is known."""
    key = next((key for key in ("completion", "answer") if _all_say(pairs, key)), None)
    if key is None:
        return False
    return all(sorted(str(s[key]) for s in pair.a) == sorted(str(s[key]) for s in pair.b) for pair in pairs)


def _asked_otherwise(pair: _Pair) -> bool:
    """Whether both tell their prompts, and these differ."""
    a, b = ({prompt for s in side if isinstance(prompt := s.get("prompt"), str)} for side in (pair.a, pair.b))
    return bool(a and b) and a != b


def _judged_otherwise(pair: _Pair) -> int:
    verdicts = {s["completion"]: s["verdict"] for s in pair.a if s.get("completion") is not None and s.get("finished")}
    same = (sample for sample in pair.b if sample.get("finished") and sample.get("completion") in verdicts)
    return sum(sample["verdict"] != verdicts[sample["completion"]] for sample in same)


def _other_golds(only_a: set[Key], only_b: set[Key]) -> Iterator[str]:
    if count := len({question for question, _ in only_a} & {question for question, _ in only_b}):
        yield f"Left out, because their gold answers differ: {counted(count, 'question')} of both."
