"""How many processes a command is to have, and where: told on the command line, by the cluster, or by the GPUs here.

The variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) are those of one
process; without LOCAL_RANK, NODE_RANK (or RANK) and NNODES (or WORLD_SIZE) are a node's, whose processes are started
here. srun tells the same in words of its own (https://slurm.schedmd.com/srun.html, "output environment variables").
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from glob import glob
from typing import NamedTuple

from sft.utils.distributed import world_size
from sft.utils.errors import UsageError

DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
"""What a machine with a GPU has (NVIDIA's, AMD's, WSL's): without one, torch isn't loaded to count them."""

PORTS = range(20_000, 50_000)
"""MASTER_PORT of a Slurm job that names none is one of these, by the job's number."""


class Placement(NamedTuple):
    """The processes of a command: `local` on each of `nodes`, of which this is `node`; they meet at address:port, where
    the port 0 is any that is free."""

    local: int
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0


def placement(asked: int | None, environ: MutableMapping[str, str] = os.environ) -> Placement | None:
    """The processes that this command is to start; None: it is one of them, or the only one, and does the work itself.

    `asked`: `--num_processes`, the processes of this machine. A task of srun gets torchrun's variables in `environ`,
    and the only process loses those of its node.
    Raises UsageError where what was told on the command line, by a launcher and by the machine doesn't agree.
    """
    _read_srun(environ)
    if "LOCAL_RANK" in environ:
        _check_launched(asked, environ)
        return None
    if "ACCELERATE_MIXED_PRECISION" in environ and asked is None:
        _check_accelerate(environ)
        return None
    gpus = gpu_count()
    if asked is not None and asked > gpus > 0:
        what = f"this machine has {gpus} GPU{'s' if gpus > 1 else ''}, and processes can't share one"
        raise UsageError(f"--num_processes {asked}: {what}; CUDA_VISIBLE_DEVICES= hides them, to run on the CPU")
    where = _of_nodes(asked or max(1, gpus), environ)
    if where is None:
        for name in ("RANK", "WORLD_SIZE"):  # a node's: accelerate would wait for the processes of such a world
            environ.pop(name, None)
    return where


def processes(asked: int | None) -> int:
    """How many processes there would be in all, on all nodes."""
    where = placement(asked)
    return world_size() if where is None else where.nodes * where.local


def gpu_count() -> int:
    """The GPUs that this process may use."""
    if not any(glob(pattern) for pattern in DEVICE_FILES):
        return 0
    import torch

    return torch.cuda.device_count()


def _check_launched(asked: int | None, environ: Mapping[str, str]) -> None:
    world, rank = _number(environ, "WORLD_SIZE", 1), _number(environ, "RANK", 0)
    if not 0 <= rank < world:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE {world}: the launcher's variables don't agree")
    here = _number(environ, "LOCAL_WORLD_SIZE", world)
    if asked is not None and asked != here:
        raise UsageError(
            f"--num_processes {asked}, but a launcher has started {here} on this machine: leave the option out, or the "
            "launcher"
        )


def _check_accelerate(environ: Mapping[str, str]) -> None:
    """accelerate's launcher for one process is what it takes on a CPU, whatever number it was told."""
    if environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or "MASTER_ADDR" in environ:
        raise UsageError(
            "accelerate launch has started one process, as it does on a CPU whatever its num_processes says: start "
            "`sft` without it, with --num_processes N (or with --num_processes 1, if one is meant)"
        )


def _of_nodes(local: int, environ: Mapping[str, str]) -> Placement | None:
    key = "NODE_RANK" if "NODE_RANK" in environ else "RANK"
    if key not in environ or not ({"NNODES", "WORLD_SIZE"} & environ.keys()):
        _refuse_part_of_job(environ)
        _refuse_half(local, environ)
        return Placement(local) if local > 1 else None
    node = _number(environ, key, 0)
    nodes = _number(environ, "NNODES", 0) or _number(environ, "WORLD_SIZE", 1)
    if key == "NODE_RANK" and "NNODES" not in environ:
        # Beside a node's rank the world is one of processes.
        world, nodes = nodes, nodes // local
        if nodes * local != world:
            raise UsageError(f"WORLD_SIZE is {world}, no multiple of the {local} processes of a node: set NNODES")
    if not 0 <= node < nodes:
        raise UsageError(f"{key} is {node} of {nodes} nodes: count them from 0, and set NNODES to their number")
    if nodes == 1:
        return Placement(local) if local > 1 else None
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise UsageError(f"{missing[0]} isn't set: {nodes} nodes meet at MASTER_ADDR:MASTER_PORT, the first one's")
    port = _number(environ, "MASTER_PORT", 0)
    if port not in range(1, 65_536):
        raise UsageError(
            f"MASTER_PORT is {environ['MASTER_PORT']}: set it to a port, from 1 to 65535, alike on all nodes"
        )
    return Placement(local, nodes, node, environ["MASTER_ADDR"], port)


def _refuse_half(local: int, environ: Mapping[str, str]) -> None:
    """One of a node's two numbers: the command would run on this node alone, and so would each other node's."""
    for key in ("NODE_RANK", "RANK"):
        if node := _number(environ, key, 0):
            raise UsageError(f"{key} is {node}, and NNODES isn't set: set it to the number of nodes, or unset {key}")
    for key, alone in (("NNODES", {1}), ("WORLD_SIZE", {1, local})):
        if key in environ and (count := _number(environ, key, 1)) not in alone:
            raise UsageError(f"{key} is {count}, and NODE_RANK isn't set: set it to this node's number, or unset {key}")


def _refuse_part_of_job(environ: Mapping[str, str]) -> None:
    """A job's script runs on the first of its nodes alone."""
    nodes = _number(environ, "SLURM_JOB_NUM_NODES", 1)
    if nodes > 1 and "SLURM_STEP_ID" not in environ:
        raise UsageError(
            f"this Slurm job has {nodes} nodes, and the command would run on one: start it by `srun "
            "--ntasks-per-node=1` (`sft launch --slurm` writes such a script)"
        )


# ---- srun ----


def _read_srun(environ: MutableMapping[str, str]) -> None:
    """Torchrun's variables for a task of several that srun started; a node's, where it is alone on its node."""
    tasks, nodes = _number(environ, "SLURM_STEP_NUM_TASKS", 1), _number(environ, "SLURM_STEP_NUM_NODES", 1)
    if tasks == 1 or "RANK" in environ or "NODE_RANK" in environ or "LOCAL_RANK" in environ:
        return
    job, node = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_NODEID", 0)
    environ.setdefault("MASTER_ADDR", first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    environ.setdefault("MASTER_PORT", str(PORTS[job % len(PORTS)]))
    if tasks == nodes:
        environ.update(NODE_RANK=str(node), NNODES=str(nodes))
        return
    here = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))
    environ.update(RANK=str(_number(environ, "SLURM_PROCID", 0)), WORLD_SIZE=str(tasks))
    environ.update(LOCAL_RANK=str(_number(environ, "SLURM_LOCALID", 0)), LOCAL_WORLD_SIZE=str(here[node]))
    environ.setdefault("TORCHELASTIC_RUN_ID", f"slurm-{job}")


def first_host(nodes: str) -> str:
    """The first of a list as Slurm writes it: `gpu[003-005,9],login` is gpu003."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found[0] if found else nodes)


def tasks_per_node(text: str) -> list[int]:
    """`4(x2),3` as [4, 4, 3]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise UsageError(f"{name} is {text[:40]!r} where a whole number belongs: unset it, or correct it")
    return int(text) if text else default
