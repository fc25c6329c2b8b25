"""`sft launch`: scripts that bash takes, that hand on what they are told, and end as the run does."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from sft.cli.main import main

LIMIT = 60


@pytest.fixture
def script(capsys, tmp_path, monkeypatch):
    """The script of a command line; None where it is refused, whose sentence is in `said`."""
    monkeypatch.chdir(tmp_path)

    def of(*words: str, command: tuple[str, ...] = ("run", "tiny")) -> str:
        status = main(["launch", *words, "--", *command])
        found = capsys.readouterr()
        of.said = found.err
        return found.out if status == 0 else f"status {status}"

    return of


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a program in the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def add(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    return add


def bash(text: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environ}
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=LIMIT, env=environment)


HOSTILE = ("run", "tiny", "--push.commit_message", 'it\'s $HOME `id` "2"')


@pytest.mark.parametrize(
    "command",
    [("run", "tiny"), HOSTILE, ("train", "--config", "tiny"), ("sweep", "tiny", "--defaults.train.seed", "1,2")],
)
@pytest.mark.parametrize("kind", ["--slurm", "--torchrun", "--hostfile"])
def test_bash_takes_it_and_the_words_arrive(script, fake, tmp_path, kind, command):
    (tmp_path / "hosts").write_text("here slots=2\n")
    text = script(*([kind, str(tmp_path / "hosts")] if kind == "--hostfile" else [kind]), command=command)
    assert subprocess.run(["bash", "-n"], input=text, text=True, timeout=LIMIT).returncode == 0
    # Run with an interpreter that only tells what it is given, on a host that is this one.
    fake("told", "printf '%s\\n' \"$@\" > told.txt")
    fake("srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    fake("ssh", 'exec bash -c "${@: -1}"')
    bash(text.replace(shlex.quote(sys.executable), "told"))
    words = (tmp_path / "told.txt").read_text().splitlines()
    place = words.index("sft") + 1
    assert words[place : place + len(command)] == list(command)


def test_slurm_s_own_words(script):
    text = script("--slurm", "--nodes", "4", "--gpus-per-node", "8", "--time", "1-00:00:00", "--option", "mem=0")
    expected = ["nodes=4", "ntasks-per-node=1", "gpus-per-node=8", "cpus-per-task=32", "time=1-00:00:00"]
    expected += ["signal=USR1@600", "requeue", "mem=0", "job-name=tiny"]
    assert {f"#SBATCH --{option}" for option in expected} <= set(text.splitlines())
    assert "--num_processes 8" in text


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (143, False), (138, True)])
def test_a_run_that_was_out_of_time_is_queued_again(script, fake, tmp_path, status, again):
    fake("srun", f"exit {status}")
    fake("scontrol", f"echo $@ > {tmp_path}/queued")
    assert bash(script("--slurm"), SLURM_JOB_ID="7").returncode == status
    assert (tmp_path / "queued").exists() == again
    if again:
        assert (tmp_path / "queued").read_text() == "requeue 7\n"


def test_hosts_get_their_numbers_and_their_signals(script, fake, tmp_path):
    """ssh runs here: each host's process tells what it got, and how it was ended."""
    (tmp_path / "hosts").write_text("# the first has the store\nme@n0 slots=4\n\nn1:4\n")
    home = f"cd {tmp_path}; export HOST=${{@: -2:1}}; HOST=${{HOST#me@}}; mkdir -p $HOST; cd $HOST"
    fake("ssh", home + '; exec bash -c "${@: -1}"')
    fake(
        "worker",
        f"trap 'exit 138' USR1; echo $NODE_RANK/$NNODES $MASTER_ADDR:$MASTER_PORT ${{@: -1}} > {tmp_path}/$HOST/got;"
        " while :; do sleep 0.05; done",
    )
    text = script("--hostfile", str(tmp_path / "hosts")).replace(shlex.quote(sys.executable), "worker")
    text = text.replace("run=/tmp/tiny-", "run=pid-")  # a file of each host's
    process = subprocess.Popen(["bash", "-c", text.replace(f"cd {tmp_path}", "true")])
    deadline = time.monotonic() + LIMIT
    got = [tmp_path / name / "got" for name in ("n0", "n1")]
    while not all(file.is_file() and file.read_text() for file in got) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=LIMIT) == 138
    assert [file.read_text() for file in got] == ["0/2 n0:29400 4\n", "1/2 n0:29400 4\n"]


@pytest.mark.parametrize(
    ("setup", "status", "told"),
    [("export MODULE=cuda  # 12.4", 7, "cuda"), ("export MODULE=a; export MODULE=b", 7, "b"), ("false", 1, None)],
)
def test_what_is_set_up_comes_before_the_command(script, fake, tmp_path, setup, status, told):
    """A comment at its end ends with it, and where it fails nothing is started."""
    (tmp_path / "hosts").write_text("here\n")
    fake("ssh", 'exec bash -c "${@: -1}"')
    fake("worker", f"echo $MODULE > {tmp_path}/told; exit 7")
    text = script("--hostfile", str(tmp_path / "hosts"), "--setup", setup)
    assert bash(text.replace(shlex.quote(sys.executable), "worker")).returncode == status
    found = tmp_path / "told"
    assert (found.read_text().strip() if found.exists() else None) == told


