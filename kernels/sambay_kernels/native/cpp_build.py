"""Builds the C++ backend on first use, keeps it in a cache, loads it.

Sources without torch or Python headers, behind a C interface: a compiler is all they need, it takes seconds, and the
result fits every torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import warnings
from pathlib import Path

import torch

from .build import (
    SOURCES,
    BuildError,
    build_folder,
    library_path,
    load_or_build,
    publish,
    run_compiler,
    version_of,
)

UNITS = [SOURCES / f"{name}.cpp" for name in ("cpu", "attention", "norm", "decoder")]
FILES = [*UNITS, *sorted(SOURCES.glob("*.h"))]
# No -ffast-math: NaN and infinity must keep their meaning, and sums their order.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
REMEDY = "install a C++17 compiler (for example `apt-get install g++`) or set CXX to one"


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX if it is set (None if it can't be found), else the first of g++, c++, clang++."""
    named = os.environ.get("CXX", "").strip()
    for name in [named] if named else ["g++", "c++", "clang++"]:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


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
    # Compilers halve AVX-512's vectors unless told not to; the scan takes 0.8 of the time with whole ones.
    native = ["-mcpu=native"] if platform.machine() in ("aarch64", "arm64") else ["-march=native"]
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    return [
        ([*FLAGS, *native, *wide, "-fopenmp"], _openmp_library()),
        ([*FLAGS, "-fopenmp"], ["-fopenmp"]),
        (FLAGS, []),
    ]


def _compile(path: str, target: Path) -> None:
    """Compile the source into `target`, which appears whole or not at all."""
    problems: list[str] = []
    with build_folder(target) as folder:
        parts, whole = {unit: str(folder / f"{unit.stem}.o") for unit in UNITS}, folder / target.name
        for compile_flags, link_flags in _attempts():
            commands = [[path, *compile_flags, "-c", str(unit), "-o", part] for unit, part in parts.items()]
            commands += [[path, "-shared", *parts.values(), "-o", str(whole), *link_flags]]
            problem = next(filter(None, map(run_compiler, commands)), "")
            if not problem:
                return publish(whole, target)
            problems.append(problem)
    raise BuildError(f"{path} can't build the C++ backend ({problems[0]}): {REMEDY}")


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
        target = library_path("cpu", FILES, str(_attempts()), version_of(path), _processor())
        return load_or_build(target, "C++ backend", lambda target: _compile(path, target))
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
