"""Several processes answer what one answers, byte for byte, whichever of them does what, and whichever of them dies."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_worker import BEFORE_KILL, evaluated, helper
from ranks import Ended, run_ranks

from sft.utils import distributed
from sft.utils.errors import UserError

SAMPLES = 48
TIMES = ("seconds", "generated_tokens", "tokens_per_second", "resumed_samples")

Launch = Callable[..., list[Ended]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluations")


@pytest.fixture(scope="module")
def launch(folder: Path) -> Launch:
    """Start processes on cases; their ends."""
    data = helper().write_problems(folder / "sums.jsonl")

    def start(ranks: int, *cases: str) -> list[Ended]:
        words = ("evaluation_worker.py", str(folder), str(data), *cases)
        # Those that are left when one is killed have yet to do its work.
        return run_ranks(*words, ranks=ranks, limit=240, after_failure=180)

    return start


@pytest.fixture(scope="module")
def alone(folder: Path, launch: Launch) -> dict[str, dict[str, Any]]:
    """What one process comes to, without torch.distributed."""
    data = folder / "sums.jsonl"
    return {event: evaluated(folder / f"alone-{event}", data, event)["metrics"] for event in ("", "two", "few")}


@pytest.fixture(scope="module")
def killed(folder: Path, launch: Launch) -> int:
    """An evaluation of two processes, both killed; how many answers they left."""
    ends = launch(2, "killed:kill=01")
    assert [end.code for end in ends] == [-signal.SIGKILL] * 2, ends
    shutil.copytree(folder / "killed", folder / "continued")
    return sum(path.read_bytes().count(b"\n") for path in (folder / "killed/sums").glob("samples*.jsonl"))


@pytest.fixture(scope="module")
def two(folder: Path, launch: Launch, killed: int) -> list[dict[str, Any]]:
    return results(folder, launch(2, "plain", "slow:slow", "broken:broken", "both:two", "few:few"))


@pytest.fixture(scope="module")
def four(folder: Path, launch: Launch, killed: int) -> list[dict[str, Any]]:
    return results(folder, launch(4, "plain4", "continued"))


def results(folder: Path, ends: list[Ended]) -> list[dict[str, Any]]:
    assert [end.code for end in ends] == [0] * len(ends), "\n".join(end.stderr[-2000:] for end in ends)
    return [json.loads((folder / f"{len(ends)}-{rank}.json").read_text()) for rank in range(len(ends))]


def lasting(metrics: dict[str, Any]) -> dict[str, Any]:
    return {suite: {key: value for key, value in found.items() if key not in TIMES} for suite, found in metrics.items()}


def check_same(folder: Path, name: str, expected: dict[str, Any], event: str = "") -> None:
    """The files are those of one process, and nothing else is left."""
    for suite in expected:
        one, other = folder / f"alone-{event}" / suite, folder / name / suite
        assert (other / "samples.jsonl").read_bytes() == (one / "samples.jsonl").read_bytes()
        found = {suite: json.loads((other / "metrics.json").read_text())}
        assert lasting(found)[suite].keys() - {"sha256_of_this"} == lasting(expected)[suite].keys()
        assert {key: found[suite][key] for key in lasting(expected)[suite]} == lasting(expected)[suite]
        assert sorted(path.name for path in other.iterdir()) == ["metrics.json", "progress.json", "samples.jsonl"]
    assert sorted(path.name for path in (folder / name).iterdir()) == sorted(expected)


@pytest.mark.parametrize(("case", "event"), [("plain", ""), ("slow", ""), ("both", "two"), ("few", "few")])
def test_two_processes_answer_what_one_does(folder, alone, two, case, event):
    check_same(folder, case, alone[event], event)
    for result in two:
        assert lasting(result[case]["metrics"]) == lasting(alone[event]) and result[case]["lost"] == []


def test_four_processes_answer_what_one_does(folder, alone, four):
    check_same(folder, "plain4", alone[""])
    assert all(lasting(result["plain4"]["metrics"]) == lasting(alone[""]) for result in four)
    assert all(result["plain4"]["made"] for result in four)


@pytest.mark.parametrize("case", ["plain", "slow", "both", "few"])
def test_each_answer_is_made_once_by_one_of_them(two, case):
    made = [number for result in two for number in result[case]["made"]]
    each = 24 if case == "few" else SAMPLES
    assert sorted(made) == sorted([*range(each)] * (2 if case == "both" else 1))
    assert all(result[case]["made"] for result in two)


def test_a_slow_process_gets_less_to_do(two):
    quick, slow = (len(result["slow"]["made"]) for result in two)
    assert quick > slow


def test_progress_is_the_sum_over_the_processes(two):
    for result in two:
        seen = [tuple(line) for line in result["slow"]["seen"]]
        assert [line[1] for line in seen] == sorted({line[1] for line in seen}) and {line[2] for line in seen} == {
            SAMPLES
        }
        assert seen[0][1] == 0
    # The first to lead waits for all of it.
    assert two[0]["slow"]["seen"][-1][1] == SAMPLES and len(two[0]["slow"]["made"]) < SAMPLES


def test_an_error_of_one_process_ends_all_with_its_sentence(two):
    first, second = (result["broken"] for result in two)
    assert "not finite" in second["error"] and second["from"] is None
    assert first == {"error": second["error"], "from": 1}


def test_an_evaluation_whose_processes_were_killed_is_continued_by_more(folder, alone, four, killed):
    assert 2 * BEFORE_KILL <= killed < SAMPLES
    check_same(folder, "continued", alone[""])
    assert {result["continued"]["metrics"]["sums"]["resumed_samples"] for result in four} == {killed}
    assert sum(len(result["continued"]["made"]) for result in four) == SAMPLES - killed


def test_what_needs_all_processes_is_refused_once_one_is_lost(monkeypatch):
    """It would wait for the dead one."""
    monkeypatch.setattr(distributed._Channel, "lost", {1})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="rank 1 has died") as seen:
        distributed.gather(None)
    assert seen.value.from_rank == 0


def test_what_a_killed_process_had_to_do_the_others_do(folder, launch, alone):
    """Of three one dies while it answers, and then the one that sums up: the last one is left with the numbers."""
    ends = launch(3, "without-2:kill=2", "again", "without-0:end=0", "no-more")
    assert [end.code for end in ends] == [-signal.SIGKILL, 0, -signal.SIGKILL], ends
    first, second = (json.loads((folder / f"3-{rank}.json").read_text()) for rank in (0, 1))
    for name in ("without-2", "again", "without-0"):
        check_same(folder, name, alone[""])
        assert lasting(second[name]["metrics"]) == lasting(alone[""])
    assert [second[name]["lost"] for name in ("without-2", "again", "without-0")] == [[2], [2], [0, 2]]
    assert all(found["again"]["made"] for found in (first, second))
    assert "rank 0 has died. Start all again" in second["no-more"]["error"]


def test_the_main_process_too_may_die(folder, launch, alone):
    """Although the launcher's store lives in it."""
    ends = launch(2, "mainless:kill=0")
    assert [end.code for end in ends] == [-signal.SIGKILL, 0], ends
    check_same(folder, "mainless", alone[""])
    found = json.loads((folder / "2-1.json").read_text())["mainless"]
    assert found["lost"] == [0] and lasting(found["metrics"]) == lasting(alone[""])
