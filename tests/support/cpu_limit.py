"""A bound on processor time: far from what right work takes on a slow machine, far below what quadratic work takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(cpu_seconds: float) -> Iterator[None]:
    """Fails when the block took more processor time. What is quick by how much, the benchmarks say."""
    began = time.process_time()
    yield
    assert time.process_time() - began < cpu_seconds
