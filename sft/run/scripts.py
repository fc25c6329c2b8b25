"""Scripts that start a command on the nodes of a cluster: for Slurm, for torchrun, and for a list of hosts over ssh.

Each node gets one `sft`, which starts the node's processes (sft.run.launching); but for torchrun, which starts them
itself, and again where it is told to after a failure.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sft.utils.errors import UsageError

MASTER_PORT = 29_400
NCCL = {
    # A collective that hangs ends its process, which the launcher hears of, in place of the job's whole time.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "NCCL_DEBUG": "WARN",
}
LONGEST_SAVING = 65_535
"""Seconds: what Slurm takes at most for a signal before the end."""
TIME = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|unlimited|infinite"
OUT_OF_TIME = 138
"""The status of a run that has saved on SIGUSR1, which Slurm sends before the time is over."""


class Job(NamedTuple):
    """What a script is made of. `words`: those of `sft`. `saving`: seconds before the end in which a run saves."""

    words: Sequence[str]
    folder: Path
    nodes: int = 1
    gpus: int | None = None
    cores: int | None = None
    name: str = "sft"
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    saving: int = 600
    setup: str | None = None
    extra: Sequence[str] = ()
    requeue: bool = True


def check_job(job: Job) -> None:
    """Raise UsageError for what no script could hold as it was meant."""
    if "/" in _one_word(job.name, "--name"):
        raise UsageError(f"--name {job.name!r}: must be a name, not a path")
    if job.setup is not None:
        _one_line(job.setup, "--setup")
    if job.saving > LONGEST_SAVING:
        raise UsageError(f"--saving {job.saving}: must be at most {LONGEST_SAVING} seconds")
    if job.time is not None and _seconds(job.time) <= job.saving:
        raise UsageError(
            f"--time {job.time}: the run saves and stops {job.saving} seconds before its end, so it would never begin: "
            "give it more, or set a smaller --saving"
        )


def slurm_script(job: Job) -> str:
    """An sbatch script: one task a node, SIGUSR1 before the time is over, and queued again where that was the end.

    The signal goes to the tasks alone (no `B:`), whose `sft` saves and ends with 138; bash waits for it.
    """
    lines = ["#!/bin/bash", *(f"#SBATCH --{option}" for option in _slurm_options(job)), "", *_prepared(job), ""]
    cores = f" --cpus-per-task={job.cores}" if job.cores else ""
    lines += ["status=0", f"srun --ntasks-per-node=1{cores} --label {_command(job)} || status=$?"]
    if job.requeue:
        lines += [
            f'if [ "$status" -eq {OUT_OF_TIME} ]; then',
            "  # Everything is saved: the same command goes on.",
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
    return "\n".join([*lines, 'exit "$status"', ""])


def _slurm_options(job: Job) -> Iterator[str]:
    yield f"job-name={job.name}"
    yield f"nodes={job.nodes}"
    yield "ntasks-per-node=1"
    if job.gpus:
        yield f"gpus-per-node={job.gpus}"
    if job.cores:
        yield f"cpus-per-task={job.cores}"
    if job.time is not None:
        yield f"time={job.time}"
    for option, value in (("partition", job.partition), ("account", job.account)):
        if value is not None:
            yield f"{option}={_one_word(value, f'--{option}')}"
    yield f"signal=USR1@{job.saving}"
    if job.requeue:
        yield "requeue"
    yield "open-mode=append"
    yield "output=%x-%j.log"
    for option in job.extra:
        yield _one_line(option.removeprefix("--"), "--option")


def torchrun_script(job: Job) -> str:
    """What is run on each node, by hand or by another scheduler: torchrun, whose nodes meet at MASTER_ADDR.

    It hands SIGUSR1 on, gives a run that saves the time for it, and starts all again after a failure.
    """
    first = "${MASTER_ADDR:?must be the name of the first node}" if job.nodes > 1 else "${MASTER_ADDR:-localhost}"
    options = [
        f"--nnodes={job.nodes}",
        f"--nproc_per_node={'gpu' if job.gpus is None else max(1, job.gpus)}",
        "--rdzv_backend=c10d",
        f'--rdzv_endpoint="{first}:${{MASTER_PORT:-{MASTER_PORT}}}"',
        f"--rdzv_id={shlex.quote(job.name)}",
        "--max_restarts=3",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        f"--shutdown-timeout={job.saving}",
        f"-m sft {shlex.join(job.words)}",
    ]
    lines = ["#!/bin/bash", *(["# On every node: MASTER_ADDR=<the first one> bash <this>"] if job.nodes > 1 else [])]
    lines += [f"cd {shlex.quote(str(job.folder))} || exit 1", *_prepared(job), ""]
    command = " \\\n  ".join([f"exec {shlex.quote(sys.executable)} -m torch.distributed.run", *options])
    return "\n".join([*lines, command, ""])


def hosts_script(job: Job, hosts: Sequence[str]) -> str:
    """A script that starts the command over ssh on each host, hands signals on, and ends when all have.

    ssh hands no signal on: each node's process leaves its number in a file there, for `kill`.
    """
    file = re.sub(r"[^\w.-]+", "-", job.name)
    lines = ["#!/bin/bash", f"run=/tmp/{file}-$$-$RANDOM", "pids=()", f"hosts=({shlex.join(hosts)})"]
    # By lines: a setup that ends with a comment would take what stands behind it along.
    setup = ["{", job.setup, "} || exit 1"] if job.setup else []
    there = [f"cd {shlex.quote(str(job.folder))} || exit 1", *setup, *_exports(job), f"exec {_command(job)}"]
    meet = f"NNODES={len(hosts)} MASTER_ADDR={shlex.quote(_without_user(hosts[0]))} MASTER_PORT={MASTER_PORT}"
    lines += [
        "command=" + shlex.quote("\n".join(there)),
        "hand_on() {",
        '  for host in "${hosts[@]}"; do ssh -n -o BatchMode=yes "$host" "kill -s $1 \\$(cat $run)"; done',
        "}",
        "trap 'hand_on TERM' TERM HUP",
        "trap 'hand_on INT' INT",
        "trap 'hand_on USR1' USR1",
        'for node in "${!hosts[@]}"; do',
        f'  started="export NODE_RANK=$node {meet}; echo \\$\\$ > $run; $command"',
        '  ssh -n -o BatchMode=yes "${hosts[$node]}" "$started" &',
        "  pids+=($!)",
        "done",
        "status=0",
        'for pid in "${pids[@]}"; do',
        "  # A signal ends a wait: those that save are waited for again.",
        '  while :; do wait "$pid"; ended=$?; kill -0 "$pid" 2>/dev/null || break; done',
        '  if [ "$status" -eq 0 ]; then status=$ended; fi',
        "done",
        'exit "$status"',
        "",
    ]
    return "\n".join(lines)


def read_hosts(path: Path) -> list[tuple[str, int | None]]:
    """The hosts of a file, one a line, as `host`, `host slots=8` or `host:8`; the number is that of its GPUs.

    `host` is what ssh takes, `user@host` too.

    Raises UsageError for a file that isn't there, is empty or says something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--hostfile {path} can't be read: {error}") from error
    found: list[tuple[str, int | None]] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host, _, count = words[0].rpartition(":") if ":" in words[0] else (words[0], "", "")
        if len(words) == 2 and words[1].startswith("slots=") and not count:
            count = words[1].removeprefix("slots=")
        elif len(words) > 1:
            raise UsageError(f"{path}:{number}: a line is `host`, or `host slots=8`, not {line.strip()[:80]!r}")
        if not host or host.startswith("-") or (count and not (count.isdecimal() and int(count))):
            raise UsageError(f"{path}:{number}: a line is `host`, or `host slots=8`, not {line.strip()[:80]!r}")
        found.append((host, int(count) if count else None))
    if not found:
        raise UsageError(f"--hostfile {path} names no host")
    if len({_without_user(host) for host, _ in found}) < len(found):
        raise UsageError(f"--hostfile {path} names a host twice")
    return found


