"""Runs a recipe of three stages in children that are killed or told to stop at any moment, and compares the results.

python tests/support/chain_victim.py FOLDER KILLS SEED       kills and signals at random moments
python tests/support/chain_victim.py FOLDER phases           one signal in each phase of the run
python tests/support/chain_victim.py FOLDER ranks SEED       one of two processes killed, told to stop, killed

A child is a fork of this process, which has imported everything: it is killed while it works, not while it imports.
(The processes of torchrun are ordinary ones.)
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

RECIPE = """\
name: victim
output_dir: run
seed: 3
model:
  tokenizer: tiny
  dtype: float32
  config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 4, num_attention_heads: 4,
           num_key_value_heads: 2, sliding_window: 16}
defaults:
  train: {max_length: 256, max_steps: 6, per_device_train_batch_size: 2, learning_rate: 1e-3, save_steps: 2,
          packing: true}
  evaluate:
    suites:
      - {name: words, source: {generate: {family: words, rows: 6, split: test}}, max_new_tokens: 8, batch_size: 2,
         temperature: 0.7, samples_per_problem: 2}
stages:
  - name: weights
    data: {sources: [{generate: {family: words, rows: 60}}]}
  - name: adapters
    data: {sources: [{generate: {family: words, rows: 30, seed: 1}}]}
    train: {use_peft: true, lora_r: 2, lora_dropout: 0.1}
  - name: others
    data: {sources: [{generate: {family: words, rows: 30, seed: 2}}]}
    train: {use_peft: true, lora_r: 4, lora_dropout: 0.1}
"""
STAGES = ("weights", "adapters", "others")
COMPARED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens")
NUMBERS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}
ENDED = re.compile(r"(^|\n)(sft: )?(interrupted; the same command continues it|.*The same command continues\.)", re.M)
BEGUN = b"begun\n"
LIMIT = 600.0
"""Seconds that no child needs on the busiest machine."""


# ---- what was made ----


def made(run: Path) -> dict[str, Any]:
    """What a whole run has made, without times and places: weights, metrics, samples."""
    found: dict[str, Any] = {}
    for path in sorted([*run.glob("stages/*/final/*.safetensors"), *run.glob("export/*.safetensors")]):
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for stage in STAGES:
        lines = (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()
        found[f"{stage} metrics"] = [[json.loads(line).get(key) for key in COMPARED] for line in lines]
        manifest = json.loads((run / "stages" / stage / "manifest.json").read_text())
        found[f"{stage} counters"] = [manifest["steps"], manifest["counters"]["supervised_tokens"]]
    for path in sorted(run.glob("eval/*/*/samples.jsonl")):
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        keys = ("problem", "sample", "completion", "tokens", "answer", "gold", "verdict")
        rows = [[sample.get(key) for key in keys] for sample in samples if "completion" in sample]
        found[str(path.relative_to(run))] = sorted(rows)
    return found


def differences(run: Path, wanted: dict[str, Any]) -> list[str]:
    """What a run made otherwise than it should."""
    found = made(run)
    return [key for key in sorted(wanted.keys() | found.keys()) if found.get(key) != wanted.get(key)]


# ---- children ----


def start(folder: Path) -> int:
    """A process that gives `sft run` in `folder`; its number. What it says is added to `folder`/said."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(folder)
        from sft.cli.main import main
        from sft.train.interrupt import stop_signals

        # From the first moment on, as if Python had started before the signal: how Python starts isn't the question.
        with stop_signals():
            os.write(2, BEGUN)
            code = main(["run", "--config", "recipe.yaml"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def status_of(pid: int, until: Callable[[], bool] = lambda: False) -> int | None:
    """The exit status of a child (negative: the signal that ended it), or None once `until` holds."""
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)  # bounded: it was killed
    sys.exit(f"a run was still at work after {LIMIT:.0f} seconds")


def strike(folder: Path, number: signal.Signals, until: Callable[[], bool]) -> bool:
    """Start a run, and once `until` holds send it a signal; whether it was still at work. Fails when it ends badly."""
    said = folder / "said"
    before = said.stat().st_size if said.exists() else 0
    pid = start(folder)
    status = status_of(pid, until)
    struck = status is None
    if struck:
        status_of(pid, lambda: said.exists() and said.read_bytes()[before:].startswith(BEGUN))
        os.kill(pid, number)
        status = status_of(pid)
    text = said.read_bytes()[before:].decode(errors="replace")
    if "Traceback" in text:
        sys.exit(f"a traceback in {said}:\n{text[-3000:]}")
    wanted = {0, -number if number == signal.SIGKILL else NUMBERS[number]} if struck else {0}
    if status not in wanted:
        sys.exit(f"{number.name} ended a run with {status}, not one of {sorted(wanted)}:\n{text[-3000:]}")
    if status not in (0, -signal.SIGKILL) and not ENDED.search(text):
        sys.exit(f"{number.name} ended a run that doesn't say so:\n{text[-3000:]}")
    return struck and status != 0


def finish(folder: Path, wanted: dict[str, Any]) -> None:
    """Give the command once more, to its end; what all of them made together is what one makes."""
    status = status_of(start(folder))
    if status != 0:
        sys.exit(f"the last run in {folder} ended with {status}:\n{(folder / 'said').read_text()[-3000:]}")
    wrong = differences(folder / "run", wanted)
    if wrong:
        sys.exit(f"after kills in {folder} these differ: {', '.join(wrong)}")


# ---- when ----


def at_random(root: Path, kills: int, seed: int, wanted: dict[str, Any], seconds: float) -> None:
    """`kills` strikes at random moments, up to six in a folder before it may finish."""
    chance = random.Random(seed)
    done: dict[str, int] = {}
    for number in range(10 * kills):
        folder = root / f"killed-{number}"
        for _ in range(chance.randint(1, 6)):
            kind = chance.choice([*[signal.SIGKILL] * 4, *NUMBERS])
            moment = time.monotonic() + chance.uniform(0.02, 0.9) * seconds
            if sum(done.values()) < kills and strike(folder, kind, functools.partial(_past, moment)):
                done[kind.name] = done.get(kind.name, 0) + 1
        finish(folder, wanted)
        shutil.rmtree(folder)
        print(f"{sum(done.values())} of {kills}", file=sys.stderr, flush=True)
        if sum(done.values()) >= kills:
            break
    print(f"{sum(done.values())} runs ended early ({done}), all continued to the same weights, metrics and samples")


def _past(moment: float) -> bool:
    return time.monotonic() > moment


def moments() -> list[tuple[str, str]]:
    """Phase -> the first file that tells of it."""
    found = [("evaluation of the start", "eval/start/*/*"), ("preparation", "prepared/*")]
    for stage in STAGES:
        found += [
            (f"{stage}: preparation", f"stages/{stage}"),
            (f"{stage}: steps", f"stages/{stage}/metrics.jsonl"),
            (f"{stage}: checkpoint", f"stages/{stage}/checkpoint-4"),
            # One of the two: a signal at the last checkpoint is obeyed after the hand-over.
            (f"{stage}: last checkpoint", f"stages/{stage}/checkpoint-6")
            if stage == "weights"
            else (f"{stage}: hand-over", f"stages/{stage}/*final*"),
            (f"{stage}: evaluation", f"eval/{stage}/*/*"),
        ]
    return [*found, ("export", "*export*"), ("report", "report/*")]


def in_every_phase(root: Path, wanted: dict[str, Any]) -> None:
    """One signal as each phase begins, in one folder: every run goes on from where the one before was stopped."""
    run, struck = root / "phases/run", []
    for index, (phase, pattern) in enumerate(moments()):
        before = set(run.glob(pattern))
        begun = functools.partial(_appeared, run, pattern, before)
        if not before and strike(root / "phases", [*NUMBERS][index % 3], begun):
            struck.append(phase)
    finish(root / "phases", wanted)
    print(f"stopped in {len(struck)} phases, all continued to the same weights, metrics and samples: {struck}")


def _appeared(run: Path, pattern: str, before: set[Path]) -> bool:
    return not before.issuperset(run.glob(pattern))


# ---- two processes ----


def launch(folder: Path) -> subprocess.Popen[bytes]:
    """`sft run` in `folder` with two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sft"]
    with open(folder / "said", "ab") as said:
        return subprocess.Popen(
            [*command, "run", "--config", "recipe.yaml"], cwd=folder, stdout=said, stderr=subprocess.STDOUT
        )


def children_of(parent: int) -> list[int]:
    """The processes that a process has started, oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(stat.parent.name))
    return sorted(found)


