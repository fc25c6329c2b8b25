"""Progress of long work, a line each, on standard error: standard output is for results."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress

from sft.utils.distributed import is_main
from sft.utils.progress import end_line


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if is_main():
        end_line()
        print(text, file=sys.stderr, flush=True)


def leave_lost_terminal() -> None:
    """Write no more to a terminal that has gone away: each word would be an error, in the midst of what is saved."""
    for stream in (1, 2):
        with suppress(OSError):  # closed
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):  # or it is the null device already
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream)
                os.close(null)
