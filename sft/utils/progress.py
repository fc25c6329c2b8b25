"""How far long work is, on stderr: one line, redrawn on a terminal, else printed now and then; and when it will end."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Sequence

from sft.utils.errors import shown

LINE_EVERY = 5.0
"""Seconds between lines where the terminal can't redraw."""
_REDRAW_EVERY = 0.1
_SHORTEST, _FEWEST, _AGREE = 2.0, 2, 2.0
_POINTS = 512


class TimeLeft:
    """When counted work ends, told only once it can be believed.

    The first items are slow (compilation, caches, a batch of answers that begin together), so the clock starts with the
    first that is done; it must then have run for as long as that one took, and the pace of the later half of that time
    must agree with that of the whole: work that slows down or has stopped is not foretold.

    Args:
        done: items that were there before (of a continued run).
        now: seconds on any clock.
        together: how many items are worked on side by side. They end in clumps, the short ones first: that half must
            have seen as many, and of the last ones, which all are under way, the longest decides.
    """

    def __init__(self, done: int, now: float, together: int = 1) -> None:
        self._start = (now, done)
        self._together = together
        self._points: list[tuple[float, int]] = []

    def note(self, done: int, now: float) -> None:
        """So many items are done."""
        last = self._points[-1] if self._points else self._start
        if done <= last[1]:
            return
        self._points.append((now, done))
        if len(self._points) > _POINTS:
            self._points = [*self._points[:-1:2], self._points[-1]]

    def seconds(self, total: int, now: float) -> float | None:
        """Seconds until `total` items are done; None while nobody can know."""
        if len(self._points) < 2 or total - self._points[-1][1] < self._together:
            return None
        (began, first), (last, done) = self._points[0], self._points[-1]
        # Between two items the next one is under way; only a longer silence than usual says something.
        end = max(last, now - (last - began) / (len(self._points) - 1))
        span = end - began
        if span < max(_SHORTEST, began - self._start[0]):
            return None
        late = done - self._done_at(end - span / 2)
        whole_pace, late_pace = (done - first) / span, late / (span / 2)
        if late < max(_FEWEST, self._together) or not whole_pace / _AGREE <= late_pace <= whole_pace * _AGREE:
            return None
        return max(0.0, (total - done) / late_pace - (now - end))

    def _done_at(self, moment: float) -> float:
        """Items done at a moment between the first point and now."""
        before = max((point for point in self._points if point[0] <= moment), default=self._points[0])
        after = min((point for point in self._points if point[0] > moment), default=None)
        if after is None:
            return before[1]
        return before[1] + (after[1] - before[1]) * (moment - before[0]) / (after[0] - before[0])


class ProgressLine:
    """Call it with what is done of how much. A number that doesn't fit into the terminal's width is left out, the last
    first; the count and the time left always stay.

    Args:
        title: what is under way, such as a stage's name.
        unit: what is counted, such as "steps".
        together: how many are worked on side by side.
        passing: it leaves nothing on a terminal, and in a log no line where it was quick.
    """

    def __init__(self, title: str, unit: str = "", *, together: int = 1, passing: bool = False) -> None:
        self.title, self.unit, self.together, self.passing = shown(title), unit, together, passing
        self.live = sys.stderr.isatty()
        self._left: TimeLeft | None = None
        self._began = self._last = 0.0

    def __call__(self, done: int, total: int | None, numbers: Sequence[str] = ()) -> None:
        """Show where it is, if it is time to: always the end, and on a terminal also the beginning. `numbers`: what
        else there is to tell, the most important first."""
        now = time.monotonic()
        if self._left is None:
            self._left, self._began = TimeLeft(done, now, self.together), now
            self._last = -math.inf if self.live else now
        self._left.note(done, now)
        finished = done == total
        soon = now - self._last < (_REDRAW_EVERY if self.live else LINE_EVERY)
        if soon and (not finished or self.passing):
            return
        self._last = now
        where = f"{done:,}/{total:,} {self.unit}" if total else f"{done:,} {self.unit}"
        parts = [where.strip(), self._time(total, now, finished), *numbers]
        if self.live:
            _draw(fitted(self.title, parts, shutil.get_terminal_size().columns - 1))
        else:
            print(f"{self.title}: {', '.join(parts)}", file=sys.stderr, flush=True)
        if finished:
            self.close()

    def _time(self, total: int | None, now: float, finished: bool) -> str:
        left = self._left.seconds(total, now) if self._left and total else None
        if finished or left is None:
            return f"{clock(now - self._began)}{'' if finished else ' so far'}"
        return f"{clock(left)} left"

    def close(self) -> None:
        """Leave the terminal on a new line, also after an error; a next call begins anew."""
        self._left = None
        if self.live:
            end_line(keep=not self.passing)


class PhaseLines:
    """Progress of work in phases, each counted by itself: call it with (phase, done, total)."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._phase, self._line = "", ProgressLine(title, passing=True)

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Show it, if it is time to."""
        if phase != self._phase:
            self.close()
            self._phase, self._line = phase, ProgressLine(f"{self.title}: {phase}", passing=True)
        self._line(done, total)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._line.close()


def fitted(title: str, parts: Sequence[str], width: int) -> str:
    """The title and its parts on one line: where they don't fit, the title gives way to a third of the width, then the
    last parts, then all of the title. Of the first two parts nothing is lost."""
    if len(f"{title}: {', '.join(parts)}") > width:
        title = _cut(title, width // 3)
    count = len(parts)
    while count > 2 and len(f"{title}: {', '.join(parts[:count])}") > width:
        count -= 1
    text = ", ".join(parts[:count])
    title = _cut(title, width - len(text) - 2)
    return (f"{title}: {text}" if title else text)[:width]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}\u2026" if room > 1 else ""


def clock(seconds: float) -> str:
    """Seconds for reading: 41s, 2m04s, 1h03m, 2d05h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes // 1440}d{minutes % 1440 // 60:02d}h"


# ---- the line that is on the terminal ----

_on_screen = False


def _draw(text: str) -> None:
    global _on_screen
    # The escape clears what a longer line before has left behind.
    print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
    _on_screen = True


def end_line(*, keep: bool = True) -> None:
    """Let what is printed next begin below a line that is being redrawn, or in its place. Asked before every print."""
    global _on_screen
    if _on_screen:
        print("\n" if keep else "\r\x1b[K", end="", file=sys.stderr, flush=True)
    _on_screen = False
