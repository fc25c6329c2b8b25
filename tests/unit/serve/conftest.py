"""A server that the tests of a module share; nothing is under way when it ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving_toys import Running, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as made:
        yield made
        made.until(lambda: made.idle)
    assert made.finished
