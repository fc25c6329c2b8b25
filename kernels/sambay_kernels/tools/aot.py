"""Ahead-of-time compilation of every GPU kernel, without a GPU: registers, spills and size on each architecture.

    python -m sambay_kernels.tools.aot [--arch 80 90] [--backend triton cuda] [--local 0]

Triton's launches are those that the ops make for the published model at 32,768 packed tokens: the ops run on tensors
without data, and their launches are recorded instead of made. The CUDA C++ kernels are compiled as they stand, where
there is nvcc. A kernel that keeps more than --local bytes of registers in memory is an error.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..native.build import BuildError
from ..triton.launch import Launch, recording
from .aot_report import Compiled, disassembler, table, tool

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
ARCHITECTURES = (80, 90)  # A100; H100 and H200
BACKENDS = ("triton", "cuda")
REPORTED = (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes stack frame")


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, constants and alignments of a launch's arguments, as Triton's just-in-time compiler would find them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, Tensor):
            types[parameter.name] = TYPES[value.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
    return types, constants, aligned


def compile_launch(name: str, launch: Launch, arch: int) -> Compiled:
    """Compile one launch for an architecture (80 for sm_80) and read what the assembler says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, aligned = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    said, instructions = _assemble(made.asm["ptx"], arch)
    found = [re.search(pattern, said) for pattern in REPORTED]
    registers, spills, stack = (int(match[1]) if match else None for match in found)
    if registers is None or spills is None or stack is None:
        raise RuntimeError(f"{name}: the assembler's report names no registers: {said.strip()[:300]}")
    warps, shared = launch.options["num_warps"], made.metadata.shared
    return Compiled(name, arch, registers, spills, stack, instructions, warps, shared)


def _assemble(ptx: str, arch: int) -> tuple[str, int]:
    """Assemble a kernel: the assembler's report, and how many instructions there are."""
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        name = target[1] if target else f"sm_{arch}"
        command = [tool("ptxas", arch), "-v", f"--gpu-name={name}", str(source), "-o", str(binary)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stderr
        listing = subprocess.run(
            [disassembler(arch) or "nvdisasm", "-c", str(binary)], capture_output=True, text=True, timeout=600
        )
    return said, len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", listing.stdout, re.M))


def launches(arch: int) -> dict[str, Launch]:
    """Every kernel's launch for the published model on an architecture, by name; attention's in float32 too."""
    from .aot_cases import run_cases

    with recording(arch // 10) as record:
        run_cases()
    found: dict[str, Launch] = {}
    for launch in record:
        name = launch.kernel.__name__
        found[f"{name}<fp32>" if name in found else name] = launch
    return found


def compile_all(backends: list[str], architectures: list[int]) -> list[Compiled]:
    """Every kernel of these backends for these architectures; without nvcc a line says that CUDA C++ is left out."""
    from .cuda_aot import compile_kernels

    found: list[Compiled] = []
    if "triton" in backends:
        found += [compile_launch(*named, arch) for arch in architectures for named in launches(arch).items()]
    if "cuda" in backends:
        try:
            found += [kernel for arch in architectures for kernel in compile_kernels(arch)]
        except BuildError as error:
            if backends == ["cuda"]:
                raise SystemExit(str(error)) from error
            print(f"CUDA C++ kernels are left out: {error}", file=sys.stderr)
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    options.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="80 for sm_80, and so on")
    options.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="both by default")
    options.add_argument("--local", type=int, default=0, help="bytes that a thread may keep in memory; default: none")
    chosen = options.parse_args()
    found = compile_all(chosen.backend, chosen.arch)
    print(table(found))
    spilling = sorted({x.kernel for x in found if x.local_bytes > chosen.local})
    if spilling:
        print(f"these kernels keep registers in memory: {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
