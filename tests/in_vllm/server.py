"""vLLM's server, started as `sft serve --engine vllm` starts it, answers the official client: fifty at once."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from environment import PYTHON, variables
from models import load, write

from sft.generate import Engine, SamplingParams
from sft.serve.vllm_engine import VllmServer
from sft.tokenizers.prompt import prompt_text

REQUESTS, NEW = 50, 48
START_MINUTES, ANSWER_SECONDS = 15, 600
KEY = "a-key-of-this-test"


def server(folder: Path) -> list[str]:
    """50 different questions at once: each gets our engine's answer, and one without the key none."""
    export = write(folder, "two")
    chats = [[{"role": "user", "content": f"Start with {13 * i + 7}. Add {i}."}] for i in range(REQUESTS)]
    wanted = expected(export, chats)
    assert len({tuple(ids) for _, ids in wanted}) == REQUESTS
    with started(export, folder) as address:
        found = asked(address, chats)
        refuse_without_key(address)
    assert found == wanted, [number for number in range(REQUESTS) if found[number] != wanted[number]]
    tokens = sum(len(ids) for _, ids in wanted)
    return [f"server: {REQUESTS} requests at once, prompts and all {tokens} tokens of their answers equal"]


def expected(export: Path, chats: list[list[dict[str, str]]]) -> list[tuple[list[int], list[int]]]:
    """Each chat's tokens, and those of our engine's answer with its end token, which vLLM tells too."""
    model, tokenizer = load(export)
    engine = Engine(model, tokenizer)
    prompts = [tokenizer(prompt_text(tokenizer, chat), add_special_tokens=False)["input_ids"] for chat in chats]
    found = engine.generate(prompts, SamplingParams(max_new_tokens=NEW))
    return [(prompt, one.ids) for prompt, one in zip(prompts, found, strict=True)]


@contextlib.contextmanager
def started(export: Path, home: Path) -> Iterator[str]:
    """The server's address; it is ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = VllmServer(model=str(export), host="127.0.0.1", port=port, name="ours", max_length=512, batch_size=64)
    command = [str(PYTHON), *asked.arguments(), "--dtype", "float32"]
    with (home / "server.log").open("w") as log:
        told = {**variables(home), "VLLM_API_KEY": KEY}
        process = subprocess.Popen(command, env=told, cwd=home, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(process, f"{address}/health", home / "server.log")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=60)


def asked(address: str, chats: list[list[dict[str, str]]]) -> list[tuple[list[int], list[int]]]:
    """Tokens of each prompt and answer, as the server tells them to the official client; all asked at once."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key=KEY, timeout=ANSWER_SECONDS, max_retries=0)

    def one(chat: Any) -> tuple[list[int], list[int]]:
        more = {"return_token_ids": True}
        answer = client.chat.completions.create(
            model="ours", messages=chat, temperature=0, max_tokens=NEW, extra_body=more
        )
        ids = list(answer.choices[0].token_ids)  # type: ignore[attr-defined]
        ended = answer.choices[0].finish_reason == "stop"
        return list(answer.prompt_token_ids), ids[:-1] if ended else ids  # type: ignore[attr-defined]

    with ThreadPoolExecutor(REQUESTS) as pool:
        futures = [pool.submit(one, chat) for chat in chats]
        return [future.result(timeout=ANSWER_SECONDS) for future in futures]


def refuse_without_key(address: str) -> None:
    """A request that brings no key gets 401."""
    try:
        with urllib.request.urlopen(f"{address}/v1/models", timeout=30):
            raise AssertionError("the server answers without the key")
    except urllib.error.HTTPError as error:
        assert error.code == 401, error


def _wait(process: subprocess.Popen[bytes], page: str, log: Path) -> None:
    end = time.monotonic() + 60 * START_MINUTES
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-6000:]}"
        try:
            with urllib.request.urlopen(page, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server isn't ready after {START_MINUTES} minutes:\n{log.read_text()[-6000:]}")
