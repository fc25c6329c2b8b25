"""Errors that a user can act on: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """The run can't go on, and the message says why and what to do. The command exits with 1, without a traceback."""

    exit_code = 1


class UsageError(UserError):
    """The recipe or the command line is wrong. The command exits with 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says, to be quoted in a sentence; its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
