"""What the processes of a run decide together: `torchrun ... rank_worker.py FOLDER`; each writes what it saw."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from train_toys import tiny_qwen, toy_rows, train_toy

from sft.train.agree import over_processes
from sft.train.callbacks import StopOnSignal
from sft.train.trainer import SambayTrainer
from sft.utils.errors import UserError

RANK = int(os.environ["RANK"])
ROWS = 14
training_step, on_step_end = SambayTrainer.training_step, StopOnSignal.on_step_end


def one_bad_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The second process's third step gives a loss that isn't finite, and good gradients."""
    loss = training_step(self, *args, **kwargs)
    return torch.full_like(loss, torch.inf) if RANK == 1 and self.state.global_step == 2 else loss


def signal_in_the_last_step(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
    """The second process alone is told to stop, as the last step ends."""
    if RANK == 1 and state.global_step == state.max_steps:
        os.kill(os.getpid(), signal.SIGUSR1)
    return on_step_end(self, args, state, control, **kwargs)


def run(
    root: Path, train: dict[str, Any], change: Callable[[], None] | None = None, inside: Any = training_step
) -> dict[str, Any]:
    """What a training ended in, and how often the model was run. `inside`: what each step is done by."""
    passes = 0

    def counted(self: Any, model: Any, inputs: dict[str, Any], number: Any = None) -> Any:
        nonlocal passes
        passes += not inputs.get("skipped")
        return inside(self, model, inputs, number)

    SambayTrainer.training_step = counted  # type: ignore[method-assign]
    if change is not None:
        change()
    try:
        told = train_toy(root, train, model=tiny_qwen(), prepared=toy_rows(ROWS, packed=False))[0]["steps"]
        code = 0
    except UserError as error:
        told, code = str(error), error.exit_code
    finally:
        SambayTrainer.training_step, StopOnSignal.on_step_end = training_step, on_step_end  # type: ignore[method-assign]
    return {"told": told, "code": code, "passes": passes}


def exchanges(root: Path) -> dict[str, int]:
    """How many gradient buckets are sent in two steps of one micro-batch, and of five, which are as large; and how many
    gradients of the former have memory of their own beside them."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    seen: dict[str, int] = {"apart": 0}

    def hooked(self: Any, model: Any, inputs: dict[str, Any], number: Any = None) -> Any:
        if not hasattr(model, "counted"):
            model.counted = True

            def count() -> None:
                seen[name] = seen.get(name, 0) + 1

            # A lambda: torch looks at annotations, and wants them to be types.
            model.register_comm_hook(None, lambda state, bucket: (count(), allreduce_hook(state, bucket))[1])
        loss = training_step(self, model, inputs, number)
        if name == "1":  # while several are summed they have their own
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            seen["apart"] += sum(grad.untyped_storage().nbytes() == grad.nbytes for grad in grads)
        return loss

    for name, rows, micro_batches in (("1", 5, 1), ("5", 1, 5)):
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
        run(root / f"exchanges {name}", {**split, "max_steps": 2, "num_train_epochs": 2}, inside=hooked)
    return seen


def main() -> None:
    root = Path(sys.argv[1])
    each = {"per_device_train_batch_size": 1}
    seen: dict[str, Any] = {
        "bad loss": run(
            root / "bad loss",
            {**each, "max_steps": 6, "save_steps": 2, "logging_steps": 6, "guard": None},
            lambda: setattr(SambayTrainer, "training_step", one_bad_loss),
        ),
        "huge": run(root / "huge", {**each, "max_steps": 1, "learning_rate": 1e38, "save_strategy": "no"}),
        "signal": run(
            root / "signal",
            {**each, "max_steps": 2},
            lambda: setattr(StopOnSignal, "on_step_end", signal_in_the_last_step),
        ),
        "filled": run(root / "filled", {**each, "gradient_accumulation_steps": 10, "num_train_epochs": 2}),
    }
    seen["exchanges"] = exchanges(root)
    # As on GPUs, whose process group can't exchange numbers of the host.
    with patch.object(torch.distributed, "get_backend", lambda group=None: "nccl"):
        seen["sums"] = [over_processes([RANK + 1, 5]) for _ in range(2)]
        seen["largest"] = over_processes([RANK + 1], torch.distributed.ReduceOp.MAX)
    (root / f"rank{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
