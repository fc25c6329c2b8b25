"""How far an evaluation is, on stderr: a line that is redrawn on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time

LINE_EVERY = 15.0
"""Seconds between lines where the terminal can't redraw."""
_REDRAW_EVERY = 0.2


class ProgressLine:
    """Call it with (suite, samples done, samples in all, right ones so far)."""

    def __init__(self, point: str) -> None:
        self.point = point
        self.live = sys.stderr.isatty()
        self._last = 0.0
        self._began = (0, 0.0)

    def __call__(self, suite: str, done: int, total: int, right: int) -> None:
        """Show the state if it is time to, and always the end."""
        now = time.monotonic()
        if self._began[1] == 0.0:
            self._began, self._last = (done, now), now
        finished = done == total
        if not finished and now - self._last < (_REDRAW_EVERY if self.live else LINE_EVERY):
            return
        self._last = now
        made, seconds = done - self._began[0], now - self._began[1]
        left = "" if finished or not made else f", {_clock(seconds / made * (total - done))} left"
        share = f", {right / done:.1%} right" if done else ""
        text = f"{self.point}/{suite}: {done}/{total} answers{share}{left}"
        # The escape clears what a longer line before has left behind.
        print(f"\r{text}\x1b[K" if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True)
        if finished:
            self._began = (0, 0.0)
            if self.live:
                print(file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
