"""Ahead-of-time compilation of the CUDA C++ kernels, without a GPU: what the assembler says of each."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from ..native.build import BuildError
from ..native.cuda_build import FILES, FLAGS, REMEDY, compiler
from .aot_report import Compiled, disassembler

# An entry of the assembler's report. The name is mangled: a length before the kernel's name, then template arguments.
ENTRY = re.compile(
    r"entry function '(?P<mangled>\w+)' for 'sm_\d+'\n.*\n"
    r"\s+(?P<stack>\d+) bytes stack frame, (?P<spill>\d+) bytes spill stores.*\n.*Used (?P<registers>\d+) registers"
)
NAME = re.compile(
    r"_cu_[0-9a-f]{8}\d+(?P<name>[a-z]\w*?_kernel)(?P<template>I(?:f|13__nv_bfloat16|6__half|Lb[01]E)+)?E"
)
ARGUMENTS = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16", "Lb0E": "0", "Lb1E": "1"}


def kernel_name(mangled: str) -> str:
    """`scan_forward_kernel<bf16,1,0>` of its mangled name."""
    found = NAME.search(mangled)
    if found is None:
        raise ValueError(f"no kernel of ours: {mangled}")
    arguments = re.findall("|".join(ARGUMENTS), (found["template"] or "")[1:])
    return found["name"] + (f"<{','.join(ARGUMENTS[x] for x in arguments)}>" if arguments else "")


def parse_report(report: str, arch: int, instructions: dict[str, int]) -> list[Compiled]:
    """The kernels in what `nvcc -Xptxas -v` printed; `instructions` by mangled name."""
    return [
        Compiled(
            kernel_name(entry["mangled"]),
            arch,
            int(entry["registers"]),
            int(entry["spill"]),
            int(entry["stack"]),
            instructions.get(entry["mangled"], 0),
        )
        for entry in ENTRY.finditer(report)
    ]


def _instructions(binary: Path, arch: int) -> dict[str, int]:
    """Instructions of every kernel of a binary, by mangled name; empty without a disassembler."""
    tool = disassembler(arch)
    if tool is None:
        return {}
    listing = subprocess.run([tool, "-c", str(binary)], capture_output=True, text=True, timeout=600).stdout
    sections = re.split(r"^\.text\.(\w+):$", listing, flags=re.M)
    counts = [len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)) for code in sections[2::2]]
    return dict(zip(sections[1::2], counts, strict=True))


def compile_kernels(arch: int) -> list[Compiled]:
    """Compile every CUDA C++ kernel for an architecture (80 for sm_80).

    Raises:
        BuildError: there is no nvcc, or it fails.
    """
    nvcc = compiler()
    if nvcc is None:
        raise BuildError(f"nvcc was not found: {REMEDY}")
    found: list[Compiled] = []
    for source in FILES:
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernels.cubin"
            command = [nvcc, *FLAGS, f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", str(source), "-o", str(binary)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode != 0:
                raise BuildError(f"nvcc can't compile {source.name} for sm_{arch}: {done.stderr.strip()[:500]}")
            found += parse_report(done.stdout + done.stderr, arch, _instructions(binary, arch))
    return found
