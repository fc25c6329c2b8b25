"""What compilers made of a kernel ahead of time, as one table for Triton and CUDA C++."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of one kernel. Spills and a stack frame are registers that went to memory.

    `warps` and `shared_bytes` are None where they are chosen at the launch.
    """

    kernel: str
    arch: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    instructions: int
    warps: int | None = None
    shared_bytes: int | None = None

    @property
    def local_bytes(self) -> int:
        """What a thread keeps in memory of its own for want of registers."""
        return max(self.spill_bytes, self.stack_bytes)


def table(found: list[Compiled]) -> str:
    """The compiled kernels as text, one a line."""
    lines = ["kernel                                arch  warps  registers  spill B  stack B  shared B  instructions"]
    lines += [
        f"{x.kernel:<36}  sm_{x.arch}  {'-' if x.warps is None else x.warps:>5}  {x.registers:>9}  {x.spill_bytes:>7}  "
        f"{x.stack_bytes:>7}  {'-' if x.shared_bytes is None else x.shared_bytes:>8}  {x.instructions:>12,}"
        for x in found
    ]
    return "\n".join(lines)


def tool(name: str, arch: int) -> str:
    """Path of a tool of the CUDA toolkit that Triton brings with it.

    Raises:
        ImportError: there is no Triton.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        ptxas = Path(get_ptxas(arch).path)
    except TypeError:  # older Triton
        ptxas = Path(get_ptxas().path)
    return str(ptxas if name == "ptxas" else ptxas.with_name(name))


def disassembler(arch: int) -> str | None:
    """Path of nvdisasm; None where there is none."""
    try:
        return tool("nvdisasm", arch)
    except ImportError:
        return None
