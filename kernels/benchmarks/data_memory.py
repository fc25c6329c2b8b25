"""Peak memory of a whole preparation as the number of rows grows: it should not.

python kernels/benchmarks/data_memory.py [--rows 10000 100000 1000000] [--workers 2] [--tokenizer FOLDER]

Each size runs in a process of its own: read, lengths, quality, near-duplicates, decontamination, selection, packing.
Printed are the largest resident set of that process and of its workers, without pages of files that are only mapped.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

STEPS = [
    {"length": {"min_tokens": 20}},
    {"quality": {"think": "optional"}},
    {"dedup": {"by": "problem"}},
    {"decontaminate": {"against": [{"name": "held-out", "path": "HELD_OUT"}]}},
    {"select": {"tokens": 10_000_000, "per_problem": 2}},
]
NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hal")
THINGS = ("apples", "books", "coins", "drums", "eggs", "flags", "grapes", "hats")


def make_rows(path: Path, rows: int, seed: int) -> None:
    """Word problems of a few shapes; about one in fifty is a copy."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as handle:
        for _ in range(rows):
            name, thing = chance.choice(NAMES), chance.choice(THINGS)
            first, second = chance.randint(2, 5000), chance.randint(2, 5000)
            problem = (
                f"{name} has {first} {thing} and finds {second} more on day {chance.randint(1, 365)}. How many now?"
            )
            steps = " ".join(f"Count to {chance.randint(1, 99)}." for _ in range(chance.randint(3, 30)))
            handle.write(json.dumps({"problem": problem, "solution": f"{steps} It is {first + second}."}) + "\n")


def anonymous(process: int) -> int:
    """Bytes of a process's own memory: resident, without mapped files."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line
    )
    return int(fields["RssAnon"].split()[0]) * 1024


def children_of(process: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children_of(int(child))]
    return found


def watch(process: int, peaks: dict[str, int], stop: threading.Event) -> None:
    """Note the largest memory of a process and of the largest of its children, until `stop`."""
    while not stop.wait(0.1):
        try:
            peaks["main"] = max(peaks["main"], anonymous(process))
            for child in children_of(process):
                peaks["worker"] = max(peaks["worker"], anonymous(child))
        except (OSError, KeyError):  # it ended while it was looked at
            continue


def prepare(source: str, folder: str, workers: int, tokenizer: str) -> None:
    """One preparation, in this process."""
    from sft.data.prepare import prepare_stage
    from sft.recipe.schema import Recipe
    from sft.tokenizers.load import load_tokenizer

    text = json.dumps(STEPS).replace("HELD_OUT", f"{folder}/held-out.jsonl")
    data = {"sources": [{"path": source}], "steps": json.loads(text)}
    train = {"max_length": 4096, "packing": True, "dataset_num_proc": workers}
    recipe = Recipe.model_validate(
        {
            "name": "memory",
            "output_dir": f"{folder}/out",
            "model": {"tokenizer": tokenizer, "config": {}},
            "stages": [{"name": "s", "data": data, "train": train}],
        }
    )
    done = prepare_stage(recipe, recipe.stages[0], load_tokenizer(tokenizer))
    print(json.dumps({"kept": done.manifest["funnel"]["kept"], "packs": done.manifest["packs"]}))


def measure(rows: int, workers: int, tokenizer: str) -> None:
    """Prepare `rows` rows in a process of its own and print its peaks."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        make_rows(source, rows, 0)
        held_out = [{"problem": f"In how many ways can {n} knights sit at a round table?"} for n in range(200)]
        (Path(folder) / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
        command = [sys.executable, __file__, "--one", str(source), folder, str(workers), tokenizer]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peaks, stop = {"main": 0, "worker": 0}, threading.Event()
        watcher = threading.Thread(target=watch, args=(process.pid, peaks, stop))
        watcher.start()
        out, _ = process.communicate(timeout=3600)
        stop.set()
        watcher.join(60)
        if process.returncode:
            sys.exit(process.returncode)
        seconds = time.perf_counter() - started
        print(
            f"{rows:9,} rows: main {peaks['main'] / 2**20:6,.0f} MiB, worker {peaks['worker'] / 2**20:6,.0f} MiB, "
            f"{seconds:6.1f} s, {rows / seconds:8,.0f} rows/s; {out.strip().splitlines()[-1]}",
            flush=True,
        )


def main() -> None:
    """Each size in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", default="tiny", help="folder of a fast tokenizer (default: the built-in one)")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        source, folder, workers, tokenizer = arguments.one
        prepare(source, folder, int(workers), tokenizer)
        return
    for rows in arguments.rows:
        measure(rows, arguments.workers, arguments.tokenizer)


if __name__ == "__main__":
    main()
