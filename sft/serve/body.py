"""A request's body: read no further than it may be long, in a limited time, as JSON proper."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from sft.serve.errors import ApiError
from sft.serve.settings import Settings


async def read_body(request: Any, settings: Settings) -> bytes:
    """The bytes of a body.

    Raises:
        ApiError: 413 for a body that is, or says that it is, too long, as soon as that is known; 408 for one that
            doesn't arrive.
    """
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) > 18 or int(said) > settings.max_body):
        raise _too_long(settings)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > settings.max_body:
                    raise _too_long(settings)
    except TimeoutError:
        text = f"The request's body didn't arrive within {settings.body_seconds:g} seconds."
        raise ApiError(408, text) from None
    return bytes(body)


def _too_long(settings: Settings) -> ApiError:
    return ApiError(413, f"The request's body is longer than {settings.max_body} bytes.", code="request_too_large")


def parse(body: bytes) -> Any:
    """JSON without NaN and infinities, which it doesn't have. Raises ApiError 400."""
    try:
        return json.loads(body, parse_constant=_no_number)
    except RecursionError:
        problem = "its values are nested too deeply"
    except UnicodeDecodeError:
        problem = "it isn't UTF-8"
    except ValueError as error:
        problem = str(error)
    raise ApiError(400, f"The request's body is no JSON that can be read: {problem}.")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
