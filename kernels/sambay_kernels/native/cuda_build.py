"""Builds the CUDA C++ backend on first use, for the GPU that is here, keeps it in a cache, loads it.

No torch headers, a C interface: nvcc is all it needs, it takes seconds, and the result fits every torch. Nothing else
needs it: without nvcc the Triton kernels run.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
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

FILES = [SOURCES / "scan.cu", SOURCES / "swiglu.cu"]
HEADERS = [*sorted(SOURCES.glob("*.cuh")), SOURCES / "scan_core.h"]
# Denormal numbers are flushed to zero, as in the CPU backend. No --use_fast_math: it would change divisions as well.
FLAGS = ["-O3", "-std=c++17", "-ftz=true"]
REMEDY = "install the CUDA toolkit that fits your driver, or set CUDA_HOME to its folder"


def _candidates() -> Iterator[str]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name, "").strip():
            yield str(Path(os.environ[name].strip()) / "bin" / "nvcc")
    yield "nvcc"
    yield "/usr/local/cuda/bin/nvcc"


def compiler() -> str | None:
    """Path of nvcc: in $CUDA_HOME or $CUDA_PATH, on the PATH, or in /usr/local/cuda; None if there is none."""
    return next((path for path in map(shutil.which, _candidates()) if path is not None), None)


def architecture(device: torch.device) -> str:
    """What nvcc calls this GPU: sm_80 is an A100, sm_90 an H100 or H200."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _too_new(version: str) -> str | None:
    """Why the driver can't run what this nvcc makes; None if it can, or if it doesn't say."""
    found, ask = re.search(r"release (\d+)", version), getattr(torch._C, "_cuda_getDriverVersion", None)
    if found is None or ask is None or int(found[1]) <= ask() // 1000:
        return None
    return f"nvcc is of CUDA {found[1]} and the driver of CUDA {ask() // 1000}"


def _compile(path: str, arch: str, target: Path) -> None:
    """Compile the sources into `target`, which appears whole or not at all."""
    with build_folder(target) as folder:
        whole = folder / target.name
        command = [path, *FLAGS, f"-arch={arch}", "-Xcompiler", "-fPIC", "-shared", *map(str, FILES), "-o", str(whole)]
        problem = run_compiler(command)
        if problem:
            raise BuildError(f"{path} can't build the CUDA backend for {arch} ({problem}): {REMEDY}")
        publish(whole, target)


@functools.cache
def library(arch: str) -> ctypes.CDLL:
    """The CUDA backend for an architecture, built if it isn't in the cache.

    Raises:
        BuildError: there is no nvcc, it fails, or it is too new for the driver.
    """
    path = compiler()
    if path is None:
        raise BuildError(f"nvcc was not found: {REMEDY}")
    try:
        version = version_of(path)
        mismatch = _too_new(version)
        if mismatch:
            raise BuildError(f"{mismatch}: {REMEDY}")
        target = library_path("cuda", FILES + HEADERS, " ".join(FLAGS), arch, version)
        return load_or_build(target, "CUDA backend", lambda target: _compile(path, arch, target))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the CUDA backend can't be built or loaded ({error}): {REMEDY}") from error
