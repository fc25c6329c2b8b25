"""The CUDA C++ backend without a GPU: compiled for A100 and H100, built into the cache, and what is said without it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from benchmark_files import load
from sambay_kernels import BackendError, why
from sambay_kernels.native import cuda_build, cuda_call
from sambay_kernels.native.build import SOURCES, BuildError
from sambay_kernels.runtime import dispatch as registry
from sambay_kernels.tools import cuda_aot
from sambay_kernels.tools.aot_report import table

needs_nvcc = pytest.mark.skipif(cuda_build.compiler() is None, reason=f"no nvcc: {cuda_build.REMEDY}")

REPORT = """
ptxas info    : Compiling entry function '_ZN6sambay39_GLOBAL__N__49d27435_7_scan_cu_d9bc634c19scan_forward_kernelI\
13__nv_bfloat16Lb1ELb0EEEvNS_11ScanForwardIT_EE' for 'sm_80'
ptxas info    : Function properties for _ZN6sambay
    {frame} bytes stack frame, {spill} bytes spill stores, 12 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 8 bytes cumulative stack size, 616 bytes cmem[0]
"""


def kernels_in_sources() -> set[str]:
    sources = [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]
    pattern = r"__global__ void __launch_bounds__\([^)]*\) (\w+_kernel)\("
    return {name for file in sources for name in re.findall(pattern, file.read_text())}


@needs_nvcc
@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_every_kernel_compiles_without_local_memory(arch: int) -> None:
    found = cuda_aot.compile_kernels(arch)
    print(table(found))
    assert {x.kernel.split("<")[0] for x in found} == kernels_in_sources()
    assert len(found) == len({x.kernel for x in found}) >= 20
    assert not [x for x in found if x.local_bytes]
    # As many registers as three blocks of 128 threads may have: as many blocks as shared memory lets on an H100.
    published = [x for x in found if x.kernel.startswith("scan_backward_kernel") and x.kernel.endswith(",1>")]
    assert len(published) == 3 and all(x.registers <= 65536 // (3 * 128) for x in published)


@pytest.mark.parametrize(("spill", "frame"), [(8, 8), (0, 128), (0, 0)])
def test_spills_and_stack_frames_are_seen(spill: int, frame: int) -> None:
    (found,) = cuda_aot.parse_report(REPORT.format(spill=spill, frame=frame), 80, {})
    assert (found.kernel, found.registers, found.spill_bytes) == ("scan_forward_kernel<bf16,1,0>", 96, spill)
    assert found.local_bytes == max(spill, frame)


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu runs the kernels on it")
def test_built_once_and_refused_by_a_machine_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cuda_call, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(cuda_call, "library", cuda_build.library.__wrapped__)
    runs: list[Path] = []
    compile_once = cuda_build._compile
    monkeypatch.setattr(
        cuda_build, "_compile", lambda path, arch, target: (runs.append(target), compile_once(path, arch, target))
    )
    for _ in range(2):
        with pytest.raises(cuda_call.KernelError, match=r"CUDA kernel library can't run on cpu: .* \(error \d+\)"):
            cuda_call.check_device(torch.device("cpu"))
    assert len(runs) == 1 and runs[0].is_file() and not list(runs[0].parent.glob("build-*"))


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_build, "_candidates", lambda: iter(["no-such-nvcc"]))
    said = "nvcc was not found: install the CUDA toolkit"
    assert cuda_call.problem.__wrapped__().startswith(said)
    with pytest.raises(BuildError, match=said):
        cuda_build.library.__wrapped__("sm_90")
    with pytest.raises(BuildError, match=said):
        cuda_aot.compile_kernels(90)


def test_nvcc_is_looked_for_in_cuda_home_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\necho 'Cuda compilation tools, release 13.0'; echo 'fake: no' >&2\n[ \"$1\" = --version ]\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert cuda_build.compiler() == str(nvcc)
    with pytest.raises(BuildError, match=r"can't build the CUDA backend for sm_90 \(fake: no\): install"):
        cuda_build.library.__wrapped__("sm_90")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
    with pytest.raises(BuildError, match="nvcc is of CUDA 13 and the driver of CUDA 12: install"):
        cuda_build.library.__wrapped__("sm_90")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert cuda_build._too_new("release 13.0") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("op", ["selective_scan", "swiglu"])
def test_without_a_gpu_the_request_is_an_error_that_says_why(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMBAY_KERNELS", "cuda")
    with pytest.raises(BackendError, match=f"{op} can't use it: .*torch sees no CUDA device"):
        why(op, "cuda")
    with pytest.raises(BackendError, match="cuda backend runs on cuda, not on cpu: use SAMBAY_KERNELS=auto"):
        why(op, "cpu")
    assert why("causal_conv1d", "cpu").reason.startswith("SAMBAY_KERNELS=cuda, which causal_conv1d doesn't have")


@pytest.mark.parametrize(
    ("op", "first", "second"), [("selective_scan", "cuda", "triton"), ("swiglu", "triton", "cuda")]
)
def test_the_default_is_what_was_measured_to_be_faster(op: str, first: str, second: str) -> None:
    names = [backend.name for backend in registry._registry[op]]
    assert names.index(first) < names.index(second) < names.index("torch")


def test_the_benchmark_has_a_row_for_it_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("bench_ops")
    for missing, rows in ((None, ["triton", "cuda"]), ("no nvcc", ["triton"])):
        monkeypatch.setattr(registry, "_registry", {})
        registry.register("selective_scan", "triton", ("cuda",))
        registry.register("selective_scan", "cuda", ("cuda",), lambda missing=missing: missing)
        registry.register("selective_scan", "torch")
        assert bench.backends("selective_scan", "cuda") == rows
