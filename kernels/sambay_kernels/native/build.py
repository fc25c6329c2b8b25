"""Building native code on first use: a cache of libraries that are whole, fit, and are built once.

A library's name holds a hash of whatever decides the result (sources, flags, compiler, processor or GPU); the lock is
released by the kernel when a process dies, and the library appears under its name only when it is whole.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
LOCK_LIMIT = 1800.0
"""Seconds to wait for another process that builds the same library; a compiler may take 600."""


class BuildError(RuntimeError):
    """A native backend can't be built or loaded here; the message says why and what to do."""


def named_cache() -> Path:
    """Where built libraries belong, whether that can be written to or not."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    named = named or os.path.expanduser("~/.cache")  # which leaves `~` where there is no home folder
    return _temporary_folder() if named.startswith("~") else Path(named) / "sambay_kernels"


def cache_folder() -> Path:
    """Where built libraries are kept: $TORCH_EXTENSIONS_DIR, else $XDG_CACHE_HOME, else ~/.cache, else a private
    temporary folder when none of them can be written, of which a warning tells once."""
    named = named_cache()
    try:
        named.mkdir(parents=True, exist_ok=True)
        # Tried, not asked for: to root every folder looks writable.
        with tempfile.TemporaryFile(dir=named):
            return named
    except OSError as error:
        why = error.strerror or str(error)
    folder = _temporary_folder()
    warnings.warn(
        f"{named} can't be written to ({why}), so kernels are built in {folder}, and again when that is "
        "emptied: set TORCH_EXTENSIONS_DIR to a folder that can be written to",
        RuntimeWarning,
        stacklevel=2,
    )
    return folder


def _temporary_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"sambay_kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"the cache folder {folder} belongs to someone else: set TORCH_EXTENSIONS_DIR to one of yours")
    return folder


def library_path(name: str, sources: list[Path], *parts: str) -> Path:
    """Where the library of these sources lies, or will; `parts` are what else decides the result."""
    content = [file.read_text() for file in sources] + list(parts)
    key = hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
    return cache_folder() / f"{name}-{key}.so"


def run_compiler(command: list[str]) -> str:
    """Run a compiler command; returns "" or the beginning of what it complained about."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = (done.stderr or done.stdout).strip().splitlines()
    return " | ".join(lines[:3]) or f"exit status {done.returncode}"


def version_of(compiler: str) -> str:
    """What `compiler --version` says."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout


@contextmanager
def build_folder(target: Path) -> Iterator[Path]:
    """A folder to build `target` in. The caller holds its lock, so what lies there is left by killed processes."""
    prefix = f"build-{target.stem}-"
    for left in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
        yield Path(folder)


def publish(whole: Path, target: Path) -> None:
    """Give a library that was built its name; it ends with its own hash then, which loaders don't mind."""
    with open(whole, "ab") as file:
        file.write(hashlib.sha256(whole.read_bytes()).digest())
    load(whole)
    os.replace(whole, target)


def load(path: Path) -> ctypes.CDLL:
    """Load a library that ends with its own hash: mapping a torn file would kill the process.

    Raises:
        OSError: it is missing, torn or not for this system.
    """
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise OSError(f"{path} is damaged")
    return ctypes.CDLL(str(path))


def _take(lock: IO[str], target: Path) -> None:
    limit = time.monotonic() + LOCK_LIMIT
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > limit:
                raise BuildError(f"another process has been building {target} for half an hour: end it first") from None
            time.sleep(0.05)


def load_or_build(target: Path, what: str, build: Callable[[Path], None]) -> ctypes.CDLL:
    """Load `target`, after building it if it is missing or damaged; processes that want it at once build it once.

    Raises:
        OSError: it can't be written or loaded.
        BuildError: from `build`.
    """
    with open(target.with_suffix(".lock"), "w") as lock:
        _take(lock, target)
        try:
            return load(target)
        except FileNotFoundError:
            logger.info("building the %s of sambay_kernels (once)", what)
        except OSError as error:
            logger.warning("%s: building the %s of sambay_kernels again", error, what)
        build(target)
        return load(target)
