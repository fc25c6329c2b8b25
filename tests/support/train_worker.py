"""Train a toy stage in its own process: `python train_worker.py ROOT TRAIN_JSON MODEL [STOP]`, also under torchrun.

`stage` among the train keys: the stage's keys beside them.
With STOP the last process sends itself a SIGTERM at the end of that step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from train_toys import tiny_qwen, tiny_sambay, toy_rows, train_toy

from sft.train.callbacks import StopOnSignal
from sft.utils.errors import UserError

ROWS = 14
HELD_OUT = 5


def stop_at(step: int) -> None:
    original = StopOnSignal.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **kwargs)

    StopOnSignal.on_step_end = on_step_end  # type: ignore[method-assign]


def main() -> int:
    if len(sys.argv) > 4:
        stop_at(int(sys.argv[4]))
    root, train = Path(sys.argv[1]), json.loads(sys.argv[2])
    stage = train.pop("stage", None)
    make = {"qwen": tiny_qwen, "sambay": tiny_sambay}[sys.argv[3]]
    try:
        train_toy(root, train, model=make(), prepared=toy_rows(ROWS, packed=True, held_out=HELD_OUT), stage=stage)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
