"""Freed memory stays in the process, so that a step takes no new pages."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import platform, resource, sys
import torch
from sft.utils.memory import keep_freed_memory
keep_freed_memory()
def step():
    for _ in range(4):
        blocks = [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each
        del blocks
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(platform.libc_ver()[0], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults() -> int:
    """Pages that a process takes in a second round of the same work."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=True)
    library, count = done.stdout.split()[-2:] if len(done.stdout.split()) > 1 else ("", done.stdout)
    if library != "glibc":
        pytest.skip(f"not glibc but {library or 'an unknown C library'}")
    return int(count)


def test_a_second_round_takes_no_new_pages() -> None:
    # Without it 32,640 mostly, of 4 KiB each; none where chance has put something behind the last block.
    assert faults() < 50
