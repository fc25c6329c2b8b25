"""What is told of a training never ends it: a log whose disk is full, a tracker that can't be reached."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from sft.train.callbacks import EventsFile, MetricsFile
from sft.utils.errors import first_line
from sft.utils.say import say

EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))


class Unfailing(TrainerCallback):
    """A callback that only tells: what it raises is told once, and training goes on.

    A tracker isn't asked again after that, since it may take minutes to fail each time; a file is tried again.
    """

    def __init__(self, teller: TrainerCallback) -> None:
        self.teller = teller
        self._name = type(teller).__name__.removesuffix("Callback")
        self._told = self._left = False

    def call(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Hand an event on."""
        if self._left:
            return
        try:
            getattr(self.teller, event)(*args, **kwargs)
        except Exception as error:
            if not self._told:
                say(f"{self._name} can't tell of the training ({first_line(error)}): it goes on without")
            self._told = True
            self._left = not isinstance(self.teller, (MetricsFile, EventsFile))


def _handed_on(event: str) -> Any:
    def function(self: Unfailing, *args: Any, **kwargs: Any) -> None:
        self.call(event, *args, **kwargs)

    return function


for _event in EVENTS:
    setattr(Unfailing, _event, _handed_on(_event))


def never_fail(callbacks: list[Any]) -> None:
    """Let those of a trainer's `callbacks` that only tell of it not end it."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    tellers: Any = (MetricsFile, EventsFile, *INTEGRATION_TO_CALLBACK.values())
    callbacks[:] = [Unfailing(one) if isinstance(one, tellers) else one for one in callbacks]
