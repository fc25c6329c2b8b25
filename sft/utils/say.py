"""Progress of long work, a line each, on standard error: standard output is for results."""

from __future__ import annotations

import sys

from sft.utils.distributed import is_main
from sft.utils.progress import end_line


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if is_main():
        end_line()
        print(text, file=sys.stderr, flush=True)
