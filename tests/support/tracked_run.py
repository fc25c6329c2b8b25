"""A run that SIGTERM stops after step 2 of its second stage, and that goes on: `python tracked_run.py RECIPE`.

Standard output is what the two commands told, an object each.
"""

from __future__ import annotations

import sys

import pytest
from train_toys import signal_at

from sft.cli.main import main
from sft.train.callbacks import StopOnSignal

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        of_this, original = iter((False, False, False, False, True, False)), StopOnSignal.on_step_end
        signal_at(patch, 2)
        stops = StopOnSignal.on_step_end
        patch.setattr(StopOnSignal, "on_step_end", lambda *a, **k: (stops if next(of_this) else original)(*a, **k))
        stopped = main(["run", sys.argv[1], "--json"])
    print(flush=True)
    went_on = main(["run", sys.argv[1], "--json"])
    sys.exit(0 if (stopped, went_on) == (143, 0) else 1)