def of_two(root: Path, seed: int) -> None:
    """Kill one of two processes, tell the other to stop, kill again; then the run is what it would have been."""
    straight = launch(root / "straight")
    if straight.wait(LIMIT) != 0:
        sys.exit((root / "straight/said").read_text()[-3000:])
    wanted = made(root / "straight/run")
    chance, folder = random.Random(seed), root / "struck"
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    for stage, number in zip(STAGES, numbers, strict=True):
        metrics = folder / "run/stages" / stage / "metrics.jsonl"
        launcher, lines = launch(folder), chance.randint(1, 5)
        limit = time.monotonic() + LIMIT
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            if launcher.poll() is not None or time.monotonic() > limit:
                sys.exit(f"two processes didn't get to stage {stage}:\n{(folder / 'said').read_text()[-3000:]}")
            time.sleep(0.002)
        os.kill(children_of(launcher.pid)[chance.randint(0, 1)], number)
        if launcher.wait(LIMIT) == 0:
            sys.exit(f"a launcher took no notice of its process's {number.name}")
    if launch(folder).wait(LIMIT) != 0:
        sys.exit(f"the last run in {folder} failed:\n{(folder / 'said').read_text()[-3000:]}")
    wrong = differences(folder / "run", wanted)
    if wrong:
        sys.exit(f"after kills of one of two processes these differ: {', '.join(wrong)}")
    print("one of two processes was killed, told to stop and killed: the same weights, metrics and samples")


def main() -> None:
    root = Path(sys.argv[1])
    if sys.argv[2] == "ranks":
        of_two(root, int(sys.argv[3]))
        return
    # Everything that a run imports, before the first fork; nothing that starts threads.
    import datasets
    import peft
    import trl

    import sft.evaluate
    import sft.hub.export
    import sft.report
    import sft.run.chain
    import sft.train.trainer

    assert all((datasets, peft, trl, sft.evaluate, sft.hub.export, sft.report, sft.run.chain, sft.train.trainer))
    gc.freeze()  # or every run looks through all of it whenever it collects
    started = time.monotonic()
    if status_of(start(root / "straight")) != 0:
        sys.exit((root / "straight/said").read_text()[-3000:])
    seconds = time.monotonic() - started
    wanted = made(root / "straight/run")
    if sys.argv[2] == "phases":
        in_every_phase(root, wanted)
    else:
        at_random(root, int(sys.argv[2]), int(sys.argv[3]), wanted, seconds)


if __name__ == "__main__":
    main()
