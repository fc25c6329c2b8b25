"""Requests on their way through the server: into the engine, and back as a whole or in pieces."""

from __future__ import annotations

import asyncio
import hmac
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sft.generate.streaming import STOPPED, Answers, AsyncEngine, Piece
from sft.serve.body import read_body
from sft.serve.errors import ApiError
from sft.serve.forms import Choice, Forms, Vocabulary, event
from sft.serve.jobs import Job, Reader
from sft.serve.metrics import Metrics
from sft.serve.settings import Settings
from sft.utils.errors import UserError


class Service:
    """One model for many clients.

    Attributes:
        draining: new requests are refused; what is under way is finished.
        active: requests under way, from their first byte to their answer's last.
    """

    def __init__(self, front: AsyncEngine, settings: Settings) -> None:
        self.front, self.settings, self.metrics = front, settings, Metrics()
        self.draining = False
        self.active = 0
        self._arriving = 0
        self._reader = Reader(front.engine.model, front.engine.tokenizer, settings)
        self._vocabulary = Vocabulary(front.engine.tokenizer)
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="reading")

    @property
    def room(self) -> int:
        """Answers that may be under way or wait at once."""
        return self.front.engine.batch_size + self.settings.max_waiting

    def check_allowed(self, authorization: str) -> None:
        """Raise ApiError 401 unless the header brings the key; the comparison takes the same time for any other."""
        key = self.settings.api_key
        if key is None:
            return
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
            text = "Incorrect API key provided: say it as `Authorization: Bearer KEY`."
            raise ApiError(401, text, code="invalid_api_key")

    def check_running(self) -> None:
        """Raise ApiError 503 unless the server takes requests."""
        if self.draining or self.front.failed is not None:
            raise ApiError(503, "The server is stopping: ask again later.", retry_after=5)

    async def read(self, request: Any, *, chat: bool) -> tuple[Job, Answers]:
        """Read a request, and hand it to the engine. Raises ApiError."""
        self.check_running()
        self._check_room(1 + self._arriving)
        self._arriving += 1
        try:
            body = await read_body(request, self.settings)
            self.check_running()
            loop = asyncio.get_running_loop()
            job = await loop.run_in_executor(self._reading, self._reader.read, body, chat)
        finally:
            self._arriving -= 1
        count = len(job.prompts) * job.n
        if count > self.room:
            raise ApiError(400, f"This server holds at most {self.room} answers at once, not {count}.", param="n")
        self._check_room(count)
        prompts = [(prompt, number) for prompt in job.prompts for number in range(job.n)]
        try:
            answers = self.front.submit(prompts, [params for params in job.params for _ in range(job.n)])
        except UserError as error:
            raise self._told(error) from error
        self.metrics.prompt_tokens += sum(map(len, job.prompts))
        return job, answers

    async def whole(self, job: Job, answers: Answers) -> dict[str, Any]:
        """The response to a request that isn't streamed. Raises ApiError."""
        choices, clock = self._choices(job), _Clock(self.metrics)
        try:
            async with asyncio.timeout(self.settings.seconds):
                async for position, piece in answers.pieces():
                    clock.see(position, piece)
                    choices[position].keep(piece)
        except Exception as error:
            raise self._told(error) from error
        return self._forms(job).whole(choices)

    async def stream(self, job: Job, answers: Answers, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Send an answer as events; an error is one, too."""
        choices, clock, forms = self._choices(job), _Clock(self.metrics), self._forms(job)
        try:
            async with asyncio.timeout(self.settings.seconds):
                for choice in choices if job.chat else ():
                    await send(event(forms.begin(choice.index)))
                async for position, piece in answers.pieces():
                    clock.see(position, piece)
                    chunk = forms.piece(choices[position], piece)
                    if chunk is not None:
                        await send(event(chunk))
                if job.include_usage:
                    await send(event(forms.last(choices)))
        except Exception as error:
            await send(event(self._told(error).body))
        await send(event("[DONE]"))

    def gauges(self) -> dict[str, tuple[str, float]]:
        """What is so at this moment."""
        used, every = self.front.pages
        return {
            "sft_requests_under_way": ("Requests that are read or answered.", self.active),
            "sft_slots_used": ("Answers that are being written.", self.front.live),
            "sft_slots": ("Answers that can be written at once.", self.front.engine.batch_size),
            "sft_waiting": ("Answers that wait for a slot.", max(0, self.front.pending - self.front.live)),
            "sft_pages_used": ("Pages of keys and values in use.", used),
            "sft_pages": ("Pages of keys and values.", every),
        }

    def close(self) -> bool:
        """Stop the engine; what isn't done gets an error. Whether its thread has ended."""
        self._reading.shutdown(wait=False, cancel_futures=True)
        return self.front.close()

    def _check_room(self, count: int) -> None:
        waiting = self.front.pending
        if waiting + count > self.room:
            seconds = min(60, 1 + waiting // self.front.engine.batch_size)
            text = f"Too many requests are waiting ({waiting}): ask again in {seconds} seconds."
            raise ApiError(429, text, code="rate_limit_exceeded", retry_after=seconds)

    def _choices(self, job: Job) -> list[Choice]:
        tokenizer = self.front.engine.tokenizer
        return [Choice(index, job, tokenizer) for index in range(len(job.prompts) * job.n)]

    def _forms(self, job: Job) -> Forms:
        return Forms(job, self.settings.name, self._vocabulary)

    def _told(self, error: Exception) -> ApiError:
        if isinstance(error, TimeoutError):
            return ApiError(504, f"The answer wasn't done within {self.settings.seconds:g} seconds.")
        if isinstance(error, UserError):
            return ApiError(503 if str(error) == STOPPED else 500, str(error))
        traceback.print_exception(error)
        return ApiError(500, "The server has failed; its log says why.")


class _Clock:
    """The times of one request's answers."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._begun = metrics, time.monotonic()
        self._first: dict[int, tuple[float, int]] = {}
        self._tokens: dict[int, int] = {}

    def see(self, position: int, piece: Piece) -> None:
        """A piece has come."""
        now, count = time.monotonic(), len(piece.ids)
        self._metrics.answer_tokens += count
        self._tokens[position] = self._tokens.get(position, 0) + count
        if position not in self._first:
            self._first[position] = now, count
            self._metrics.first_token.observe(now - self._begun)
        since, with_it = self._first[position]
        if piece.end is not None and (later := self._tokens[position] - with_it) > 0:
            self._metrics.each_token.observe((now - since) / later)
