"""One writer at a time in a folder of a run; the lock goes with the process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sft.utils.distributed import decide
from sft.utils.errors import UserError

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def lock(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path` in this process.

    Raises UserError with `busy` where another process holds it, and with the reason where the file can't be made. On a
    file system without locks one line says so, and nothing is locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        where = error.filename or path.parent
        raise UserError(f"{where} can't be written ({error.strerror}): set another output_dir.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise UserError(busy) from error
            text = f"{path.parent}: no locks on this file system ({error.strerror}); let no other run write there."
            print(text, file=sys.stderr, flush=True)
        yield


@contextmanager
def lock_for_all(path: Path, busy: str) -> Iterator[None]:
    """The same for all processes of a run: the main one holds the lock, and a refusal is raised on every one."""
    with ExitStack() as held:
        decide(lambda: held.enter_context(lock(path, busy)))
        yield
