"""Somebody at the keyboard."""

from __future__ import annotations

import pytest


def types(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """`input` returns these lines, and then there is an end of input."""
    waiting = iter(lines)

    def typed(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
