"""Servers of a small random model, in this process and over real sockets."""

from __future__ import annotations

import functools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from children import read_line
from http_client import httpx
from run_toys import SHAPE

NAME = "toy"


@functools.cache
def toy() -> tuple[Any, Any]:
    """A model with random weights, and the tiny tokenizer."""
    import torch

    from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM
    from sft.tokenizers.tiny import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Phi4FlashConfig(**SHAPE, vocab_size=(len(tokenizer) + 63) // 64 * 64, bos_token_id=None, **ends)
    return Phi4FlashForCausalLM(config).eval(), tokenizer


def toy_engine(batch_size: int = 4, **options: Any) -> Any:
    """An engine of that model."""
    from sft.generate import Engine

    return Engine(*toy(), batch_size=batch_size, **options)


class Running:
    """A server that runs."""

    def __init__(self, listener: Any) -> None:
        self.listener = listener
        self.finished: bool | None = None

    @property
    def front(self) -> Any:
        """Its engine."""
        return self.listener.service.front

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.listener.port}"

    def client(self, **options: Any) -> Any:
        """The official client, which asks once."""
        import openai

        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        )

    def post(self, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        """The response to a body: JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self.url + path, content=content, timeout=60, **options)

    def connect(self) -> socket.socket:
        """A connection."""
        return socket.create_connection(("127.0.0.1", self.listener.port), timeout=30)

    def until(self, true: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait for something to become true."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it didn't become true in time"
            time.sleep(0.01)

    @property
    def idle(self) -> bool:
        """Nobody is answered, and nothing is held."""
        batch = self.front._batch
        used = self.front.pages[0]
        return not (self.front.pending or self.front._owner or self.front.live or batch.rows or used)


@contextmanager
def running(engine: Any = None, max_length: int = 256, **settings: Any) -> Iterator[Running]:
    """A server for the duration of a block; it has nothing under way at its end."""
    from sft.generate.streaming import AsyncEngine
    from sft.serve.installed import bind
    from sft.serve.listen import Listener
    from sft.serve.settings import Settings

    front = AsyncEngine(engine or toy_engine(), longest=max_length)
    listener = Listener(front, Settings(name=NAME, max_length=max_length, **settings), bind("127.0.0.1", 0))
    made, ready, failed = Running(listener), threading.Event(), []

    def run() -> None:
        try:
            made.finished = listener.run(signals=False, ready=ready.set)
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30) and not failed, failed
    try:
        yield made
    finally:
        listener.stop()
        thread.join(60)
        assert not thread.is_alive() and not failed, failed


def chat(text: str = "2 + 2?", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}


@contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """(process, its address, where its standard output goes) of `sft serve --model MODEL`."""
    log = model.with_name("served.log")
    command = [sys.executable, "-u", "-m", "sft", "serve", "--model", str(model), "--port", "0", *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=out, text=True)
    try:
        line = read_line(process.stderr, 120)
        while "http://" not in line:
            assert line, log.read_text()
            line = read_line(process.stderr, 120)
        yield process, line.split(" at ")[1].split("/v1")[0], log
    finally:
        process.kill()
        process.wait(30)
