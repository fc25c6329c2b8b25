"""Train a toy stage in a process of its own: `python train_worker.py ROOT TRAIN_JSON [model]`, also under torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from train_toys import tiny_qwen, tiny_sambay, toy_rows, train_toy

from sft.errors import UserError

ROWS = 14


def main() -> int:
    root, train = Path(sys.argv[1]), json.loads(sys.argv[2])
    make = {"qwen": tiny_qwen, "sambay": tiny_sambay}[sys.argv[3]]
    try:
        train_toy(root, train, model=make(), prepared=toy_rows(ROWS, packed=True))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
