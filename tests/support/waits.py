"""Finds calls in Python source that may wait for ever: for a process, a thread, a queue, a lock, a socket."""

from __future__ import annotations

import ast
from pathlib import Path

RUNS = {"run", "call", "check_call", "check_output"}
WAITS = {"wait", "join", "get", "result", "recv", "acquire", "communicate", "exception"}
"""Methods that wait without a limit when they are called without an argument."""
REQUESTS = {"urlopen", "create_connection", "HTTPConnection", "HTTPSConnection"}
PIPES = {"stdin", "stdout", "stderr", "stream"}
BOUNDED = "bounded:"
"""A comment with this word, on the line of the call, says what limits it where no argument can."""


def unbounded_waits(path: Path) -> list[str]:
    """`file:line: call` of each call in `path` that has no limit."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Call, ast.With)) and _endless(node)]
    return [
        f"{path}:{node.lineno}: {lines[node.lineno - 1].strip()}"
        for node in found
        if not any(BOUNDED in line for line in lines[node.lineno - 1 : _end(node)])
    ]


def _end(node: ast.Call | ast.With) -> int:
    return node.body[0].lineno - 1 if isinstance(node, ast.With) else node.end_lineno or node.lineno


def _endless(node: ast.Call | ast.With) -> bool:
    if isinstance(node, ast.With):
        # Leaving it waits for the process.
        return any(_name(item.context_expr) == "Popen" for item in node.items)
    name, limits = _name(node), {keyword.arg for keyword in node.keywords}
    # An argument None waits for ever too.
    if any(keyword.arg == "timeout" and _is_none(keyword.value) for keyword in node.keywords):
        return True
    if "timeout" in limits:
        return False
    if name in RUNS and _owner(node) == "subprocess":
        return True
    if name in REQUESTS or (name == "flock" and "LOCK_NB" not in ast.unparse(node)):
        return "LOCK_UN" not in ast.unparse(node)
    if name == "waitpid":
        return "WNOHANG" not in ast.unparse(node)
    if name == "select" and _owner(node) == "select":
        return len(node.args) < 4
    if name in ("read", "readline", "readlines") and _owner(node) in PIPES:
        return "sys.stdin" not in ast.unparse(node.func)
    if name == "wait" and len(node.args) == 1 and (isinstance(node.func, ast.Name) or _owner(node) == "futures"):
        return True  # concurrent.futures.wait(futures)
    bare = not node.args and limits <= {"block", "blocking"}
    return name in WAITS and isinstance(node.func, ast.Attribute) and (bare or any(map(_is_none, node.args[:1])))


def _name(node: ast.expr) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _owner(node: ast.Call) -> str:
    """The last name before the method: `stdout` in `process.stdout.read()`."""
    value = node.func.value if isinstance(node.func, ast.Attribute) else None
    return value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
