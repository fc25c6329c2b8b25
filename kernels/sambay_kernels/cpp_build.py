"""Builds the C++ backend on first use, keeps it in a cache, loads it.

One source file without torch or Python headers, behind a C interface: a compiler is all it needs, it takes seconds, and
the result fits every torch. The cache key holds whatever decides the result (sources, flags, compiler, processor), the
lock is released by the kernel when a process dies, and the library appears under its name only when it is whole.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# No -ffast-math: NaN and infinity must keep their meaning, and sums their order.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
REMEDY = "install a C++17 compiler (for example `apt-get install g++`) or set CXX to one"


class BuildError(RuntimeError):
    """The C++ backend can't be built or loaded here; the message says why and what to do."""


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX if it is set (None if it can't be found), else the first of g++, c++, clang++."""
    named = os.environ.get("CXX", "").strip()
    for name in [named] if named else ["g++", "c++", "clang++"]:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


def cache_folder() -> Path:
    """Where built libraries are kept: $TORCH_EXTENSIONS_DIR, else $XDG_CACHE_HOME, else ~/.cache, else a private
    temporary folder when none of them can be written."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(named) if named else Path.home() / ".cache") / "sambay_kernels"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        pass
    folder = Path(tempfile.gettempdir()) / f"sambay_kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"the cache folder {folder} belongs to someone else: set TORCH_EXTENSIONS_DIR to one of yours")
    return folder


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _openmp_library() -> list[str]:
    """Link flags for OpenMP: torch's own copy where it brings one, so that both share one pool of threads."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(found[0])] if found else ["-fopenmp"]


def _attempts() -> list[tuple[list[str], list[str]]]:
    """Compile and link flags, best first: some compilers lack -march=native, some OpenMP."""
    native = ["-mcpu=native"] if platform.machine() in ("aarch64", "arm64") else ["-march=native"]
    return [
        ([*FLAGS, *native, "-fopenmp"], _openmp_library()),
        ([*FLAGS, "-fopenmp"], ["-fopenmp"]),
        (FLAGS, []),
    ]


def _run(command: list[str]) -> str:
    """Run a compiler command; returns "" or the end of what it complained about."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = (done.stderr or done.stdout).strip().splitlines()
    return " | ".join(lines[:3]) or f"exit status {done.returncode}"


def _compile(path: str, target: Path) -> None:
    """Compile the source into `target`, which appears whole or not at all."""
    problems: list[str] = []
    prefix = f"build-{target.stem}-"
    for left in target.parent.glob(f"{prefix}*"):  # by a process that was killed: the caller holds this target's lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as folder:
        part, whole = Path(folder) / "cpu.o", Path(folder) / target.name
        for compile_flags, link_flags in _attempts():
            problem = _run([path, *compile_flags, "-c", str(SOURCES / "cpu.cpp"), "-o", str(part)])
            problem = problem or _run([path, "-shared", str(part), "-o", str(whole), *link_flags])
            if not problem:
                # Loaders ignore what follows the last section; `_load` doesn't.
                with open(whole, "ab") as file:
                    file.write(hashlib.sha256(whole.read_bytes()).digest())
                _load(whole)
                os.replace(whole, target)
                return
            problems.append(problem)
    raise BuildError(f"{path} can't build the C++ backend ({problems[0]}): {REMEDY}")


def _load(path: Path) -> ctypes.CDLL:
    """Load a library that ends with its own hash: mapping a torn file would kill the process.

    Raises:
        OSError: it is missing, torn or not for this system.
    """
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise OSError(f"{path} is damaged")
    return ctypes.CDLL(str(path))


def _library_path(path: str) -> Path:
    version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    parts = [file.read_text() for file in sorted(SOURCES.glob("*.*"))]
    parts += [str(_attempts()), version, _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / f"cpu-{key}.so"


@functools.cache
def library() -> ctypes.CDLL:
    """The C++ backend, built if it isn't in the cache.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    path = compiler()
    if path is None:
        named = os.environ.get("CXX", "").strip()
        raise BuildError(f"CXX={named} is not a program: {REMEDY}" if named else f"no C++ compiler was found: {REMEDY}")
    try:
        target = _library_path(path)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                return _load(target)
            except FileNotFoundError:
                logger.info("building the C++ backend of sambay_kernels (once, some seconds)")
            except OSError as error:
                logger.warning("%s: building the C++ backend of sambay_kernels again", error)
            _compile(path, target)
            return _load(target)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ backend can't be built or loaded ({error}): {REMEDY}") from error


@functools.cache
def problem() -> str | None:
    """None if the C++ backend works here, else why not and what to do. Warns once in the latter case."""
    try:
        library()
    except BuildError as error:
        warnings.warn(f"sambay_kernels runs on its slower torch backend: {error}", RuntimeWarning, stacklevel=2)
        return str(error)
    return None
