"""An OpenAI-compatible server on 127.0.0.1, for tests: chat and text completions, and faults on demand.

What it answers is a function of the request alone, so that two runs can be compared. A token is a word with the space
before it; answers longer than `max_tokens` of them are cut off with `finish_reason: length`.
"""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_WORD = re.compile(r"\s*\S+|\s+$")


@dataclass
class Fault:
    """What goes wrong with the first `times` requests whose last message or prompt has `match` in it.

    action: a status code; "stall" (no answer until the client goes away, or `server.close`), "cut" (half of the body),
    "drop" (no answer at all), "malformed" (half of the JSON as a whole body), "html" (200 with a page), "error" (200
    with an `error` and no choices).
    """

    action: int | str
    times: int = 1_000_000
    match: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "made to fail by the test"
    code: str | None = None


@dataclass
class Seen:
    """One request as the server saw it; `ended` is when its answer was on its way (None: never)."""

    path: str
    body: dict[str, Any]
    authorization: str | None
    arrived: float
    status: int | str = 0
    ended: float | None = None

    @property
    def asked(self) -> str:
        """The last message, or the prompt."""
        return str(self.body["messages"][-1]["content"] if self.path == CHAT else self.body["prompt"])

    @property
    def name(self) -> tuple[str, Any]:
        """(what is asked, seed): one for each problem and rollout."""
        return self.asked, self.body.get("seed")


def answer_to(seen: Seen) -> dict[str, Any]:
    """Default of `TeacherServer.reply`: says what it was asked, and the seed."""
    mark = zlib.crc32(f"{seen.asked}{seen.body.get('seed')}".encode())
    return {"content": f"<think>\nI was asked {seen.asked!r}.\n</think>\n\nThe answer is \\boxed{{{mark}}}."}


def named_tokens(pieces: list[bytes], count: int) -> list[dict[str, Any]]:
    """The tokens of a chat answer's `logprobs`: at each the piece itself, of probability 1/2, then `count` - 1 others
    of the text, those that follow it in order of their bytes, each half as likely as the one before."""
    others = sorted(set(pieces))

    def named(raw: bytes, rank: int) -> dict[str, Any]:
        return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": -math.log(2) * (rank + 1)}

    content = []
    for piece in pieces:
        at = others.index(piece)
        ranked = [*others[at:], *others[:at]][:count]
        content.append({**named(piece, 0), "top_logprobs": [named(raw, rank) for rank, raw in enumerate(ranked)]})
    return content


class TeacherServer:
    """The server. `reply(seen)` gives the message of an answer (`content`, `reasoning_content`, ...), and may give
    `finish_reason`, `logprobs` and `usage` beside them; `delay` seconds pass before every answer. Where `pieces` cuts a
    text into its tokens' bytes, the server gives log probabilities when it is asked for them."""

    def __init__(self, reply: Callable[[Seen], dict[str, Any]] = answer_to, *, delay: float = 0.0) -> None:
        self.reply, self.delay = reply, delay
        self.pieces: Callable[[str], list[bytes]] | None = None
        self.faults: list[Fault] = []
        self.key: str | None = None
        self.model = "toy-teacher"
        self.seen: list[Seen] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def answered(self) -> Counter[tuple[str, Any]]:
        """How often each (question, seed) was answered."""
        with self._lock:
            return Counter(seen.name for seen in self.seen if seen.status == 200 and seen.ended is not None)

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def arrive(self, seen: Seen) -> Fault | None:
        """Note a request; what goes wrong with it."""
        with self._lock:
            self.seen.append(seen)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            for fault in self.faults:
                if fault.times and fault.match in seen.asked:
                    fault.times -= 1
                    return fault
        return None

    def leave(self, seen: Seen) -> None:
        with self._lock:
            self._at_once -= 1

    def wait(self, seconds: float) -> None:
        """Sleep, unless the server is closed."""
        self._closing.wait(seconds)

    def body(self, seen: Seen) -> dict[str, Any]:
        """The JSON that answers a request."""
        said = dict(self.reply(seen))
        extra = {key: said.pop(key) for key in ("finish_reason", "logprobs", "usage") if key in said}
        limit = seen.body.get("max_tokens") or seen.body.get("max_completion_tokens") or 1 << 30
        words = _WORD.findall(said["content"] or "")
        finish = extra.get("finish_reason") or ("length" if len(words) > limit else "stop")
        if len(words) > limit:
            said["content"] = "".join(words[:limit])
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        if seen.path == CHAT:
            choice |= {"message": {"role": "assistant", **said}}
        else:
            choice |= {"text": said["content"]}
        if "logprobs" in extra:
            choice["logprobs"] = extra["logprobs"]
        elif self.pieces is not None and seen.body.get("logprobs"):
            said_pieces = self.pieces(said["content"])
            choice["logprobs"] = {"content": named_tokens(said_pieces, seen.body.get("top_logprobs") or 0)}
        prompt = len(_WORD.findall(" ".join(m["content"] for m in seen.body.get("messages", [])) or seen.asked))
        usage = {"prompt_tokens": prompt, "completion_tokens": min(limit, len(words))}
        usage["total_tokens"] = sum(usage.values())
        return {"id": "x", "object": "x", "model": self.model, "choices": [choice], "usage": extra.get("usage", usage)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


def _handler(server: TeacherServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen = Seen(self.path, body, self.headers.get("authorization"), time.monotonic())
            fault = server.arrive(seen)
            try:
                server.wait(server.delay)
                self.answer(seen, fault)
            finally:
                server.leave(seen)

        def answer(self, seen: Seen, fault: Fault | None) -> None:
            if server.key is not None and seen.authorization != f"Bearer {server.key}":
                fault = Fault(401, message="Incorrect API key provided", code="invalid_api_key")
            elif seen.path not in (CHAT, COMPLETIONS):
                fault = Fault(404, message="no such page")
            if fault is None:
                seen.ended = time.monotonic()
                self.send(seen, 200, json.dumps(server.body(seen)).encode())
            elif isinstance(fault.action, int):
                error = {"error": {"message": fault.message, "code": fault.code, "type": "x", "param": None}}
                self.send(seen, fault.action, json.dumps(error).encode(), fault.headers)
            else:
                self.misbehave(seen, fault)

        def misbehave(self, seen: Seen, fault: Fault) -> None:
            whole = json.dumps(server.body(seen)).encode()
            half = whole[: len(whole) // 2]
            if fault.action == "stall":
                seen.status = "stall"
                server.wait(300)
            elif fault.action == "cut":
                self.send(seen, 200, half, {"content-length": str(len(whole))})
            elif fault.action == "malformed":
                self.send(seen, 200, half)
            elif fault.action == "html":
                self.send(seen, 200, b"<html>back soon</html>", {"content-type": "text/html"})
            elif fault.action == "error":
                self.send(seen, 200, json.dumps({"error": {"message": fault.message, "code": 502}}).encode())
            else:
                assert fault.action == "drop", fault.action
            if fault.action in ("cut", "drop"):
                seen.status = fault.action
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif fault.action != "stall":
                seen.status = fault.action

        def send(self, seen: Seen, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            seen.status = status
            self.send_response(status)
            fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
            for name, value in fields.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    return Handler


@contextmanager
def serving(reply: Callable[[Seen], dict[str, Any]] = answer_to, *, delay: float = 0.0) -> Iterator[TeacherServer]:
    """A server for the duration of a block."""
    server = TeacherServer(reply, delay=delay)
    try:
        yield server
    finally:
        server.close()
