"""`sft launch`: another command on the nodes of a cluster."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sft.cli.common import file_path, positive, recipe_and_keys, whole
from sft.utils.errors import UsageError, UserError
from sft.utils.files import write_text
from sft.utils.say import say

TAKES_OVERRIDES = True
STARTED = ("run", "train", "eval", "sweep")
SAVING = 600
"""Seconds before the time limit at which a run saves, where nothing else is told."""
SECONDS = 60
"""How long sbatch may take to answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which kind of script, what the cluster is to give, and what is done with the script."""
    parser.usage = "sft launch --slurm | --torchrun | --hostfile FILE [options] -- run RECIPE [options]"
    parser.epilog = f"after -- stands the command: one of {', '.join(STARTED)}, as it would be given here"
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--slurm", action="store_true", help="a script for sbatch")
    kind.add_argument("--torchrun", action="store_true", help="a script for each node, that starts torchrun")
    kind.add_argument("--hostfile", metavar="FILE", help="a script that starts the hosts of FILE, one a line, over ssh")
    parser.add_argument("--nodes", type=positive, metavar="N", help="how many machines (default: 1, or the file's)")
    text = "GPUs of each machine, one process each (default: what it has); 0: one process on the CPU"
    parser.add_argument("--gpus_per_node", "--gpus-per-node", type=_count, metavar="G", help=text)
    text = "Slurm: cores of each machine (default: 4 for each of --gpus_per_node)"
    parser.add_argument("--cores_per_node", "--cores-per-node", type=positive, metavar="C", help=text)
    parser.add_argument("--time", metavar="TIME", help="Slurm's time limit, such as 24:00:00 or 2-00:00:00")
    for option, text in (("partition", "Slurm's partition"), ("account", "Slurm's account")):
        parser.add_argument(f"--{option}", metavar="NAME", help=text)
    parser.add_argument("--name", metavar="NAME", help="the job's name (default: the recipe's)")
    text = "seconds before the time limit at which the run saves and stops, to be queued again (default: 600)"
    parser.add_argument("--saving", type=positive, metavar="S", help=text)
    text = "a line of shell before the command on each node, such as 'module load cuda'"
    parser.add_argument("--setup", metavar="LINE", help=text)
    text = "one more line of #SBATCH, such as --option mem=0 (again: and this one)"
    parser.add_argument("--option", action="append", default=[], metavar="OPTION", help=text)
    parser.add_argument("--no_requeue", action="store_true", help="don't queue the job again when its time is over")
    parser.add_argument("--out", type=file_path, metavar="FILE", help="write the script there in place of printing it")
    parser.add_argument("--submit", action="store_true", help="start it: by sbatch, or here (--torchrun, --hostfile)")


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Check the command, then print its script, write it, or start it."""
    words = overrides[1:] if overrides[:1] == ["--"] else overrides
    name = _check_command(words)
    _check_options(arguments)
    script = _script(arguments, words, name if arguments.name is None else arguments.name)
    arguments.told.update(script=script)
    if arguments.out:
        write_text(Path(arguments.out), script)
        arguments.told.update(file=arguments.out)
        say(f"script: {arguments.out}")
    elif not arguments.submit:
        print(script, end="")
    return _submit(arguments, script) if arguments.submit else 0


def _count(text: str) -> int:
    number = whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {number}")
    return number


def _check_command(words: list[str]) -> str:
    """A name for the job, after the recipe's. Raises UsageError for a command that isn't started so, or is wrong."""
    from sft.cli.main import parsed

    if not words or words[0] not in STARTED:
        found = f"not {words[0]!r}" if words else "and here is nothing"
        raise UsageError(f"after -- stands a command, one of {', '.join(STARTED)}, {found}; see `sft launch --help`")
    _, arguments, rest = parsed(words)
    if arguments.num_processes is not None:
        raise UsageError("--num_processes is for the launcher to say: set --gpus_per_node")
    config, keys = recipe_and_keys(arguments.config, rest)
    if config is None and words[0] == "eval":
        return "sft-eval"
    if config is None:
        raise UsageError("no recipe is named: a file, or a name from `sft recipes`; see `sft run --help`")
    if words[0] == "sweep":
        from sft.recipe.grid import load_grid

        return _as_name(load_grid(config, keys).points[0].recipe.name)
    from sft.cli.common import recipe_of

    return _as_name(recipe_of(arguments, rest).name)


def _as_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "sft"


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.hostfile and arguments.saving:
        raise UsageError("--saving has no effect with --hostfile, which sets no time limit: leave it out")
    if not arguments.slurm:
        told = {"time": arguments.time, "partition": arguments.partition, "account": arguments.account}
        told |= {
            "cores_per_node": arguments.cores_per_node,
            "option": arguments.option,
            "no_requeue": arguments.no_requeue,
        }
        for name, value in told.items():
            if value not in (None, [], False):
                raise UsageError(f"--{name} has no effect without --slurm: leave it out")


def _script(arguments: argparse.Namespace, words: list[str], name: str) -> str:
    from sft.run.scripts import Job, check_job, hosts_script, read_hosts, slurm_script, torchrun_script

    hosts = read_hosts(Path(arguments.hostfile)) if arguments.hostfile else []
    nodes, gpus = arguments.nodes or len(hosts) or 1, arguments.gpus_per_node
    if hosts:
        if nodes > len(hosts):
            raise UsageError(f"--nodes {nodes}, but --hostfile {arguments.hostfile} names {len(hosts)} hosts")
        hosts = hosts[:nodes]
        counts = {count for _, count in hosts} if gpus is None else {gpus}
        if len(counts) > 1:
            raise UsageError(f"the hosts of {arguments.hostfile} don't have as many slots each: set --gpus_per_node")
        gpus = next(iter(counts), None)
    if words[0] == "sweep" and nodes > 1:
        raise UsageError(f"a sweep runs on one machine, not on {nodes}: leave --nodes out")
    job = Job(
        words=words,
        folder=Path.cwd(),
        nodes=nodes,
        gpus=gpus,
        cores=arguments.cores_per_node or (4 * gpus if gpus else None),
        name=name,
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        saving=arguments.saving or SAVING,
        setup=arguments.setup,
        extra=arguments.option,
        requeue=not arguments.no_requeue,
    )
    check_job(job)
    if arguments.slurm:
        return slurm_script(job)
    return hosts_script(job, [host for host, _ in hosts]) if hosts else torchrun_script(job)


def _submit(arguments: argparse.Namespace, script: str) -> int:
    """Start a script; its exit status. Slurm has taken it when that is 0, which says nothing of its end."""
    command = ["sbatch"] if arguments.slurm else ["bash", "-c", script]
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} isn't here: submit where it is, or take the script that `sft launch` prints")
    if not arguments.slurm:
        if arguments.json:
            raise UsageError("--json has no effect on what --submit starts here, which speaks for itself: leave it out")
        sys.stdout.flush()
        os.execvp(command[0], command)
    done = subprocess.run(command, input=script, text=True, capture_output=True, timeout=SECONDS)
    if done.returncode:
        raise UserError(f"sbatch refused the script: {done.stderr.strip() or f'status {done.returncode}'}")
    arguments.told.update(submitted=done.stdout.strip())
    print(done.stdout.strip())
    return 0
