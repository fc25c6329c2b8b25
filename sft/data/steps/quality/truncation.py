"""Signs that a text was cut off before its end. Few, and sure: a good text must not have them."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_FENCE = re.compile(r"^[ \t>]*(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)?(`{3,})([^`\n]*)$", re.MULTILINE)
_BACKTICKS = re.compile(r"`{3,}")
_MIDDLE = frozenset(",;:({[-+*/=<\\^_&")


def cut_off(text: str) -> str | None:
    """What shows that the text was cut off, or None: an open formula box, or an open code fence, at its end."""
    if _open_box(text):
        return "a \\boxed{ is never closed"
    if _open_fence(text):
        return "a code fence is never closed"
    return None


def _open_box(text: str) -> bool:
    """Whether the last box's braces are open at the end of the text."""
    boxes = [box.end() for box in _BOX.finditer(text)]
    if not boxes:
        return False
    depth = 1
    for brace in _BRACES.finditer(text, boxes[-1]):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return False
    return True


def _open_fence(text: str) -> bool:
    """Whether the text ends inside a fenced code block (CommonMark 4.5), of backticks.

    Both must say so: the fences at the beginnings of lines, and the number of all. Some texts open one within a line.
    """
    if "```" not in text or len(_BACKTICKS.findall(text)) % 2 == 0:
        return False
    opened = 0
    for fence in _FENCE.finditer(text):
        if not opened:
            opened = len(fence.group(1))
        elif len(fence.group(1)) >= opened and not fence.group(2).strip():
            opened = 0
    return opened > 0


def in_the_middle(text: str) -> bool:
    """Whether the text stops in the middle of a sentence or formula, as far as its last character says."""
    last = text.rstrip()[-1:]
    return last.isalnum() or last in _MIDDLE
