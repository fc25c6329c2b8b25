"""The house: imports run one way between its rooms, and never in a circle, lazy ones counted too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# A room may import from those below its own line, and from its own line only itself; the last line is open to all.
LINES = (
    ("sft.cli",),
    ("sft.run",),
    ("sft.report",),
    ("sft.train", "sft.evaluate", "sft.hub"),
    ("sft.data.look",),
    ("sft.data.prepare",),
    ("sft.data.engine",),
    ("sft.data.steps",),
    ("sft.data.pack", "sft.data.store"),
    ("sft.data.tokenize",),
    ("sft.data.read",),
    ("sft.data.text",),
    ("sft.serve",),
    ("sft.generate",),
    ("sft.models",),
    ("sft.answers", "sft.tokenizers"),
    ("sambay_kernels",),
)
OPEN = ("sft.recipe", "sft.utils")
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed", "sambay_kernels"}
HEAVY |= {"fastapi", "uvicorn", "starlette"}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the two packages by its dotted name."""
    found = {}
    for package in (root / "sft", root / "kernels" / "sambay_kernels"):
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path], *, top_only: bool = False) -> Iterator[tuple[str, int]]:
    """What a module imports: (module, line). Imports for type checkers don't count."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _running(ast.parse(path.read_text(encoding="utf-8")).body, top_only):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in known else base), node.lineno


def _running(body: list[ast.stmt], top_only: bool) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        yield from ast.walk(node)


def room(name: str) -> str | None:
    """The room of the house that a module stands in."""
    names = [entry for line in LINES for entry in line] + list(OPEN)
    return next((entry for entry in names if name == entry or name.startswith(f"{entry}.")), None)


def level(entry: str) -> int:
    return next((number for number, line in enumerate(LINES) if entry in line), len(LINES))


def test_imports_run_one_way(repo_root: Path) -> None:
    known = modules(repo_root)
    wrong = []
    for name, path in known.items():
        here = room(name)
        for target, line in imports(name, path, known):
            there = room(target)
            if here is None or there is None or here == there:
                continue
            up = level(there) <= level(here) if there not in OPEN else False
            if up or (here in OPEN and there not in OPEN):
                wrong.append(f"{name}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_circle(repo_root: Path) -> None:
    known = modules(repo_root)
    graph = {
        name: {t for t, _ in imports(name, path, known) if t in known and t != name} for name, path in known.items()
    }
    circles = _circles(graph)
    assert not circles, "\n".join(" -> ".join(circle) for circle in circles)


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected parts with more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            part = [stack.pop()]
            while part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_help_and_recipes_import_nothing_heavy(repo_root: Path) -> None:
    known = modules(repo_root)
    wrong = [
        f"{name}:{line} imports {target}"
        for name, path in known.items()
        if room(name) in ("sft.cli", "sft.recipe")
        for target, line in imports(name, path, known, top_only=True)
        if target.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_the_kernels_know_torch_alone(repo_root: Path) -> None:
    known = modules(repo_root)
    wrong = [
        f"{name}:{line} imports {target}"
        for name, path in known.items()
        if name.startswith("sambay_kernels")
        for target, line in imports(name, path, known)
        if target.split(".")[0] in (HEAVY | {"sft"}) - {"torch", "sambay_kernels"}
    ]
    assert not wrong, "\n".join(wrong)