def test_submitting(script, fake, tmp_path):
    fake("sbatch", f"cat > {tmp_path}/taken; echo Submitted batch job 7")
    assert script("--slurm", "--submit") == "Submitted batch job 7\n"
    assert (tmp_path / "taken").read_text() == script("--slurm")
    fake("sbatch", "echo sbatch: error: invalid partition >&2; exit 1")
    assert script("--slurm", "--submit") == "status 1" and "invalid partition" in script.said


@pytest.mark.parametrize("time", ["30", "30:00", "24:00:00", "2-0", "2-00:30", "2-00:00:00", "UNLIMITED"])
def test_slurm_s_forms_of_a_time_limit(script, time):
    assert f"#SBATCH --time={time}\n" in script("--slurm", "--time", time)


def test_a_name_that_a_shell_would_read_is_none_of_its_words(script, fake, tmp_path):
    (tmp_path / "hosts").write_text("here\n")
    fake("ssh", 'exec bash -c "${@: -1}"')
    fake("worker", "exit 7")
    text = script("--hostfile", str(tmp_path / "hosts"), "--name", f"a;touch${{IFS}}{tmp_path.name}'")
    assert bash(text.replace(shlex.quote(sys.executable), "worker")).returncode == 7
    assert not (tmp_path / tmp_path.name).exists()


@pytest.mark.parametrize("time", ["15", "14:60", "0:15:00", "0-0:15", "0-0:14:60"])
def test_a_run_that_would_save_before_it_begins_is_refused(script, time):
    assert script("--slurm", "--time", time, "--saving", "899").count("--signal=USR1@899\n") == 1
    assert script("--slurm", "--time", time, "--saving", "900").startswith("status")
    assert f"--time {time}: the run saves and stops 900 seconds before its end" in script.said


NO_TIMES = ("banana", "", "1h", "1:2:3:4", "2-", "-5", "1:00 ")


@pytest.mark.parametrize(
    ("words", "command", "sentence"),
    [
        (("--slurm",), (), "after -- stands a command"),
        (("--slurm",), ("chat", "tiny"), "not 'chat'"),
        (("--slurm",), ("run", "tiny", "--num_processes", "2"), "set --gpus_per_node"),
        (("--slurm",), ("run", "no-such-recipe"), "no-such-recipe"),
        (("--slurm",), ("run", "tiny", "--seeed", "2"), "seeed"),
        (("--slurm", "--nodes", "2"), ("sweep", "tiny", "--defaults.train.seed", "1,2"), "a sweep runs on one machine"),
        (("--torchrun", "--time", "1:00"), ("run", "tiny"), "--time has no effect without --slurm"),
        (("--hostfile", "no-such"), ("run", "tiny"), "can't be read"),
        (("--slurm", "--partition", "a b"), ("run", "tiny"), "must be one word"),
        (("--hostfile", "hosts", "--saving", "900"), ("run", "tiny"), "--saving has no effect with --hostfile"),
        (
            ("--hostfile", "hosts", "--gpus_per_node", "2", "--name", "my run"),
            ("run", "tiny"),
            "--name 'my run': must be one word",
        ),
        (("--torchrun", "--name", "my run"), ("run", "tiny"), "--name 'my run': must be one word"),
        (("--slurm", "--name", "a/b"), ("run", "tiny"), "--name 'a/b': must be a name, not a path"),
        (("--torchrun", "--name", " a"), ("run", "tiny"), "--name ' a': must be one word"),
        (("--torchrun", "--time", ""), ("run", "tiny"), "--time has no effect without --slurm"),
        (("--torchrun", "--name", ""), ("run", "tiny"), "--name '': must be one word"),
        (("--slurm", "--setup", "a\nb"), ("run", "tiny"), "--setup 'a\\nb': must be one line of text"),
        (("--slurm", "--saving", "99999999"), ("run", "tiny"), "--saving 99999999: must be at most 65535 seconds"),
        (("--hostfile", "hosts"), ("run", "tiny"), "don't have as many slots each: set --gpus_per_node"),
        *((("--slurm", "--time", t), ("run", "tiny"), f"--time {t!r}: must be minutes") for t in NO_TIMES),
        ((), ("run", "tiny"), "one of the arguments --slurm --torchrun --hostfile is required"),
    ],
)
def test_what_can_t_be_started_is_refused(script, tmp_path, words, command, sentence):
    (tmp_path / "hosts").write_text("n0 slots=2\nn1\n")
    assert script(*words, command=command) == "status 2" and sentence in script.said


@pytest.mark.parametrize("text", ["", "# none\n", "n0\nn0\n", "n0 slots=x\n", "n0 gpu 8\n", "-oProxyCommand=id\n"])
def test_a_file_of_hosts_that_says_something_else(script, tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    assert script("--hostfile", str(tmp_path / "hosts")) == "status 2" and "hosts" in script.said
