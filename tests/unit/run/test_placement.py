"""How many processes a command is to have: the command line, a launcher, the cluster and the machine have to agree."""

from __future__ import annotations

import pytest

from sft.run import placement as module
from sft.run.placement import Placement, first_host, placement, tasks_per_node
from sft.utils import distributed
from sft.utils.errors import UsageError

MEET = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[03-04,9]", "SLURM_NODEID": "1"}
PER_NODE = {**STEP, "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NUM_NODES": "3", "SLURM_PROCID": "1"}
PER_GPU = {**STEP, "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
PER_GPU |= {"SLURM_STEP_TASKS_PER_NODE": "4,2(x2)"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}


@pytest.fixture
def gpus(monkeypatch):
    return lambda count: monkeypatch.setattr(module, "gpu_count", lambda: count)


@pytest.mark.parametrize(
    ("asked", "gpus_here", "environ", "expected"),
    [
        (None, 0, {}, None),
        (None, 1, {}, None),
        (None, 8, {}, Placement(8)),
        (1, 8, {}, None),
        (3, 8, {}, Placement(3)),
        (2, 0, {}, Placement(2)),
        # A launcher has started this one; with one process of accelerate's, one is meant.
        (None, 8, {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "8"}, None),
        (8, 8, {"LOCAL_RANK": "1", "RANK": "9", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, None),
        (None, 8, ACCELERATE, None),
        (2, 0, {**ACCELERATE, "ACCELERATE_USE_CPU": "True"}, Placement(2)),
        (1, 0, {**ACCELERATE, "ACCELERATE_USE_CPU": "True"}, None),
        # Nodes.
        (None, 8, {"NODE_RANK": "1", "NNODES": "2", **MEET}, Placement(8, 2, 1, "n0", 29500)),
        (4, 0, {"NODE_RANK": "1", "WORLD_SIZE": "8", **MEET}, Placement(4, 2, 1, "n0", 29500)),
        (None, 8, {"RANK": "1", "WORLD_SIZE": "2", **MEET}, Placement(8, 2, 1, "n0", 29500)),
        (None, 0, {"RANK": "0", "WORLD_SIZE": "2", **MEET}, Placement(1, 2, 0, "n0", 29500)),
        (None, 2, {"NODE_RANK": "0", "NNODES": "1"}, Placement(2)),
        # Half of them, that says no more than there is.
        (None, 2, {"NODE_RANK": "0", **MEET}, Placement(2)),
        (None, 2, {"NNODES": "1", "WORLD_SIZE": "2"}, Placement(2)),
        (None, 8, PER_NODE, Placement(8, 3, 1, "gpu03", 20077)),
        (None, 8, {**PER_NODE, **MEET}, Placement(8, 3, 1, "n0", 29500)),
        # An allocation's own shell, and `srun --pty`.
        (None, 2, {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "4"}, Placement(2)),
        (None, 2, {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_NUM_NODES": "4"}, Placement(2)),
    ],
)
def test_how_many_and_where(gpus, asked, gpus_here, environ, expected):
    gpus(gpus_here)
    assert placement(asked, dict(environ)) == expected


@pytest.mark.parametrize(
    ("asked", "environ", "words"),
    [
        (4, {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, "--num_processes 4, but a launcher has started 2"),
        (None, {"LOCAL_RANK": "0", "RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        (9, {}, "this machine has 8 GPUs"),
        (None, {**ACCELERATE, "ACCELERATE_USE_CPU": "True"}, "accelerate launch has started one process"),
        (None, {**ACCELERATE, **MEET}, "accelerate launch has started one process"),
        (None, {"NODE_RANK": "2", "NNODES": "2", **MEET}, "NODE_RANK is 2 of 2 nodes"),
        (None, {"NODE_RANK": "0", "NNODES": "2"}, "MASTER_ADDR isn't set"),
        (None, {"NODE_RANK": "0", "NNODES": "two", **MEET}, "NNODES is 'two'"),
        (3, {"NODE_RANK": "0", "WORLD_SIZE": "8", **MEET}, "no multiple of the 3 processes"),
        (None, {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}, "this Slurm job has 2 nodes"),
        (None, {"NNODES": "2", **MEET}, "NNODES is 2, and NODE_RANK isn't set"),
        (None, {"WORLD_SIZE": "16", **MEET}, "WORLD_SIZE is 16, and NODE_RANK isn't set"),
        (None, {"NODE_RANK": "1", **MEET}, "NODE_RANK is 1, and NNODES isn't set"),
        (None, {"RANK": "1"}, "RANK is 1, and NNODES isn't set"),
        (None, {"NODE_RANK": "0", "NNODES": "2", **MEET, "MASTER_PORT": "99999999"}, "MASTER_PORT is 99999999: set it"),
        (None, {"NODE_RANK": "0", "NNODES": "2", **MEET, "MASTER_PORT": "0"}, "MASTER_PORT is 0: set it"),
    ],
)
def test_what_does_not_agree_is_refused(gpus, asked, environ, words):
    gpus(8)
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        placement(asked, dict(environ))


def test_a_task_of_srun_for_each_process_gets_torchrun_s_variables(gpus):
    gpus(8)
    environ = dict(PER_GPU)
    assert placement(None, environ) is None
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    told |= {"MASTER_ADDR": "gpu03", "MASTER_PORT": "20077", "TORCHELASTIC_RUN_ID": "slurm-77"}
    assert {name: environ.get(name) for name in told} == told


@pytest.mark.parametrize(("local", "rank", "world"), [(None, 0, 1), ("1", 9, 16)])
def test_without_a_local_rank_the_numbers_are_a_node_s(monkeypatch, local, rank, world):
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("MASTER_ADDR", "n0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (rank, world, rank == 0)


def test_a_process_that_is_alone_keeps_no_numbers_of_its_node(gpus):
    """accelerate reads WORLD_SIZE without a LOCAL_RANK, too, and would wait for the others."""
    gpus(8)
    environ = {"NODE_RANK": "0", "NNODES": "1", "RANK": "0", "WORLD_SIZE": "8"}
    assert placement(1, environ) is None and not {"RANK", "WORLD_SIZE"} & environ.keys()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-005,9],login", "gpu003"), ("r[1-2]n[07,9]", "r1n07"), ("a-[2]", "a-2")],
)
def test_the_first_of_slurm_s_nodes(nodes, first):
    assert first_host(nodes) == first


def test_slurm_s_tasks_per_node():
    assert tasks_per_node("4(x2),3") == [4, 4, 3] and tasks_per_node("8") == [8]
