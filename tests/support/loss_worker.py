"""Train every loss of `loss_toys` on whatever ranks there are: `python loss_worker.py FOLDER RANKS`."""

from __future__ import annotations

import sys
from pathlib import Path

from loss_toys import LOSSES, documents, prepared
from train_toys import tiny_sambay, train_toy


def main() -> int:
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    for number, loss in enumerate(LOSSES):
        train = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 2, "loss": loss}
        train |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6 // ranks, "max_grad_norm": 0.0}
        rows = prepared(documents(weighted="weights" in loss))
        train_toy(folder / f"{number}", train, model=tiny_sambay(), prepared=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
