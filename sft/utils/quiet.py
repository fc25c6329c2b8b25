"""Libraries that talk less: what they warn of goes to a file, their errors and what is ours to the terminal."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from sft.utils.errors import shown
from sft.utils.progress import end_line

LOG_FILE = "libraries.log"
OURS = ("sft", "sambay_kernels")


def quiet_libraries(folder: Path | None = None, *, debug: bool = False) -> None:
    """From here on warnings of libraries are written to `libraries.log` in `folder`, once that is there (else, and
    without one, in ~/.cache/sambay-sft), and not to the terminal; with `debug` also to the terminal.

    Errors of libraries, and all that this project warns of, are told on the terminal. Call before the first heavy
    import: a logger that is there already is left as it is.
    """
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
        ("DS_LOG_LEVEL", "warning"),
    ):
        os.environ.setdefault(name, value)
    # It has a logger class of its own, whose warnings would stay on the terminal.
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        # Bars are for eyes; in a log each of their steps would be a line.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _route.asked = (folder, debug)
    logging.setLoggerClass(_Logger)
    tell_our_warnings()
    warnings.showwarning = _show_warning


class _Route:
    """Where what libraries say goes; `asked`: what `quiet_libraries` was called with, if it was."""

    asked: tuple[Path | None, bool] | None = None

    def note(self, text: str) -> None:
        """Write a library's warning to the file; where there can be none it is told."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.strip()}\n"
        with suppress(OSError):
            with open(self._file(), "a", encoding="utf-8", errors="backslashreplace") as handle:
                handle.write(line)
            if not (self.asked and self.asked[1]):
                return
        tell(text)

    def _file(self) -> Path:
        folder = self.asked[0] if self.asked else None
        if folder is not None and folder.is_dir():
            return folder / LOG_FILE
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sambay-sft"
        home.mkdir(parents=True, exist_ok=True)
        return home / LOG_FILE


_route = _Route()


def asked() -> tuple[Path | None, bool] | None:
    """What a process that is started from here gives to `quiet_libraries`; None where this one wasn't made quiet."""
    return _route.asked


def tell(text: str) -> None:
    """A warning on the terminal, below a line of progress that may be there."""
    end_line()
    for line in text.strip().splitlines():
        print(shown(line), file=sys.stderr, flush=True)


class _Logger(logging.getLoggerClass()):  # type: ignore[misc]
    """A logger whose warnings go to the file, whatever handlers its library has given it."""

    def callHandlers(self, record: logging.LogRecord) -> None:
        """Sort a record by whose it is and how bad it is."""
        if self.name.split(".")[0] in OURS or record.levelno >= logging.ERROR:
            super().callHandlers(record)
        elif record.levelno >= logging.WARNING:
            _route.note(f"{record.name}: {record.getMessage()}")


class _Told(logging.Handler):
    """Our own warnings, told as everything else is."""

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it, without `sft:`, which stands before what ends a command."""
        tell(record.getMessage())


def tell_our_warnings() -> None:
    """What this project's loggers warn of is told as everything else is."""
    for logger in map(logging.getLogger, OURS):
        if not any(isinstance(handler, _Told) for handler in logger.handlers):
            logger.addHandler(_Told(logging.WARNING))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line: of ours on the terminal, without its place in the code; of libraries in the file."""
    if any(folder in Path(filename).parents for folder in _our_folders()):
        tell(str(message))
    else:
        _route.note(f"{filename}:{lineno}: {category.__name__}: {message}")


@cache
def _our_folders() -> list[Path]:
    specs = [find_spec(name) for name in OURS]
    return [Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ()]


@contextmanager
def no_library_bars() -> Iterator[None]:
    """Keep transformers' own progress bars, one for each file loaded or saved, off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
