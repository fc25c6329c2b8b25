"""The package's house: imports run one way, files hold one idea, functions stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import sambay_kernels

PACKAGE = Path(sambay_kernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Which folder may import which; a folder may import itself.
ARROWS = {
    "": {"ops", "runtime"},
    "ops": {"runtime", "native", "triton"},
    "tools": {"ops", "native", "triton"},
    "triton": {"runtime"},
    "native": set(),
    "runtime": set(),
}
# Public functions, and the plain torch forms that stand in their place in an exported checkpoint.
PUBLIC = {*sambay_kernels.__all__, *(f"{name}_torch" for name in sambay_kernels.__all__)}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """The package's own modules that a file imports, those inside functions too."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("sambay_kernels") for alias in node.names), f"{path}: not relative"
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                longer = ".".join([*base, alias.name])
                yield longer if longer in MODULES else ".".join(base)


def test_imports_run_one_way() -> None:
    for name, path in MODULES.items():
        folder = name.split(".")[0] if path.parent != PACKAGE else ""
        others = {target.split(".")[0] for target in imports(path)} - {folder}
        assert others <= ARROWS[folder], f"{name} imports {sorted(others - ARROWS[folder])}"


def test_no_circle() -> None:
    graph = {name: set(imports(path)) - {name} for name, path in MODULES.items()}
    done: set[str] = set()
    while graph:
        free = [name for name, needed in graph.items() if needed <= done]
        assert free, f"a circle among {sorted(graph)}"
        done.update(free)
        for name in free:
            del graph[name]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_functions_are_small(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            jit = any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
            count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
            assert jit or node.name in PUBLIC or count <= 8, f"{path}: {node.name} takes {count} arguments"
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert jit or lines <= 60, f"{path}: {node.name} has {lines} lines"


def test_no_file_of_an_op_is_a_script() -> None:
    """They are called `torch` and `triton`: run from their folder they would hide the packages of that name."""
    for path in FILES:
        if path.is_relative_to(PACKAGE / "ops"):
            assert "__main__" not in path.read_text(), path
