"""Requests to one OpenAI-compatible endpoint: so many at once, and again after what passes by itself.

The openai library sends them. Its own retries are switched off: it gives up on waits of more than two minutes and after
eight seconds of back-off, doesn't count, and takes a broken body for an answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from typing import TYPE_CHECKING, Any, NoReturn

from sft.data.steps.generate.answer import CHAT, Answer, BrokenAnswerError, Request, read_answer
from sft.utils.errors import UserError, first_line
from sft.utils.secrets import scrub, to_look_for

if TYPE_CHECKING:
    from sft.recipe.steps.generate import Endpoint

log = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # seconds, of back-off
LONGEST_RETRY_AFTER = 900.0  # seconds that a server may ask for; with more, its quota is used up
_RETRIED = frozenset({408, 409, 425, 429})  # and all from 500 on
_OF_ONE_REQUEST = frozenset({400, 413, 422})  # the others will fare no better than this one
_SECONDS_BETWEEN_WARNINGS = 30.0
_SHOWN = 300  # characters of what a server says


class RequestFailedError(Exception):
    """A request that got no answer. `retries`: how often it was sent again."""

    def __init__(self, why: str, retries: int) -> None:
        super().__init__(why)
        self.retries = retries


class _PassingError(Exception):
    """Something that may be over in a while; `wait`: the seconds that the server asks for."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Client:
    """An endpoint. To be used in one event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Raises UserError when the openai library isn't installed."""
        self.endpoint = endpoint
        self._openai = _import_openai()
        # The library refuses to go without a key; servers that need none don't look at it.
        self._key = os.environ.get(endpoint.api_key_env)
        self._client = self._openai.AsyncOpenAI(
            base_url=endpoint.base_url, api_key=self._key or "none", max_retries=0, timeout=endpoint.timeout
        )
        self._secrets = tuple(filter(None, (self._key, *to_look_for(endpoint.model_dump()))))
        self.where = self._shown(endpoint.base_url)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._not_before = 0.0
        self._last_warning = float("-inf")

    async def ask(self, request: Request) -> tuple[Answer, int]:
        """The answer, and how often the request had to be sent again.

        Raises RequestFailedError when there is none, UserError when no request can have one.
        """
        async with self._slots:
            retries = 0
            while True:
                await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
                try:
                    return await self._send(request, retries), retries
                except _PassingError as error:
                    if retries == self.endpoint.max_retries:
                        raise RequestFailedError(
                            f"{self._shown(error)} (asked {retries + 1} times)", retries
                        ) from error
                    wait = self._wait(error, retries)
                    self._warn(error, wait)
                retries += 1
                await asyncio.sleep(wait)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _send(self, request: Request, retries: int) -> Answer:
        openai, extra = self._openai, dict(request.body)
        create = self._client.chat.completions if request.path == CHAT else self._client.completions
        named = {key: extra.pop(key) for key in ("model", "messages", "prompt") if key in extra}
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                response = await create.with_raw_response.create(**named, extra_body=extra)
            return read_answer(request.path, json.loads(response.content), self.endpoint.model)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _PassingError(f"no answer within {self.endpoint.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise _PassingError(f"the connection failed: {first_line(error.__cause__ or error)}") from error
        except openai.APIStatusError as error:
            self._judge(error, retries)
        except BrokenAnswerError as error:
            raise _PassingError(str(error)) from error
        except (ValueError, RecursionError) as error:
            raise _PassingError(f"the answer isn't JSON: {first_line(error)}") from error

    def _judge(self, error: Any, retries: int) -> NoReturn:
        """Whether to send again, to give this request up, or to give all up."""
        status, said = error.status_code, self._shown(_said(error))
        if error.code == "insufficient_quota":
            self._give_up(f"has no quota left ({status}): {said}", "pay, or wait until it is renewed, and run again")
        if status in _RETRIED or status >= 500:
            wait = _retry_after(error.response.headers)
            if wait is not None and wait > LONGEST_RETRY_AFTER:
                self._give_up(f"asks to wait {wait:.0f} s ({status}): {said}", "run again after that")
            raise _PassingError(f"{status}: {said}", wait) from error
        if status in _OF_ONE_REQUEST:
            raise RequestFailedError(f"refused ({status}): {said}", retries) from error
        if status in (401, 403):
            variable = self.endpoint.api_key_env
            remedy = f"put a valid key into the environment variable {variable}"
            self._give_up(f"refused {'the key' if self._key else 'to answer without a key'} ({status}): {said}", remedy)
        if status == 404:
            self._give_up(
                f"knows no such page or no model {self.endpoint.model!r} (404): {said}", "check base_url and model"
            )
        self._give_up(f"refused the request ({status}): {said}", "check base_url and the account")

    def _give_up(self, what: str, remedy: str) -> NoReturn:
        raise UserError(self._shown(f"{self.where} {what.rstrip('.')}; {remedy}."))

    def _wait(self, error: _PassingError, retries: int) -> float:
        """Seconds until the next try: what the server asks for, else twice as long as before, less a random part.

        The random part keeps requests that failed together from coming back together.
        """
        delay = min(LONGEST_WAIT, self.endpoint.retry_delay * 2.0 ** min(retries, 30))
        if error.wait is None:
            return delay * random.uniform(0.5, 1.0)
        # The others would only be told the same.
        self._not_before = max(self._not_before, time.monotonic() + error.wait)
        return error.wait + min(delay, error.wait) * random.uniform(0.0, 0.25)

    def _warn(self, error: _PassingError, wait: float) -> None:
        """Say once in a while why nothing comes."""
        if time.monotonic() - self._last_warning >= _SECONDS_BETWEEN_WARNINGS:
            self._last_warning = time.monotonic()
            log.warning("%s: %s; asking again in %.1f s", self.where, self._shown(error), wait)

    def _shown(self, text: object) -> str:
        """`text` without the passwords and keys of the endpoint, which servers and libraries quote."""
        return scrub(str(text), *self._secrets)


def _said(error: Any) -> str:
    """What the server said about an error, in one line."""
    body = error.body
    message = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
    text = " ".join(str(message or "no reason given").split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _retry_after(headers: Any) -> float | None:
    """Seconds that `Retry-After` asks for, given as such or as a date (RFC 9110, 10.2.3); None without one."""
    from email.utils import parsedate_to_datetime

    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds == seconds else None


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise UserError(
            "The step generate asks its teacher through the openai library, which isn't installed: "
            "pip install 'sambay-sft[teacher]'."
        ) from error
    return openai
