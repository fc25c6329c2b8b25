"""Evaluations of a tiny model on this rank: `python evaluation_worker.py FOLDER DATA CASES`; what came out, as JSON.

A case is a folder's name, for the results, and what happens meanwhile: `NAME`, `NAME:slow`, `NAME:kill=RANKS` (while
they answer), `NAME:end=RANKS` (killed while they sum up), ...
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sft.evaluate import runner
from sft.utils.distributed import barrier, lost_ranks, rank, world_size

TESTS = Path(__file__).parents[1]
BEFORE_KILL = 5
"""Answers that a process records before it is killed."""


def helper() -> Any:
    """The module with the tiny model."""
    path = TESTS / "unit/evaluate/chat_model_for_evaluation.py"
    spec = importlib.util.spec_from_file_location("chat_model_for_evaluation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section_of(data: Path, event: str) -> Any:
    """One suite; two of them, or one with fewer problems than there are processes."""
    toys = helper()
    section = toys.make_section(data)
    if event == "two":
        section.suites.append(section.suites[0].model_copy(update={"name": "more", "seed": 8, "temperature": 0.5}))
    if event == "few":
        section.suites[0] = section.suites[0].model_copy(update={"max_problems": 1, "samples_per_problem": 24})
    return section


def meet(folder: Path) -> None:
    """Wait until all processes have begun: on a busy machine one might be done before."""
    folder.with_name(f"{folder.name}.begun-{rank()}").touch()
    deadline = time.monotonic() + 120
    while len(list(folder.parent.glob(f"{folder.name}.begun-*"))) < world_size() - len(lost_ranks()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def evaluated(folder: Path, data: Path, event: str) -> dict[str, Any]:
    """The metrics of one case, how many answers this process made, and what progress it saw."""
    import torch

    toys, (what, _, which) = helper(), event.partition("=")
    tokenizer = toys.make_tokenizer()
    model = toys.make_model(len(tokenizer))
    if what == "broken" and rank() == 1:
        with torch.no_grad():
            model.lm_head.weight[:] = float("nan")
    made, seen = [], []
    original = runner._Recorder.add

    def add(recorder: Any, task: Any, ids: list[int], finished: bool) -> None:
        if not made and what != "broken":
            meet(folder)
        made.append(task.number)
        time.sleep(0.15 if what == "slow" and rank() == 1 else 0.02)
        original(recorder, task, ids, finished)

    def progress(suite: str, done: int, total: int, right: int) -> None:
        seen.append((suite, done, total, right))
        own = list(folder.glob(f"*/samples-{rank():05}.jsonl"))
        if what == "kill" and str(rank()) in which and own and own[0].read_bytes().count(b"\n") >= BEFORE_KILL:
            os.kill(os.getpid(), signal.SIGKILL)

    def summarize(samples: Any) -> Any:
        if what == "end" and str(rank()) in which:
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics_of(samples)

    metrics_of = runner.summarize
    with patch.object(runner._Recorder, "add", add), patch.object(runner, "summarize", summarize):
        metrics = runner.evaluate(
            model,
            tokenizer,
            section_of(data, event),
            prompt_defaults=None,
            out_dir=folder,
            point="start",
            model_key="tiny",
            progress=progress,
        )
    return {"metrics": metrics, "made": made, "seen": seen, "lost": sorted(lost_ranks())}


def main() -> None:
    folder, data = Path(sys.argv[1]), Path(sys.argv[2])
    results: dict[str, Any] = {}
    for case in sys.argv[3:]:
        name, _, event = case.partition(":")
        try:
            results[name] = evaluated(folder / name, data, event)
        except Exception as error:
            results[name] = {"error": str(error), "from": getattr(error, "from_rank", None)}
        (folder / f"{world_size()}-{rank()}.json").write_text(json.dumps(results))
    if not lost_ranks():
        barrier()


if __name__ == "__main__":
    main()
