"""Every answer that was paid for, on disk as soon as it is there.

`answers-0000.jsonl`, `answers-0001.jsonl`, ...: one file for each process that wrote, one line for each request that
ended. A file is only ever appended to by the process that made it, so that a line torn by a kill stays the last one.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sft.data.steps.generate.answer import Answer, Request

log = logging.getLogger(__name__)

_PATTERN = "answers-*.jsonl"


class Journal:
    """Answers by the key of their request. In memory is only where each is: about 200 bytes."""

    def __init__(self, folder: Path, seen: Callable[[int, dict[str, Any]], None]) -> None:
        """Read what is in `folder`; `seen(number of the file, line)` is called for every whole line, old or new."""
        self._folder, self._seen = folder, seen
        self._places: dict[bytes, tuple[int, int]] = {}
        self._file: int | None = None
        self._number = 0
        self._started = time.monotonic()
        for path in sorted(folder.glob(_PATTERN)):
            self._read(path)

    def __contains__(self, request: Request) -> bool:
        return bytes.fromhex(request.key) in self._places

    def get(self, request: Request) -> Answer | None:
        """The answer to `request`, or None."""
        place = self._places.get(bytes.fromhex(request.key))
        if place is None:
            return None
        with self._path(place[0]).open("rb") as handle:
            handle.seek(place[1])
            return Answer.from_json(json.loads(handle.readline())["answer"])

    def add(self, request: Request, answer: Answer, retries: int) -> None:
        """Keep an answer; it is on disk when this returns."""
        self._append({**self._head(request, retries), "answer": answer.to_json()})

    def add_failure(self, request: Request, why: str, retries: int) -> None:
        """Note that a request was given up. It counts as not asked when the journal is read again."""
        self._append({**self._head(request, retries), "failed": why})

    def close(self) -> None:
        """Close the file that is written to."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _head(self, request: Request, retries: int) -> dict[str, Any]:
        seconds = round(time.monotonic() - self._started, 3)
        return {"key": request.key, "who": request.who, "retries": retries, "seconds": seconds}

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is None:
            self._file = self._create()
        offset = os.lseek(self._file, 0, os.SEEK_END)
        # ASCII, so that half surrogates survive, and a torn character can't be.
        raw = json.dumps(line).encode("ascii") + b"\n"
        try:
            while raw:
                raw = raw[os.write(self._file, raw) :]
            os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, offset)
            raise
        self._note(self._number, offset, line)

    def _create(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND
                descriptor = os.open(self._path(self._number), flags, 0o644)
                break
            except FileExistsError:
                self._number += 1
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return descriptor

    def _path(self, number: int) -> Path:
        return self._folder / f"answers-{number:04d}.jsonl"

    def _read(self, path: Path) -> None:
        number, broken = int(path.stem.rpartition("-")[2]), 0
        for offset, raw in _lines(path):
            try:
                line = json.loads(raw)
                self._note(number, offset, line)
            except (ValueError, KeyError, TypeError):
                broken += 1
        if broken:
            log.warning("%s: %d broken lines; what they answered will be asked again", path, broken)

    def _note(self, number: int, offset: int, line: dict[str, Any]) -> None:
        key = bytes.fromhex(line["key"])
        self._seen(number, line)
        if line.get("answer") is not None:
            self._places[key] = (number, offset)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that has its end: the last one of a killed process may not."""
    offset = 0
    with path.open("rb") as handle:
        for raw in handle:
            if raw.endswith(b"\n"):
                yield offset, raw
            offset += len(raw)
