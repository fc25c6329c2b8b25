"""Functions stay short, and take few things at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

LINES, PARAMETERS = 60, 8

# Kernels are written out; what torch registers, and the plain form that travels with a checkpoint, have the op's own
# signature.
KERNELS = ("_kernel", "_fwd", "_bwd", "_step", "_flops", "_torch")
# Calls that people write by keywords, from outside: each option is theirs.
PUBLIC = {
    "sft.generate.engine.generate_batch",
    "sft.hub.export.export",
    "sft.hub.push.push",
    "sft.models.sambay.configuration_phi4flash.__init__",
    "sft.models.sambay.modeling_phi4flash.forward",
    "sft.train.stage.train_stage",
}


def functions(root: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the two packages by its module's and its own name."""
    for package in (root / "sft", root / "kernels" / "sambay_kernels"):
        for path in sorted(package.rglob("*.py")):
            module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{module}.{node.name}", node


def is_kernel(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    decorated = any("jit" in ast.dump(decorator) for decorator in node.decorator_list)
    return name.startswith("sambay_kernels.") and (decorated or ".api." in name or name.endswith(KERNELS))


def test_functions_are_short(repo_root: Path) -> None:
    long = [
        f"{name}: {length} lines"
        for name, node in functions(repo_root)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > LINES and not is_kernel(name, node)
    ]
    assert not long, "\n".join(long)


def test_functions_take_few_parameters(repo_root: Path) -> None:
    wide = []
    for name, node in functions(repo_root):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls", "ctx") for argument in arguments)
        if count > PARAMETERS and name not in PUBLIC and not is_kernel(name, node):
            wide.append(f"{name}: {count} parameters")
    assert not wide, "\n".join(wide)
