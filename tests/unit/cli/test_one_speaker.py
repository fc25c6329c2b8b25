"""Of several processes the main one alone speaks; what happens to another one alone is told by that one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sft.cli.main import main
from sft.train.interrupt import Interrupted, Stopped, stop_signals
from sft.utils.distributed import alike
from sft.utils.errors import UserError


@pytest.fixture(params=[0, 1])
def number(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """This process's rank, of two."""
    monkeypatch.setenv("RANK", str(request.param))
    monkeypatch.setenv("WORLD_SIZE", "2")
    return int(request.param)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    import sft.cli.recipes

    def run(error: BaseException) -> tuple[int, str]:
        def execute(arguments: Any, overrides: Sequence[str]) -> int:
            raise error

        monkeypatch.setattr(sft.cli.recipes, "execute", execute)
        return main(["recipes"]), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("error", "status"),
    [(Interrupted("Stopped at step 3.", signal.SIGTERM), 143), (Stopped(signal.SIGINT), 130)],
    ids=["saved", "at once"],
)
def test_a_stop_is_told_once(
    number: int, failing: Callable[..., tuple[int, str]], error: BaseException, status: int
) -> None:
    found, err = failing(error)
    assert found == status and (err.count("sft: ") == 1) == (number == 0), err


def test_what_one_process_alone_finds_is_told_by_it(number: int, failing: Callable[..., tuple[int, str]]) -> None:
    assert failing(UserError("the disk of this node is gone")) == (1, "sft: the disk of this node is gone\n")


def test_what_all_find_is_told_once(number: int, failing: Callable[..., tuple[int, str]]) -> None:
    with pytest.raises(UserError) as caught, alike():
        raise UserError("training diverged")
    assert failing(caught.value) == (1, "sft: training diverged\n" if number == 0 else "")


@pytest.mark.parametrize("words", [["rn"], ["recipes", "copy", "--nosuch"], ["run", "--restart"]])
def test_wrong_words_are_told_once(number: int, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.count("sft: ") == 1 - number


def test_saving_is_told_once(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    with stop_signals() as signals:
        with signals.saving():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert capfd.readouterr().err.count("saving, then stopping") == 1 - number
