"""A server of the OpenAI API, asked for an answer piece by piece: what `sft chat --server` needs, and no library."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

from sft.utils.errors import RefusedPromptError, UserError, first_line, shown

Part = tuple[str, str]
"""A part of an answer: `answer`, `thought` or `mark`, and its text."""
PATIENCE = 600.0
"""Seconds without a word from the server."""


class Asked(NamedTuple):
    """The server's address (.../v1), its key, and which of its models."""

    url: str
    key: str | None
    model: str


def model_of(server: Asked) -> str:
    """The first model that a server has. Raises UserError."""
    with _open(server, "/models", None) as response:
        try:
            return str(json.load(response)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise UserError(f"{server.url}: no server of the OpenAI API: it doesn't tell its models") from None


def ask(server: Asked, fields: dict[str, Any]) -> Iterator[Part]:
    """An answer in parts; beside them ("finish", why it ended) and ("tokens", how many it has).

    Raises:
        RefusedPromptError: the server says that it can't answer this.
        UserError: it can't be reached, or doesn't answer in the API's form, or not to the end.
    """
    body = {**fields, "model": server.model, "stream": True, "stream_options": {"include_usage": True}}
    with _open(server, "/chat/completions", json.dumps(body).encode()) as response:
        try:
            for line in response:
                data = line.strip().removeprefix(b"data:").strip()
                if not line.startswith(b"data:"):
                    continue
                if data == b"[DONE]":
                    return
                yield from _parts(json.loads(data))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, http.client.HTTPException) as error:
            raise UserError(f"{server.url}: the answer broke off: {first_line(error)}") from None
    raise UserError(f"{server.url}: the answer broke off")


def _parts(chunk: dict[str, Any]) -> Iterator[Part]:
    if "error" in chunk:
        raise UserError(f"the server: {shown(str(chunk['error'].get('message'))[:500])}")
    for choice in chunk["choices"]:
        delta = choice["delta"]
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        for kind, text in (("thought", thought), ("answer", delta.get("content"))):
            if text:
                yield kind, text
        if choice.get("finish_reason"):
            yield "finish", choice["finish_reason"]
    if chunk.get("usage"):
        yield "tokens", str(chunk["usage"]["completion_tokens"])


def _open(server: Asked, path: str, body: bytes | None) -> Any:
    headers = {"Content-Type": "application/json"}
    if server.key is not None:
        headers["Authorization"] = f"Bearer {server.key}"
    try:
        request = urllib.request.Request(server.url + path, body, headers)
        return urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        with error:
            told = _message(error.read(1 << 16))
        kind = RefusedPromptError if error.code in (400, 413) else UserError
        raise kind(f"{server.url}: {error.code} {told or error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        raise UserError(f"{server.url} can't be reached: {reason}") from None


def _message(body: bytes) -> str | None:
    try:
        return shown(str(json.loads(body)["error"]["message"])[:500])
    except (ValueError, KeyError, TypeError):
        return None
