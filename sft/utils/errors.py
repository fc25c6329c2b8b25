"""Errors that a user can act on: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator


class UserError(Exception):
    """The run can't go on, and the message says why and what to do. The command exits with 1, without a traceback."""

    exit_code = 1


class UsageError(UserError):
    """The recipe or the command line is wrong. The command exits with 2."""

    exit_code = 2


class RestartError(UserError):
    """What a stage has made can't be gone on from: it has to be started again with `--restart`."""


class RefusedPromptError(UserError):
    """What was asked can't be asked: another question may."""


def shown(text: str) -> str:
    """`text` on one line, with what a terminal doesn't show, or would obey, written as an escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says, to be quoted in a sentence; its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def sentence(error: BaseException) -> str:
    """What became of a command, in one sentence (a recipe's mistakes: a line each)."""
    if isinstance(error, UserError):
        return str(error)
    if disk_full(error):
        files = [seen.filename for seen in causes(error) if isinstance(seen, OSError) and seen.filename]
        place = f" while writing {files[0]}" if files else ""
        return f"the disk is full{place}; make room and give the same command again"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; lower per_device_train_batch_size or max_length, or raise gradient_accumulation_steps"
    told = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {told} (run again with --debug for the traceback)"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and the ones that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def disk_full(error: BaseException | None, folder: str | os.PathLike[str] | None = None) -> bool:
    """Whether an error is, or came from, a full disk. Libraries hide the errno: then their words are read, and the disk
    of `folder` is asked, where one is named."""
    for seen in causes(error):
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if "No space left" in str(seen):
            return True
    knows = isinstance(error, OSError) and error.errno is not None
    return folder is not None and not knows and shutil.disk_usage(folder).free < FULL


LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
"""What torch's collectives say when a process at the other end has gone."""


def lost_peer(error: BaseException | None) -> bool:
    """Whether an error is, or came from, a collective whose other end has gone, or doesn't answer."""
    names = ("DistBackendError", "DistNetworkError", "DistStoreError")
    return any(type(seen).__name__ in names or any(text in str(seen) for text in LOST) for seen in causes(error))


FULL = 1 << 16
"""Bytes left on a disk that counts as full when a write to it has failed."""
