"""Processor time of a process: on a busy machine the clock tells of others."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Sequence


def run_timed(command: Sequence[str], **options: object) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a command with captured text; returns it and the processor seconds it and its children took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
