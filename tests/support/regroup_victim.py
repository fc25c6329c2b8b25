"""A stage of three epochs in groups of one and two processes, killed again and again: what each of its steps consumed.

python tests/support/regroup_victim.py FOLDER kills NUMBER SEED     killed at random places, on 1, 2, 1, ... processes
python tests/support/regroup_victim.py FOLDER engines NAME,...      engines by groups: `2zero2+1none+2zero3`

The processes are forks of this one, which has imported everything. Results go to FOLDER/results.json.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ranks import free_port

LIMIT = 240.0
"""Seconds that no group needs on the busiest machine."""
GRACE = 3.0
"""Seconds that the others get when one is killed, as from a launcher."""
ROWS = 14
STEPS = 12
TRAIN = {"packing": True, "num_train_epochs": 3, "save_steps": 2, "learning_rate": 2e-3, "adam_epsilon": 1e-2}
TRAIN |= {"per_device_train_batch_size": 2, "guard": {"max_skipped": 1, "rollbacks": 1}}
POISON = 7
"""The row whose loss is no number: left out in the first epoch, in the second the stage returns to a checkpoint."""
MICRO_BATCHES = 2
"""Of an optimizer step, whatever number of processes a stage begins with."""
PLACES = ("step begun", "half a step", "step ended", "half a save", "save unmarked", "save ended", "epoch ended")


# ---- a process ----


def train(root: Path, engine: str, attempt: int, killed: tuple[str, int] | None, stop: int | None) -> int:
    """Train as this process of a group, and note what each step took in; the exit code."""
    from train_toys import tiny_sambay, toy_rows, train_toy

    from sft.utils.errors import UserError

    watch(root / f"consumed-{attempt}-{os.environ['RANK']}.jsonl", killed, stop)
    begun_by = json.loads((root / "begun_by").read_text())
    keys = {**TRAIN, "gradient_accumulation_steps": MICRO_BATCHES // begun_by}
    keys |= {} if engine == "none" else {"deepspeed": engine}
    try:
        rows = toy_rows(ROWS, packed=True)
        ids = [list(row) for row in rows.dataset["input_ids"]]
        ids[POISON][0] = 1
        rows.dataset = rows.dataset.remove_columns("input_ids").add_column("input_ids", ids).cast(rows.dataset.features)
        train_toy(root / "run", keys, model=tiny_sambay(), prepared=rows)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def watch(log: Path, killed: tuple[str, int] | None, stop: int | None) -> None:
    """Note the documents of each micro-batch that is run; end this process at a place, or tell it to stop at a step."""
    import torch
    from transformers import Trainer

    import sft.train.trainer as module
    from sft.models import Phi4FlashForCausalLM
    from sft.train.callbacks import StopOnSignal
    from sft.train.memorised import EpochEnds

    trainer = module.SambayTrainer

    def at(place: str, step: int) -> None:
        if killed == (place, step):
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: Any, name: str, hook: Callable[..., None], after: bool = False) -> None:
        original = getattr(owner, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            if not after:
                hook(*args, **kwargs)
            result = original(*args, **kwargs)
            if after:
                hook(*args, **kwargs)
            return result

        setattr(owner, name, function)

    def note(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> None:
        step = self.state.global_step + 1
        if not getattr(self, "_half", False):
            at("step begun", step)
        self._half = not getattr(self, "_half", False)
        begun.append(step)  # and not while the model is probed
        ends = inputs["cu_seq_lens_q"].tolist()
        ids = inputs["input_ids"][0].tolist()
        tokens = int(inputs["num_tokens"])
        documents = [ids[a:b] for a, b in itertools.pairwise(ends) if b <= tokens]
        with open(log, "a") as handle:
            handle.write(json.dumps({"step": step, "documents": documents}) + "\n")

    def stopping(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        at("step ended", state.global_step)
        if state.global_step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    forward, begun = Phi4FlashForCausalLM.forward, []

    @functools.wraps(forward)
    def poisoned(self: Any, input_ids: Any, **more: Any) -> Any:
        outputs = forward(self, input_ids, **more)
        if begun and torch.is_grad_enabled() and (input_ids == 1).any():
            outputs.loss = outputs.loss * float("nan")
        return outputs

    Phi4FlashForCausalLM.forward = poisoned  # type: ignore[method-assign]
    before(trainer, "training_step", note)
    before(trainer, "training_step", lambda self, *a, **k: at("half a step", self.state.global_step + 1), after=True)
    before(StopOnSignal, "on_step_end", stopping)
    before(EpochEnds, "on_step_end", lambda self, args, state, *a, **k: at("epoch ended", state.global_step))
    before(Trainer, "_save_optimizer_and_scheduler", lambda self, *a: at("half a save", self.state.global_step))
    before(module, "write_marker", lambda *a, **k: at("save unmarked", k["step"]))
    before(trainer, "_save_checkpoint", lambda self, *a: at("save ended", self.state.global_step), after=True)


# ---- groups ----


def group(
    root: Path,
    size: int,
    engine: str = "none",
    *,
    killed: tuple[str, int] | None = None,
    victim: int = 0,
    stop: int | None = None,
) -> list[int]:
    """How a group of processes ends, by rank (negative: by that signal). `victim`: whom a kill is for."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "begun_by").exists():
        (root / "begun_by").write_text(str(size))
    attempt, port = len(list(root.glob("consumed-*-0.jsonl"))), free_port()
    (root / f"consumed-{attempt}-0.jsonl").touch()
    pids = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            code = 70
            try:
                said = os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(said, 1)
                os.dup2(said, 2)
                if size > 1 or engine != "none":
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
                    os.environ.update(LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                else:
                    os.environ["RANK"] = "0"
                code = train(root, engine, attempt, killed if rank == victim else None, stop)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return ends(pids)


def ends(pids: Sequence[int]) -> list[int]:
    """The exit statuses of children; those that are left when one has ended badly get a little time yet."""
    found: dict[int, int] = {}
    limit = time.monotonic() + LIMIT
    while len(found) < len(pids):
        for pid in set(pids) - found.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                found[pid] = os.waitstatus_to_exitcode(status)
                if found[pid]:
                    limit = min(limit, time.monotonic() + GRACE)
        if time.monotonic() > limit:
            for pid in set(pids) - found.keys():
                os.kill(pid, signal.SIGKILL)
            limit += LIMIT
        time.sleep(0.01)
    return [found[pid] for pid in pids]


# ---- what was made ----


def consumed(root: Path) -> dict[int, list[list[int]]]:
    """The documents that each step took in, where it was done for good: in the last group that did it."""
    steps: dict[int, dict[int, list[list[int]]]] = {}
    for path in root.glob("consumed-*.jsonl"):
        attempt = int(path.stem.split("-")[1])
        for line in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(line["step"], {}).setdefault(attempt, []).extend(line["documents"])
    return {step: sorted(by_attempt[max(by_attempt)]) for step, by_attempt in sorted(steps.items())}


def made(root: Path) -> dict[str, Any]:
    """What a whole stage comes to, beside its weights."""
    stage = root / "run/stages/one"
    lines = list(map(json.loads, (stage / "metrics.jsonl").read_text().splitlines()))
    told = json.loads((stage / "manifest.json").read_text())
    skipped = (stage / "skipped_rows.jsonl").read_text()
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return {"consumed": consumed(root), "losses": losses, "left_out": told["left_out"], "skipped": skipped}


def at_random(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Stages on 1, 2, 1, ... processes, one of which is killed at a random place, until so many were killed."""
    chance, done, runs, places = random.Random(seed), 0, [], []
    sizes = [size for _ in range(kills) for size in (1, 2)]
    while done < kills:
        folder, struck = root / f"killed-{len(runs)}", 0
        while not (folder / "run/stages/one/manifest.json").exists():
            size = sizes[done % 2]
            place = chance.choice(PLACES), chance.randint(1, STEPS)
            last = struck >= min(6, kills)
            codes = group(folder, size, killed=None if last else place, victim=chance.randrange(size))
            if any(code < 0 for code in codes):
                struck, done = struck + 1, done + 1
                places.append([size, *place])
            elif any(codes):
                sys.exit(f"a group of {size} ended with {codes} in {folder}:\n{(folder / 'said').read_text()[-4000:]}")
        runs.append({"folder": str(folder), "killed": struck, **made(folder)})
    return {"runs": runs, "places": places}


def on_engines(root: Path, names: Sequence[str]) -> dict[str, Any]:
    """Stages that go from engine to engine, stopped after 5 and 8 steps."""
    results = {}
    for name in names:
        folder, stops = root / name, [5, 8, None]
        for word, stop in zip(name.split("+"), stops, strict=True):
            codes = group(folder, int(word[0]), word[1:], stop=stop)
            if codes != [143 if stop else 0] * int(word[0]):
                sys.exit(f"{word} of {name} ended with {codes}:\n{(folder / 'said').read_text()[-6000:]}")
        results[name] = made(folder)
    return results


def main() -> None:
    import deepspeed
    import train_toys

    import sft.train.stage
    import sft.train.trainer

    assert all((deepspeed, train_toys, sft.train.stage, sft.train.trainer))
    gc.freeze()  # or every run looks through all of it whenever it collects
    root = Path(sys.argv[1])
    straight = group(root / "straight", 1)
    if straight != [0]:
        sys.exit((root / "straight/said").read_text()[-4000:])
    results: dict[str, Any] = {"straight": made(root / "straight")}
    if sys.argv[2] == "kills":
        results |= at_random(root, int(sys.argv[3]), int(sys.argv[4]))
    else:
        results |= on_engines(root, sys.argv[3].split(","))
    (root / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
