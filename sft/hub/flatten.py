"""One flat Python file out of several: how the plain torch form of the ops travels with a checkpoint.

transformers runs a checkpoint's code only where it is flat: files in one folder, relative imports, no third package.
The torch form of every op exists once, in `sambay_kernels`; this module joins those files into `ops_phi4flash.py`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

OPS = (
    "causal_conv1d",
    "differential_attention",
    "differential_attention_step",
    "gmu_gate",
    "linear_cross_entropy",
    "selective_scan",
)

HEADER = '''"""Plain torch form of the ops that modeling_phi4flash.py is built on.

Written by `sft export` out of sambay_kernels' torch backends; needs torch alone. Where `sambay_kernels` is installed,
its kernels take the place of these functions (end of the file).
"""

from __future__ import annotations
'''


@dataclass
class _Parts:
    """What one source file contributes."""

    name: str
    imports: list[str] = field(default_factory=list)
    borrowed: dict[str, str] = field(default_factory=dict)  # name -> where it is imported from, inside our packages
    defined: dict[str, str] = field(default_factory=dict)  # name -> its definition's syntax tree as text
    body: str = ""


def flatten(sources: Sequence[Path], *, packages: Sequence[str] = ("sambay_kernels",)) -> str:
    """The text of one module that holds everything `sources` define, in their order.

    Module docstrings and `__all__` are left out, imports are collected on top, imports from `packages` and relative
    ones are dropped because the names they bring stand in the same file.

    Args:
        sources: Python files that import only the standard library, torch and each other.
        packages: top-level packages whose modules are among the sources.

    Raises:
        ValueError: a name is defined twice in different ways, a dropped import's name is not defined by any source, an
            import is renamed on the way, or a file needs a package besides torch.
    """
    parts = [_take_apart(path, packages) for path in sources]
    _check_names(parts)
    imports = sorted(
        {line for part in parts for line in part.imports}, key=lambda line: (line.startswith("from"), line)
    )
    sections = [f"# ---- {part.name} ----\n{part.body}" for part in parts]
    text = "\n\n".join(["\n".join(imports), *sections])
    compile(text, "flattened ops", "exec")
    return text


def ops_file(kernels: Path, public: Path) -> str:
    """The text of an exported checkpoint's `ops_phi4flash.py`.

    Args:
        kernels: folder of the package `sambay_kernels`; every `torch_backend.py` in it, and what those import from
            it, is taken.
        public: file with the public functions, written against those backends.
    """
    backends = sorted(kernels.glob("*/torch_backend.py"))
    if not backends:
        raise ValueError(f"{kernels} holds no */torch_backend.py: the torch form of the ops is missing")
    sources = _with_helpers(backends, kernels)
    names = "".join(f"        {op},\n" for op in OPS)
    guard = f"try:\n    from sambay_kernels import (\n{names}    )\n"
    guard += "except ImportError:\n    pass  # the functions above serve"
    text = f"{HEADER}\n{flatten([*sources, public])}\n\n{guard}\n"
    defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    missing = sorted(set(OPS) - defined)
    if missing:
        raise ValueError(f"the flattened ops lack {', '.join(missing)}")
    return text


def _with_helpers(backends: Sequence[Path], package: Path) -> list[Path]:
    """The backends, each behind the files of the package that it imports."""
    ordered: list[Path] = []

    def visit(path: Path) -> None:
        if path in ordered:
            return
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                visit(_relative_target(path, node))
        ordered.append(path)

    for backend in backends:
        visit(backend)
    return [path for path in ordered if path.is_relative_to(package)]


def _relative_target(path: Path, node: ast.ImportFrom) -> Path:
    """The file that a relative import in `path` names."""
    folder = path.parents[node.level - 1]
    target = folder.joinpath(*(node.module or "").split(".")).with_suffix(".py") if node.module else None
    if target is None or not target.is_file():
        raise ValueError(f"{path}:{node.lineno}: only `from .file import name` can be flattened")
    return target


def _take_apart(path: Path, packages: Sequence[str]) -> _Parts:
    """Split one file into imports, borrowed names, definitions and the text of the rest."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    part = _Parts(name=f"{path.parent.name}/{path.name}")
    dropped: set[int] = set()
    for index, node in enumerate(ast.parse(text).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            _sort_import(part, node, path, packages)
        elif not (_is_docstring(node) and index == 0) and not _assigns_all(node):
            _record_definition(part, node, path)
            continue
        dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    kept = [line for number, line in enumerate(lines, start=1) if number not in dropped]
    part.body = "\n".join(kept).strip("\n")
    return part


def _sort_import(part: _Parts, node: ast.Import | ast.ImportFrom, path: Path, packages: Sequence[str]) -> None:
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return
    if isinstance(node, ast.ImportFrom) and (node.level or _top(node.module) in packages):
        for alias in node.names:
            if alias.asname not in (None, alias.name) or alias.name == "*":
                raise ValueError(
                    f"{path}:{node.lineno}: import {alias.name} by its own name, so that it can be flattened"
                )
            part.borrowed[alias.name] = f"{path}:{node.lineno}"
        return
    modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    for module in modules:
        if _top(module) != "torch" and _top(module) not in sys.stdlib_module_names:
            raise ValueError(f"{path}:{node.lineno}: {module} is not torch or the standard library; it can't travel")
    # One line for each name, so that the same import in two files is the same line.
    head = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
    part.imports += [head + alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in node.names]


def _record_definition(part: _Parts, node: ast.stmt, path: Path) -> None:
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and inner.level:
            raise ValueError(f"{path}:{inner.lineno}: a relative import inside a definition can't be flattened")
    for name in _names_of(node):
        part.defined[name] = ast.dump(node)


def _names_of(node: ast.stmt) -> Iterable[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _check_names(parts: Sequence[_Parts]) -> None:
    owner: dict[str, _Parts] = {}
    for part in parts:
        for name, tree in part.defined.items():
            if name in owner and owner[name].defined[name] != tree:
                raise ValueError(f"{name} is defined in {owner[name].name} and, differently, in {part.name}")
            owner.setdefault(name, part)
    for part in parts:
        for name, place in part.borrowed.items():
            if name not in owner:
                raise ValueError(f"{place}: {name} is defined in none of the files to flatten")


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _assigns_all(node: ast.stmt) -> bool:
    return "__all__" in _names_of(node)


def _top(module: str | None) -> str:
    return (module or "").split(".")[0]
