"""`--json`: one object on standard output, and everything else on standard error.

A verb puts what it has to tell into `arguments.told`; `sft.cli.main` prints that when the verb is done, or what went
wrong. Where a command is several processes, rank 0 hands its object to the process that started them.
"""

from __future__ import annotations

import argparse
import atexit
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from sft.utils.files import atomic_open

HANDED_UP = "SFT_TOLD"
"""Set for processes that a command has started: the file that takes the object."""


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """`--json`, and `told`, where what it prints is gathered."""
    parser.add_argument("--json", action="store_true", help="tell the results as one JSON object (docs/json.md)")
    parser.set_defaults(told={})


def wants_json(words: Sequence[str]) -> bool:
    """Whether a command line asks for JSON; what stands after `--` is another command's."""
    own = words[: words.index("--")] if "--" in words else words
    return "--json" in own and list(own[:1]) != ["serve"]


@contextmanager
def spoken_aside(wanted: bool) -> Iterator[None]:
    """What is printed in here goes to standard error, also by processes that are started in here."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr), _descriptor_aside():
        yield


@contextmanager
def _descriptor_aside() -> Iterator[None]:
    """Of the process itself: libraries keep the stream that they found when they were imported."""
    if sys.__stdout__ is None or sys.__stderr__ is None:
        yield
        return
    out, kept = sys.__stdout__.fileno(), os.dup(sys.__stdout__.fileno())
    sys.__stdout__.flush()
    os.dup2(sys.__stderr__.fileno(), out)
    try:
        yield
    finally:
        sys.__stdout__.flush()
        os.dup2(kept, out)
        os.close(kept)


def tell(told: dict[str, Any]) -> None:
    """Print the object, or hand it to the process that started this one."""
    text = json.dumps(_finite(told), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    if path := os.environ.get(HANDED_UP):
        with atomic_open(path) as handle:
            handle.write(text)
    else:
        print(text)
        atexit.register(_fall_silent)  # runs before what libraries have registered, such as trackio's last words


def _fall_silent() -> None:
    """Let nothing come after the object: what is printed from now on goes to standard error."""
    sys.stdout.flush()
    sys.stdout = sys.stderr


def _finite(value: Any) -> Any:
    """A value in whose place of numbers that aren't finite, which JSON doesn't have, nothing stands."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def handed_up(wanted: bool) -> Iterator[dict[str, Any]]:
    """The object of processes that are started in here; it is there when they have ended, empty if none told one."""
    told: dict[str, Any] = {}
    if not wanted:
        yield told
        return
    with tempfile.TemporaryDirectory(prefix="sft-told-") as folder:
        path = Path(folder) / "told.json"
        os.environ[HANDED_UP] = str(path)
        try:
            yield told
        finally:
            del os.environ[HANDED_UP]
        if path.is_file():
            told |= json.loads(path.read_text(encoding="utf-8"))
