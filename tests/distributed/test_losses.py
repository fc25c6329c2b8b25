"""Two processes train with every loss of `train.loss` what one process trains."""

from __future__ import annotations

import pytest
import torch
from loss_toys import LOSSES
from ranks import SUPPORT, run_alone, run_ranks
from train_toys import read_metrics, saved_weights


def test_two_ranks_train_every_loss_as_one(tmp_path):
    alone = run_alone([str(SUPPORT / "loss_worker.py"), str(tmp_path / "1"), "1"], limit=400)
    assert alone.code == 0, alone.stderr[-3000:]
    ends = run_ranks("loss_worker.py", str(tmp_path / "2"), "2", limit=400)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.stderr[-3000:] for end in ends)
    for number, loss in enumerate(LOSSES):
        one, two = (tmp_path / f"{ranks}/{number}/stages/one" for ranks in (1, 2))
        lines = [[line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (one, two)]
        assert lines[1] == pytest.approx(lines[0], abs=1e-6), loss
        weights = saved_weights(two / "final")
        for name, weight in saved_weights(one / "final").items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6, msg=str(loss))
