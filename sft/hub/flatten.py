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
    "add_layer_norm",
    "causal_conv1d",
    "causal_conv1d_step",
    "differential_attention",
    "differential_attention_step",
    "linear_cross_entropy",
    "selective_scan",
    "selective_scan_step",
    "swiglu",
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


def ops_file(kernels: Path) -> str:
    """The text of an exported checkpoint's `ops_phi4flash.py`.

    Every `ops/*/torch.py` of the package, and what those import from it, is taken; behind them stand public
    functions with the very signatures that `sambay_kernels` has, each calling the torch form `<name>_torch`.

    Args:
        kernels: folder of the package `sambay_kernels`.

    Raises:
        ValueError: the files can't be joined (see `flatten`), or an op has no torch form with its arguments.
    """
    backends = sorted(kernels.glob("ops/*/torch.py"))
    flat = flatten(_with_helpers(backends, kernels))
    forms = _functions([ast.parse(flat)])
    files = sorted([*kernels.glob("ops/*/api.py"), *kernels.glob("ops/*/step.py")])
    publics = _functions(ast.parse(path.read_text(encoding="utf-8")) for path in files)
    wrappers = "\n\n\n".join(_wrapper(op, publics, forms) for op in OPS)
    names = "".join(f"        {op},\n" for op in OPS)
    guard = (
        f"try:\n    from sambay_kernels import (\n{names}    )\nexcept ImportError:\n    pass  # the functions above"
    )
    if "Literal[" in wrappers:
        flat = f"from typing import Literal\n{flat}"
    text = f"{HEADER}\n{flat}\n\n\n# ---- public functions ----\n\n\n{wrappers}\n\n\n{guard}\n"
    compile(text, "ops_phi4flash.py", "exec")
    return text


def _functions(trees: Iterable[ast.Module]) -> dict[str, ast.FunctionDef]:
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def _wrapper(op: str, publics: dict[str, ast.FunctionDef], forms: dict[str, ast.FunctionDef]) -> str:
    """The text of a function with the public signature of `op` that calls its torch form by keywords."""
    public, form = publics.get(op), forms.get(f"{op}_torch")
    if public is None or form is None:
        raise ValueError(f"{op} has no {'torch form' if public else 'public function'} to export")
    arguments = [a.arg for a in (*public.args.args, *public.args.kwonlyargs)]
    accepted = {a.arg for a in (*form.args.args, *form.args.kwonlyargs)}
    lost = [name for name in arguments if name not in accepted]
    if lost:
        raise ValueError(f"{form.name} doesn't take {', '.join(lost)} of {op}")
    decorators = "".join(f"@{ast.unparse(node)}\n" for node in public.decorator_list)
    returns = f" -> {ast.unparse(public.returns)}" if public.returns else ""
    summary = (ast.get_docstring(public) or f"{op}.").splitlines()[0]
    passed = "".join(f"        {name}={name},\n" for name in arguments)
    return (
        f"{decorators}def {op}(\n{_parameters(public.args)}){returns}:\n"
        f'    """{summary}"""\n    return {form.name}(\n{passed}    )'
    )


def _parameters(arguments: ast.arguments) -> str:
    """A function's parameters, one a line; defaults have to be literals, because a name would be undefined there."""
    plain: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults))
    lines = [_parameter(*pair) for pair in zip(arguments.args, [*plain, *arguments.defaults], strict=True)]
    lines += ["*"] if arguments.kwonlyargs else []
    lines += [_parameter(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return "".join(f"    {line},\n" for line in lines)


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = argument.arg + (f": {ast.unparse(argument.annotation)}" if argument.annotation else "")
    return text if default is None else f"{text} = {ast.literal_eval(default)!r}"


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
