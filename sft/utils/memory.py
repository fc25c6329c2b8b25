"""Memory of the C library, and Python's garbage."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT = 256 << 20
_LARGEST_MMAP_THRESHOLD = 32 << 20  # of glibc


def keep_freed_memory() -> None:
    """Let glibc keep up to 256 MiB that are freed, where it would give them back and take them again at every step.

    Pages that come from the system are zeroed first: thousands a training step on a CPU, a twentieth of its time. It
    holds for the process; other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    library.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def give_back_freed_memory() -> None:
    """Let glibc give freed memory back to the system, so that the process's size is what it uses."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def quick_collections() -> Iterator[None]:
    """While active, a collection of garbage passes over what is in use now.

    That is half a million objects of imported packages, which take a third of a second to look through: a run of three
    stages collects twenty times, since a model that was let go of may hang in a circle.
    """
    if gc.get_freeze_count():  # the caller's own, who takes it back
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
