"""Numbers of a server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How often a time was at most so long."""

    def __init__(self, help_text: str) -> None:
        self.help_text = help_text
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        """As Prometheus reads it."""
        below = 0
        for bound, count in zip((*_SECONDS, "+Inf"), self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {below}"


class Metrics:
    """What a server counts: of requests by path and status, of tokens, and of times."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = self.answer_tokens = self.given_up = 0
        self.first_token = Histogram("Seconds from a request to the first token of an answer.")
        self.each_token = Histogram("Seconds between an answer's tokens, on average.")

    def text(self, gauges: dict[str, tuple[str, float]]) -> str:
        """All of it, with what is so at this moment: name -> (what it is, value)."""
        lines = _head("sft_requests_total", "counter", "Requests, by path and HTTP status.")
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'sft_requests_total{{path="{path}",status="{status}"}} {count}')
        counts = (
            ("sft_prompt_tokens_total", "Tokens of prompts that were taken.", self.prompt_tokens),
            ("sft_answer_tokens_total", "Tokens of answers.", self.answer_tokens),
            ("sft_given_up_total", "Requests whose client left before the end.", self.given_up),
        )
        for name, help_text, value in counts:
            lines += [*_head(name, "counter", help_text), f"{name} {value}"]
        for name, (help_text, now) in gauges.items():
            lines += [*_head(name, "gauge", help_text), f"{name} {now:g}"]
        for name, histogram in (
            ("sft_time_to_first_token_seconds", self.first_token),
            ("sft_time_per_token_seconds", self.each_token),
        ):
            lines += [*_head(name, "histogram", histogram.help_text), *histogram.lines(name)]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, help_text: str) -> list[str]:
    return [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
