"""Rank 0 decides: its answer or its error is every rank's, and no rank waits for one that went another way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("decisions")
    ends = run_ranks("decisions_worker.py", str(folder), limit=90)
    assert [end.code for end in ends] == [0, 0], ends
    return [json.loads((folder / f"2-{rank}.json").read_text()) for rank in (0, 1)]


def test_rank_0_alone_runs_it_and_all_get_its_answer(answers):
    assert [answer["size"] for answer in answers] == [[0, 2, True], [1, 2, False]]
    assert [answer["value"] for answer in answers] == [{"from": 0}] * 2
    assert [answer["calls"] for answer in answers] == [[0], []]
    assert [answer["slow"] for answer in answers] == ["slow"] * 2
    assert [answer["after all that"] for answer in answers] == ["in step"] * 2


@pytest.mark.parametrize(
    "number, expected",
    enumerate(
        [
            ["UserError", "a user's", {}],
            ["UsageError", "the recipe's", {}],
            ["Interrupted", "stopped", {"exit_code": 143}],
            ["FileNotFoundError", "[Errno 2] No such file", {}],
            ["Odd", "odd 3", {"second": 3}],
            ["KeyboardInterrupt", "", {}],
        ]
    ),
)
def test_an_error_of_rank_0_is_every_rank_s(answers, number, expected):
    assert answers[0][f"error {number}"] == expected
    kind, text, attributes = expected
    assert answers[1][f"error {number}"] == [kind, text, {**attributes, "from_rank": 0}]


def test_an_error_that_can_t_travel_comes_by_name_and_text(answers):
    assert answers[0]["error 6"] == ["HiddenError", "out of sight", {}]
    assert answers[1]["error 6"] == ["RuntimeError", "HiddenError: out of sight", {"from_rank": 0}]
    assert answers[0]["unpicklable"][0] == answers[1]["unpicklable"][0] == "TypeError"


def test_a_decision_inside_a_decision_is_part_of_it(answers):
    assert [answer["nested"] for answer in answers] == [["inner", "alone", "own"]] * 2


def test_where_one_rank_fails_all_do(answers):
    assert [answer["gather"] for answer in answers] == [["of 0", "of 1"]] * 2
    assert [answer["together"] for answer in answers] == ["of 0", "of 1"]
    assert answers[1]["one fails"] == ["UsageError", "rank 1's", {}]
    assert answers[0]["one fails"] == ["UsageError", "rank 1's", {"from_rank": 1}]
    assert [answer["both fail"][1] for answer in answers] == ["rank 0's", "rank 1's"]


def test_a_folder_that_a_rank_doesn_t_share_is_named(answers):
    assert [answer["shared"] for answer in answers] == [None, None]
    for answer in answers:
        kind, text, _ = answer["not shared"]
        assert kind == "UserError" and "isn't shared between the nodes: rank 1 on" in text
        assert answer["left"] == []


def test_a_folder_is_locked_while_any_rank_is_at_work(answers):
    """Where rank 0 dies the others may go on for hours: another command must not begin there."""
    assert [answer["lock"] for answer in answers] == ["busy", "free"]


def test_the_lock_of_the_run_before_is_waited_for(answers):
    """A slower process may hold it for a moment yet when rank 0 begins the next run."""
    assert [answer["lock again"] for answer in answers] == ["free", "free"]


AGAIN = """
import json, os, sys
from pathlib import Path
import torch
from sft.utils.distributed import decide, gather, rank, store_of_group

attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
told = [decide(lambda: attempt), gather(attempt)]
for _ in range(2):
    torch.distributed.init_process_group("gloo", store=store_of_group(), rank=rank(), world_size=2)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
if attempt == "0":
    os._exit(3 * rank())
Path(sys.argv[1], str(rank())).write_text(json.dumps(told))
"""


def test_processes_that_are_started_again_take_nothing_from_those_before(tmp_path):
    """torchrun keeps its store: there stand the old decisions, and addresses where nobody listens any more."""
    (tmp_path / "worker.py").write_text(AGAIN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "--max_restarts", "1", str(tmp_path / "worker.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)] == [["1", ["1", "1"]]] * 2


def test_no_process_group_is_needed(answers):
    assert [answer["process group"] for answer in answers] == [False, False]


def test_one_process_pays_nothing(tmp_path):
    worker = Path(__file__).parents[1] / "support/decisions_worker.py"
    subprocess.run([sys.executable, str(worker), str(tmp_path)], check=True, timeout=60)
    answer = json.loads((tmp_path / "1-0.json").read_text())
    assert not answer["torch"]
    assert answer["value"] == {"from": 0} and answer["error 2"] == ["Interrupted", "stopped", {"exit_code": 143}]
    assert answer["lock"] == "free"
    assert answer["gather"] == ["of 0"] and answer["not shared"] is None


def test_a_rank_that_never_answers_is_named(tmp_path):
    """Rank 1 doesn't come: the wait has an end, and says for whom it was."""
    ends = run_ranks("absent_worker.py", limit=60)
    assert ends[0].code == 1 and "Rank 1 hasn't answered rank 0" in ends[0].stderr
