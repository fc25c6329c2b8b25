"""One writer at a time in a folder of a run; the lock goes with the process, however that ends."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from sft.utils.distributed import decide, is_main, together
from sft.utils.errors import UserError
from sft.utils.say import say

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


def lock(path: Path, busy: str) -> AbstractContextManager[None]:
    """Hold the lock file `path` in this process.

    Raises UserError with `busy` where another process holds it, and with the reason where the file can't be made. On a
    file system without locks one line says so, and nothing is locked.
    """
    return _held(path, busy, fcntl.LOCK_EX)


@contextmanager
def lock_for_all(path: Path, busy: str) -> Iterator[None]:
    """The same for all processes of a run, and a refusal is raised on every one. Each of them holds it: where one dies,
    those that are left may still be at work."""
    together(lambda: None)  # a slower process may hold, for a moment yet, what it held in the run before
    with ExitStack() as held:
        decide(lambda: held.enter_context(_held(path, busy, fcntl.LOCK_EX, fcntl.LOCK_SH)))
        together(lambda: None if is_main() else held.enter_context(_held(path, busy, fcntl.LOCK_SH)))
        yield


@contextmanager
def _held(path: Path, busy: str, *kinds: int) -> Iterator[None]:
    """The lock, of the last kind, once each kind was had."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        where = error.filename or path.parent
        raise UserError(f"{where} can't be written ({error.strerror}): set another output_dir.") from error
    with handle:
        try:
            for kind in kinds:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise UserError(busy) from error
            say(f"{path.parent}: no locks on this file system ({error.strerror}); let no other run write there.")
        yield
