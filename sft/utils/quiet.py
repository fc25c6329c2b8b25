"""Libraries that talk less: their start-up chatter, their warnings' places in the code, their progress bars."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKERS = (
    "DeepSpeed",
    "accelerate",
    "torch.distributed.elastic",
    "torch.utils.cpp_extension",
    "absl",
    "httpx",
    "filelock",
)


def quiet_libraries() -> None:
    """Keep the libraries' start-up chatter off the terminal. Call before the first heavy import."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
        ("DS_LOG_LEVEL", "error"),
    ):
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        # Bars are for eyes; in a log each of their steps would be a line.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.formatwarning = _plain_warning


def _plain_warning(message: Warning | str, *place: object, **line: object) -> str:
    """A warning as one line for users, without the place in the code that gave it."""
    return f"sft: {message}\n"


@contextmanager
def no_library_bars() -> Iterator[None]:
    """Keep transformers' own progress bars, one for each file saved, off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
