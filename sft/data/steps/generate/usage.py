"""What was asked and what it cost, over all runs that wrote into one journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft.data.steps.generate.answer import Answer, Who


@dataclass(frozen=True)
class Price:
    """Of a million tokens."""

    input: float = 0.0
    output: float = 0.0

    def of(self, answer: Answer) -> float:
        """What an answer cost: as the server says, else by its tokens."""
        if answer.cost is not None:
            return answer.cost
        return ((answer.prompt_tokens or 0) * self.input + (answer.completion_tokens or 0) * self.output) / 1e6


@dataclass
class Count:
    """Of one model.

    Attributes:
        answers: requests that were answered; failed: that were given up; retries: how often one was sent again.
        uncounted: answers whose tokens the server didn't count.
    """

    answers: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    cost: float = 0.0

    def described(self) -> dict[str, Any]:
        """As JSON. `requests`: how often something was sent."""
        requests = self.answers + self.failed + self.retries
        return {"requests": requests, **vars(self), "cost": round(self.cost, 6)}


@dataclass
class Usage:
    """Counts by model; `seconds`: time spent asking, by run."""

    prices: Mapping[Who, Price]
    counts: dict[Who, Count] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def add(self, run: int, line: Mapping[str, Any]) -> None:
        """Count a line of the journal of the `run`th process."""
        who: Who = line["who"]
        count = self.counts.setdefault(who, Count())
        self.seconds[run] = max(self.seconds.get(run, 0.0), line["seconds"])
        count.retries += line["retries"]
        if line.get("answer") is None:
            count.failed += 1
            return
        answer = Answer.from_json(line["answer"])
        count.answers += 1
        count.prompt_tokens += answer.prompt_tokens or 0
        count.completion_tokens += answer.completion_tokens or 0
        count.uncounted += answer.completion_tokens is None
        count.cost += self.prices[who].of(answer)

    def described(self) -> dict[str, Any]:
        """As JSON: the sums, and under `models` those of each model."""
        total = Count(**{name: sum(vars(count)[name] for count in self.counts.values()) for name in vars(Count())})
        models = {who: count.described() for who, count in sorted(self.counts.items())}
        return {**total.described(), "seconds": round(sum(self.seconds.values()), 3), "models": models}

    def sentence(self) -> str:
        """For the log."""
        value = self.described()
        return (
            f"{value['answers']} answers, {value['failed']} failed requests, {value['retries']} retries; "
            f"{value['prompt_tokens']} prompt and {value['completion_tokens']} completion tokens, "
            f"cost {value['cost']:.4f}; {value['seconds']:.0f} s"
        )
