"""Rows of a .json file: a list of objects, or an object on each line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from sft.utils.errors import UserError

_SPACE = re.compile(r"\s*")
_BLANK = b"\xef\xbb\xbf \t\r\n"


def holds_list(path: Path) -> bool:
    """Whether the file is a list, not lines. Raises UserError for one object over several lines, which is no rows."""
    with path.open("rb") as handle:
        first = next((line for line in handle if line.strip(_BLANK)), b"").strip(_BLANK)
    if first[:1] == b"{" and not _is_json(first) and _is_json(path.read_bytes()):
        raise UserError(f"{path}: holds one JSON object; expected a list of objects, or an object on each line.")
    return first[:1] == b"["


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        return False
    return True


def list_lines(path: Path) -> Iterator[bytes]:
    """Each element of the list as a line of JSON. Bytes that aren't UTF-8 become halves of surrogate pairs.

    Raises UserError where the list breaks off: no rows can be told apart from there on.
    """
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    decoder = json.JSONDecoder()
    at = _skip(text, _skip(text, 0) + 1)
    while text[at : at + 1] != "]":
        try:
            value, at = decoder.raw_decode(text, at)
            yield json.dumps(value).encode() + b"\n"
        except (ValueError, RecursionError) as error:
            raise _broken(path, text, at, str(error)) from error
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise _broken(path, text, at, "expected a comma or the list's end")
    if text[at + 1 :].strip():
        raise _broken(path, text, at + 1, "something follows the list")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _broken(path: Path, text: str, at: int, what: str) -> UserError:
    return UserError(f"{path}: not readable JSON at line {text.count(chr(10), 0, at) + 1}: {what}; mend the file.")
