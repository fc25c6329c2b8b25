"""Many clients of a server at once, some of them bad: each good one knows what it has to get."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

Ask = tuple[int, int, int]
"""Which prompt, seed, and answers to it."""
PATH = "/v1/chat/completions"


@dataclass
class Crowd:
    """Clients of the server at `port`, and what became of their requests.

    Attributes:
        body: of a request for an `Ask`.
        expected: the texts that it has to get.
        wrong: what else came, in words.
    """

    port: int
    asks: list[Ask]
    body: Callable[[Ask], dict[str, Any]]
    expected: dict[Ask, list[str]]
    tally: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def run(self, clients: int, seconds: float) -> None:
        """Let them ask for so long; of ten clients one is bad."""
        until = asyncio.get_running_loop().time() + seconds
        await asyncio.gather(*(self._client(number, until) for number in range(clients)))

    async def _client(self, number: int, until: float) -> None:
        chance, clock = random.Random(number), asyncio.get_running_loop()
        do = self._bad if number % 10 == 9 else self._good
        while clock.time() < until:
            try:
                async with asyncio.timeout(120):
                    await do(chance)
            except TimeoutError:
                self.wrong.append(f"client {number} had to wait too long")
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                if do == self._good:
                    self.wrong.append(f"client {number}: {error!r}")

    async def _good(self, chance: random.Random) -> None:
        ask = chance.choice(self.asks)
        stream = chance.random() < 0.5
        status, content = await self._post({**self.body(ask), "stream": stream})
        if status == 429:
            self.tally["asked to come again"] += 1
            await asyncio.sleep(0.2 + chance.random())
            return
        got = _texts(content, stream, len(self.expected[ask])) if status == 200 else [f"{status} {content[:200]!r}"]
        if got == self.expected[ask]:
            self.tally["answered"] += 1
        else:
            self.wrong.append(f"{ask}: {got} in place of {self.expected[ask]}")

    async def _post(self, body: dict[str, Any]) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request(json.dumps(body).encode(), "Connection: close\r\n"))
            await writer.drain()
            response = await reader.read()
        finally:
            writer.close()
        head, _, content = response.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            content = _unchunked(content)
        return int(head.split()[1]), content

    async def _bad(self, chance: random.Random) -> None:
        kinds: list[Callable[[random.Random], Coroutine[Any, Any, None]]] = [
            self._leaves_in_the_middle,
            self._leaves_its_request,
            self._stalls,
            self._reads_nothing,
            self._sends_garbage,
            self._asks_badly,
        ]
        kind = chance.choice(kinds)
        await kind(chance)
        self.tally[kind.__name__] += 1

    async def _leaves_in_the_middle(self, chance: random.Random) -> None:
        """Of an answer, streamed or not."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = {**self.body(chance.choice(self.asks)), "stream": chance.random() < 0.7, "n": 4, "max_tokens": 200}
        writer.write(request(json.dumps(body).encode()))
        await asyncio.wait({asyncio.create_task(reader.read(chance.randint(1, 2000)))}, timeout=chance.random())
        writer.transport.abort()

    async def _leaves_its_request(self, chance: random.Random) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        whole = request(json.dumps(self.body(chance.choice(self.asks))).encode())
        writer.write(whole[: chance.randrange(len(whole))])
        await asyncio.sleep(chance.random() / 5)
        writer.close()

    async def _stalls(self, chance: random.Random) -> None:
        """In its request."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request(b"x" * 1000)[: chance.randrange(1000)])
        await asyncio.sleep(5 * chance.random())
        writer.close()

    async def _reads_nothing(self, chance: random.Random) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=256)
        body = {**self.body(chance.choice(self.asks)), "stream": True, "n": 4, "max_tokens": 200, "logprobs": True}
        writer.write(request(json.dumps({**body, "top_logprobs": 20}).encode()))
        await asyncio.sleep(5 * chance.random())
        writer.transport.abort()

    async def _sends_garbage(self, chance: random.Random) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(chance.randbytes(chance.randint(1, 5000)) + b"\r\n\r\n")
        await asyncio.wait({asyncio.create_task(reader.read(1000))}, timeout=1)
        writer.close()

    async def _asks_badly(self, chance: random.Random) -> None:
        """And gets an error of the API's form."""
        good = self.body(self.asks[0])
        bodies = [
            json.dumps({**good, "temperature": float("nan")}).encode(),
            b'{"messages": ' + b"[" * 200_000,
            json.dumps({**good, "stop": ["a"] * 100_000}).encode(),
            json.dumps({**good, "beams": 3}).encode(),
            chance.randbytes(2000),
        ]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request(chance.choice(bodies), "Connection: close\r\n"))
            await writer.drain()
            status, content = await reader.readline(), await reader.read()
        finally:
            writer.close()
        code = int(status.split()[1])
        if code not in (400, 429) or b'{"error": {"message"' not in content:
            self.wrong.append(f"a bad request: {status!r} {content[:300]!r}")


def request(body: bytes, head: str = "") -> bytes:
    """The bytes of a POST."""
    return f"POST {PATH} HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _unchunked(content: bytes) -> bytes:
    found = b""
    while content:
        size, _, content = content.partition(b"\r\n")
        length = int(size, 16)
        found, content = found + content[:length], content[length + 2 :]
        if not length:
            return found
    raise asyncio.IncompleteReadError(found, None)


def _texts(content: bytes, stream: bool, count: int) -> list[str]:
    if not stream:
        choices = json.loads(content)["choices"]
        return [choice["message"]["content"] for choice in sorted(choices, key=lambda choice: choice["index"])]
    texts, lines = [""] * count, content.split(b"\n\n")
    assert lines[-2:] == [b"data: [DONE]", b""]
    for line in lines[:-2]:
        chunk = json.loads(line.removeprefix(b"data: "))
        if "error" in chunk:
            return [str(chunk)]
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    return texts
