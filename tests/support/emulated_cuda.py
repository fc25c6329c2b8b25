"""The CUDA kernels of csrc/*.cu on the CPU: built with g++ against an emulated CUDA runtime (cuda_emulator/)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from sambay_kernels.native import build as native_build
from sambay_kernels.native import cpp_build, cuda_build, cuda_call
from sambay_kernels.ops.selective_scan import api as scan_api
from sambay_kernels.ops.swiglu import api as swiglu_api

EMULATOR = Path(__file__).parent / "cuda_emulator"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-Wno-unknown-pragmas"]
MODULES = (scan_api, swiglu_api)


def build(name: str, files: list[Path]) -> ctypes.CDLL:
    """CUDA sources for the CPU, built if they aren't in the cache; skips the test where there is no C++ compiler."""
    path = cpp_build.compiler()
    if path is None:
        pytest.skip(f"no C++ compiler for the emulator: {cpp_build.REMEDY}")
    sources = [*files, EMULATOR / "emulator.cpp"]
    headers = [*cuda_build.HEADERS, *sorted(EMULATOR.glob("*.h"))]

    def compile_into(target: Path) -> None:
        with native_build.build_folder(target) as folder:
            whole = folder / target.name
            command = [path, *FLAGS, f"-I{EMULATOR}", "-x", "c++", *map(str, sources), "-o", str(whole)]
            problem = native_build.run_compiler(command)
            assert not problem, problem
            native_build.publish(whole, target)

    target = native_build.library_path(name, sources + headers, " ".join(FLAGS), native_build.version_of(path))
    return native_build.load_or_build(target, "emulated CUDA backend", compile_into)


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated backend."""
    return build("emulated", cuda_build.FILES)


def set_order(seed: int) -> None:
    """0: threads of a block take turns; 1: the last warp runs ahead as far as it can; 2, 3, ..: another warp does."""
    library().emulator_order(seed)


@contextmanager
def emulated() -> Iterator[None]:
    """CPU tensors take the CUDA backend, emulated; memory that kernels should write starts as NaN."""
    built = library()
    empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        made = empty(self, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_call, "_library", lambda device: built)
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        for module in MODULES:
            patch.setattr(module, "backend_for", lambda *_: "cuda")
        yield
        set_order(0)
