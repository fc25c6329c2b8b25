"""A packed row that 2 or 4 ranks share gives the loss and the gradients of the whole row, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

TOLERANCE = 1e-10
GROUPS = ("2", "4")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[Any]]:
    """What each of the four ranks says of a kind of cases, done by groups of 2 or by all 4."""
    folder: Path = tmp_path_factory.mktemp("shares")
    ends = run_ranks("share_cases.py", str(folder), ranks=4, limit=400)
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]
    return lambda size, kind: [result[size][kind] for result in _ended_well(ends, results)]


def _ended_well(ends: list[Any], results: list[Any]) -> list[Any]:
    assert [end.code for end in ends] == [0] * 4, "\n".join(end.stderr[-3000:] for end in ends)
    return results


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize(("kind", "count"), [("layouts", 50), ("checkpointing", 4), ("adapters", 8)])
def test_shares_give_the_loss_and_gradients_of_the_whole_row(found, size, kind, count):
    """Cuts inside documents and at their edges, documents of one token, empty shares, rows shorter than the ranks are
    many, a window of 16, tokens before a document's first target left out, weights."""
    said = found(size, kind)
    # Two pairs share 25 layouts.
    assert len(said[0]) == (13 if size == "2" and kind == "layouts" else count)
    assert max(max(case) for rank in said for case in rank) < TOLERANCE


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("what", ["conv_state", "scan_state", "keys_before"])
def test_a_share_that_starts_from_nothing_is_told_by_them(found, size, what):
    loss, gradient = found(size, "naive")[0][what]
    assert loss > 1e-4 and gradient > 1e-2


@pytest.mark.parametrize("size", GROUPS)
def test_what_mamba_layers_and_windows_fetch_does_not_grow_with_the_row(found, size):
    """The keys of the one full layer do; the last rank fetches those of all before it."""
    short, long = found(size, "moved")[-1]
    assert {name: long[name] for name in ("conv", "scan", "window")} == {
        name: short[name] for name in ("conv", "scan", "window")
    }
    ranks, inner, states, layers = int(size), 64, 8, 3
    assert short["scan"] == 8 * layers * (ranks - 1) * inner * (states + 1)
    assert short["conv"] == 8 * layers * 3 * inner
    assert short["window"] == 8 * 2 * (16 - 1) * 2 * 16  # two layers, keys and values of 16 numbers
    assert long["keys"] == 2 * short["keys"] == 2 * 8 * 2 * 16 * 120 * (ranks - 1) // ranks


@pytest.mark.parametrize("size", GROUPS)
def test_the_probe_at_a_stage_s_start_tells_a_share_that_starts_from_nothing(found, size):
    """Every rank says the same; what is sound passes, with checkpointing and an adapter's dropout too."""
    for said in found(size, "probe"):
        assert said.pop("null") == "passed"
        assert len(said) == 3
        for text in said.values():
            assert "can't train on rows that several processes share, because a share's gradients aren't the" in text
