"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits of a server, and how it answers.

    Attributes:
        name: of the model, as requests say it.
        max_length: most tokens of a prompt and its answer.
        api_key: the bearer token that requests must bring; None: none.
        max_waiting: answers that may wait for a slot.
        max_body: bytes of a request's body.
        seconds: in which a request must be answered.
        body_seconds: in which a request's body must arrive.
        drain_seconds: for what is under way when the server is told to stop.
        separate_thinking: thinking goes to `reasoning_content`; else it stays in the answer's text.
    """

    name: str
    max_length: int
    api_key: str | None = None
    max_waiting: int = 256
    max_body: int = 4 << 20
    seconds: float = 3600.0
    body_seconds: float = 30.0
    drain_seconds: float = 60.0
    separate_thinking: bool = True


MOST_ANSWERS = 128
"""To one request."""
MOST_STOPS, LONGEST_STOP = 16, 256
"""Stop texts of a request, and characters of one: after each token the end of its answer is searched for them."""
MOST_LIKELIEST = 20
"""Tokens whose log-probabilities are told in the place of one."""
