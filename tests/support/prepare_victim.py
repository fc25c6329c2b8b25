"""Prepares one recipe in children that are killed at random moments and continued, and compares what they made.

python tests/support/prepare_victim.py ROWS.jsonl FOLDER KILLS SEED
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from data_toys import byte_tokenizer, stage_of

SHARD_ROWS = 60
STEPS = [
    {"length": {"min_tokens": 40}},
    {"dedup": {"by": "problem", "method": "exact"}},
    {"select": {"rows": 500}},
    {"length": {"max_tokens": 900}},
]


def prepare(source: str, out: Path, workers: int = 1) -> Any:
    """The stage, with small shards so that there is much to be killed in."""
    from sft.data.engine import builder
    from sft.data.prepare import prepare_stage

    builder.SHARD_ROWS = SHARD_ROWS
    train = {"max_length": 1024, "packing": True, "dataset_num_proc": workers}
    data = {"steps": STEPS, "max_bad_fraction": 1.0}
    recipe = stage_of([{"path": source, "columns": {"prompt": "q", "completion": "a"}}], out, train, data)
    return prepare_stage(recipe, recipe.stages[0], byte_tokenizer())


def hashes(out: Path) -> str:
    """One hash over the content of every file of rows that was made."""
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.suffix in (".parquet", ".arrow") and "tokenizers" not in path.parts:
            digest.update(str(path.relative_to(out)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def child(source: str, out: Path) -> int:
    """A process that prepares; its number."""
    pid = os.fork()
    if pid == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        prepare(source, out)
        os._exit(0)
    return pid


def main() -> None:
    """Kill, continue, kill again ... and at the end compare with a run that nobody killed."""
    source, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    # Imported and used once before the first fork, so that children die while they work and not while they import.
    started = time.monotonic()
    prepare(source, folder / "warm")
    started = time.monotonic()
    prepare(source, folder / "straight")
    seconds = time.monotonic() - started
    wanted, chance = hashes(folder / "straight"), random.Random(seed)
    done, begun = 0, 0
    while done < kills:
        out = folder / f"killed-{begun}"
        begun += 1
        for _ in range(3):  # the same folder is killed up to three times before it may finish
            pid = child(source, out)
            time.sleep(chance.uniform(0.02, 0.8) * seconds)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)  # bounded: it was killed
            done += os.WIFSIGNALED(status)
        signal.alarm(int(600 + 60 * seconds))  # nothing here waits for ever: it ends this process
        _, status = os.waitpid(child(source, out), 0)  # bounded: by the alarm
        signal.alarm(0)
        if status != 0 or hashes(out) != wanted:
            sys.exit(f"after kills in {out} the rows differ (status {status})")
        if list(out.rglob(".*.tmp")):
            sys.exit(f"temporary files were left in {out}")
        shutil.rmtree(out)
    print(f"{done} runs killed, all continued to the same rows: {wanted}")


if __name__ == "__main__":
    main()
