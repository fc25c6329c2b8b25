"""Ahead-of-time compilation of every Triton kernel, without a GPU: registers, spills and size on each architecture.

    python -m sambay_kernels.aot [--arch 80 90]

The launches are those that the ops make for the published model at 32,768 packed tokens: the ops run on tensors without
data, and their launches are recorded instead of made. A kernel that spills registers to memory is an error.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .triton_call import Launch, recording

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
ARCHITECTURES = (80, 90)  # A100; H100 and H200


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    kernel: str
    arch: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int


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


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile one launch for an architecture (80 for sm_80) and read what the assembler says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, aligned = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    name = launch.kernel.__name__
    said, instructions = _assemble(made.asm["ptx"], arch)
    registers, spills = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    if registers is None or spills is None:
        raise RuntimeError(f"{name}: the assembler's report names no registers: {said.strip()[:300]}")
    return Compiled(
        name, arch, launch.options["num_warps"], int(registers[1]), int(spills[1]), made.metadata.shared, instructions
    )


def _tool(name: str, arch: int) -> str:
    """Path of a tool of the CUDA toolkit that Triton brings with it."""
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        ptxas = Path(get_ptxas(arch).path)
    except TypeError:  # older Triton
        ptxas = Path(get_ptxas().path)
    return str(ptxas if name == "ptxas" else ptxas.with_name(name))


def _assemble(ptx: str, arch: int) -> tuple[str, int]:
    """Assemble a kernel: the assembler's report, and how many instructions there are."""
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        name = target[1] if target else f"sm_{arch}"
        command = [_tool("ptxas", arch), "-v", f"--gpu-name={name}", str(source), "-o", str(binary)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run([_tool("nvdisasm", arch), "-c", str(binary)], capture_output=True, text=True)
    return said, len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", listing.stdout, re.M))


def launches() -> dict[str, Launch]:
    """Every kernel's launch for the published model, by the kernel's name."""
    from .aot_cases import run_cases

    with recording() as record:
        run_cases()
    return {launch.kernel.__name__: launch for launch in record}


def table(found: list[Compiled]) -> str:
    """The compiled kernels as text, one a line."""
    lines = ["kernel                              arch  warps  registers  spill B  shared B  instructions"]
    lines += [
        f"{x.kernel:<34}  sm_{x.arch}  {x.warps:>5}  {x.registers:>9}  {x.spill_bytes:>7}  {x.shared_bytes:>8}  "
        f"{x.instructions:>12,}"
        for x in found
    ]
    return "\n".join(lines)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    options.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="80 for sm_80, and so on")
    chosen = options.parse_args()
    found = [compile_launch(launch, arch) for launch in launches().values() for arch in chosen.arch]
    print(table(found))
    spilling = sorted({x.kernel for x in found if x.spill_bytes})
    if spilling:
        print(f"these kernels spill registers to memory: {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