def _without_user(host: str) -> str:
    """The machine of what ssh is given, which may name who logs in there."""
    return host.rpartition("@")[2]


def _prepared(job: Job) -> Iterator[str]:
    """What stands before the command."""
    if job.setup:
        yield job.setup
    yield from _exports(job)


def _exports(job: Job) -> Iterator[str]:
    for name, value in NCCL.items() if job.gpus != 0 else ():
        yield f"export {name}={value}"


def _command(job: Job) -> str:
    """`sft` of this environment, with the processes of a node where they are told."""
    processes = [] if job.gpus is None else ["--num_processes", str(max(1, job.gpus))]
    return shlex.join([sys.executable, "-P", "-m", "sft", *job.words, *processes])


def _one_line(text: str, option: str) -> str:
    if "\n" in text or not text.strip():
        raise UsageError(f"{option} {text!r}: must be one line of text")
    return text


def _one_word(text: str, option: str) -> str:
    if text.split() != [text] or "#" in text:
        raise UsageError(f"{option} {text!r}: must be one word")
    return text


def _seconds(time: str) -> float:
    """How long sbatch takes a time limit for (https://slurm.schedmd.com/sbatch.html, --time)."""
    if not re.fullmatch(TIME, time, re.ASCII | re.IGNORECASE):
        forms = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, or days-hours:minutes:seconds"
        raise UsageError(f"--time {time!r}: must be {forms}")
    if not time[0].isdigit():
        return math.inf
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not days and len(parts) < 3:
        parts = [0, *parts]  # minutes come first
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
