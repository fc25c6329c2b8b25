"""Freed memory stays in the process, so that a step takes no new pages; collections pass over what is imported."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from sft.utils.memory import quick_collections

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


class Circle:
    """What only a collection frees."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """As in a user's process: conftest.py has frozen what was imported."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("unfrozen")
def test_what_is_let_go_of_while_collections_are_quick_is_collected() -> None:
    before = Circle()
    watched = weakref.ref(before)
    with quick_collections():
        assert gc.get_freeze_count() > 10_000
        inside = weakref.ref(Circle())
        gc.collect()
        assert inside() is None
        del before
        gc.collect()
        assert watched() is not None  # it was in use: nobody looks there until the end
    gc.collect()
    assert watched() is None and gc.get_freeze_count() == 0


@pytest.mark.usefixtures("unfrozen")
def test_garbage_goes_before_collections_are_quick() -> None:
    garbage = weakref.ref(Circle())
    with quick_collections():
        assert garbage() is None


def test_what_the_caller_has_frozen_stays_so() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with quick_collections():
        pass
    assert gc.get_freeze_count() > frozen // 2  # none if it were taken back; a few are freed by their last reference
