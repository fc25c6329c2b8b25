"""Marks for torch.compile that don't import it."""

from __future__ import annotations

import itertools
import subprocess
import sys

import torch
from sambay_kernels.runtime.compiling import constant_when_traced, not_traced


def test_the_marks_are_torchs_own() -> None:
    def plain() -> str:
        return "x"

    def marked() -> str:
        return "x"

    torch.compiler.assume_constant_result(plain)
    assert vars(constant_when_traced(marked)) == vars(plain)


def test_a_graph_breaks_around_what_is_not_traced_and_keeps_what_is_constant() -> None:
    seen: list[bool] = []
    answers = itertools.count(2)

    @not_traced
    def looked(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x

    @constant_when_traced
    def factor() -> int:
        return next(answers)

    # Without fullgraph: a break is what is wanted.
    traced = torch.compile(lambda x: looked(x * factor()) + 1, backend="eager")
    first = traced(torch.ones(2))
    assert torch.equal(traced(torch.ones(2)), first) and seen == [False, False]
    assert factor() == int(first[0]), "it was asked again after it was traced"


def test_the_ops_and_the_doctor_do_not_import_the_compiler() -> None:
    code = (
        "import sys, sambay_kernels; from sft.cli.main import main; main(['doctor', '--json']); "
        "slow = {'torch._dynamo', 'torch._inductor', 'transformers', 'datasets', 'trl', 'peft', 'deepspeed'}; "
        "print(sorted(slow & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stderr.strip().endswith("[]"), done.stderr
