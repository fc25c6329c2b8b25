"""Codes of errors for scripts: they stay the same when a sentence is worded anew."""

from __future__ import annotations

import re
from typing import Any

from sft.utils.errors import UsageError, UserError, causes, disk_full, lost_peer

STALLED = 75
"""The exit code of a process whose stage got no further: sysexits.h's EX_TEMPFAIL, try again later."""

CODES = {
    "usage": "the command line is wrong",
    "recipe": "a recipe, a suite or a data recipe is wrong; `problems` has file, line and key of each mistake",
    "data": "rows can't be read, or not be worked on as the recipe says",
    "model": "a checkpoint, an adapter or its configuration can't be used",
    "tokenizer": "a tokenizer or its chat template can't be used",
    "training": "training can't begin or go on: it diverged, a file of its can't be used, the engine refuses",
    "evaluation": "problems can't be asked, or recorded answers not be used",
    "generation": "a prompt can't be answered",
    "hub": "the Hub, a server of a model, or what was uploaded there isn't as it has to be",
    "run": "the run's folder, record or processes aren't as they have to be",
    "report": "there is nothing to report",
    "processes": "one of several processes has failed or gone",
    "environment": "a package is missing, or a place can't be written",
    "disk-full": "the disk is full",
    "out-of-memory": "memory is full, of the machine or of a GPU",
    "interrupted": "a signal came; the same command continues",
    "stalled": "a stage got no further (train.stall_timeout)",
    "internal": "a mistake of ours or of a library: --debug shows where",
}
"""Code -> what it means."""

_OF_FOLDER = {
    "cli": "usage", "recipe": "recipe", "data": "data", "answers": "data", "models": "model", "tokenizers": "tokenizer",
    "train": "training", "evaluate": "evaluation", "generate": "generation", "hub": "hub", "serve": "generation",
    "report": "report", "run": "run", "utils": "environment",
}  # fmt: skip
_MISTAKE = re.compile(r"(?:(?P<file>[^:\n]+):(?P<line>\d+): |--)(?P<key>[\w.\[\]-]+): (?P<message>.*)")


def code_of(error: BaseException) -> str:
    """An error's code: by what happened, else by the folder of `sft` that raised it."""
    if isinstance(error, KeyboardInterrupt) or getattr(error, "exit_code", 0) > 128:
        return "interrupted"
    if not isinstance(error, UserError):
        return _of_failure(error)
    if any(type(seen).__name__ == "OutOfMemoryError" for seen in causes(error)):
        return "out-of-memory"
    if disk_full(error):
        return "disk-full"
    found = _OF_FOLDER[_folder(error)]
    return "usage" if isinstance(error, UsageError) and found != "recipe" else found


def _of_failure(error: BaseException) -> str:
    if disk_full(error):
        return "disk-full"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out-of-memory"
    return "processes" if lost_peer(error) else "internal"


def _folder(error: BaseException) -> str:
    """Of `sft`: where the innermost of our functions stands that the error came through."""
    found, place = "cli", error.__traceback__
    while place is not None:
        names = str(place.tb_frame.f_globals.get("__name__", "")).split(".")
        if names[0] == "sft" and len(names) > 1 and names[1] in _OF_FOLDER:
            found = names[1]
        place = place.tb_next
    return found


def as_json(error: BaseException, message: str, status: int) -> dict[str, Any]:
    """What is told of a command that failed: exit status, code, the sentence, and a recipe's mistakes one by one."""
    told: dict[str, Any] = {"code": code_of(error), "message": message}
    mistakes = [found.groupdict() for line in message.splitlines() if (found := _MISTAKE.fullmatch(line))]
    if mistakes:
        told["problems"] = [{**mistake, "line": mistake["line"] and int(mistake["line"])} for mistake in mistakes]
    return {"error": told, "exit_status": status}
