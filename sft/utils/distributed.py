"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

WAIT = timedelta(hours=24)
"""How long processes wait for the first one, which alone prepares data and evaluates."""


def processes() -> PartialState:
    """accelerate's view of the processes; without a GPU it has to be told, or it takes each for the only one."""
    import torch
    from accelerate import PartialState

    if PartialState._shared_state:
        return PartialState()
    if torch.cuda.is_available():
        return PartialState(timeout=WAIT)
    return PartialState(cpu=True, timeout=WAIT)
