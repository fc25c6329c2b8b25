"""The server's pages. FastAPI is imported when an application is made, so that all else works without it."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from sft.generate.streaming import Answers
from sft.serve.errors import ApiError
from sft.serve.jobs import Job
from sft.serve.metrics import CONTENT_TYPE
from sft.serve.service import Service

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Handler = Callable[[Any], Coroutine[Any, Any, Any]]


class ClientGone(Exception):  # noqa: N818 (nothing went wrong here)
    """Nobody waits for the answer any more."""


def build_app(service: Service) -> Any:
    """The ASGI application."""
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route

    pages = _Pages(service)

    def page(path: str, method: str, handler: Handler) -> Route:
        return Route(path, partial(_guarded, service, handler, path, ClientDisconnect), methods=[method])

    async def no_page(request: Any, error: Exception) -> Any:
        status = getattr(error, "status_code", 500)
        problem = "no such page" if status == 404 else getattr(error, "detail", "failed")
        return _told(ApiError(status, f"{request.method} {request.url.path}: {problem}"))

    return FastAPI(
        routes=[
            page("/v1/chat/completions", "POST", partial(pages.answer, chat=True)),
            page("/v1/completions", "POST", partial(pages.answer, chat=False)),
            page("/v1/models", "GET", pages.models),
            page("/v1/models/{name:path}", "GET", pages.one_model),
            page("/health", "GET", pages.health),
            page("/metrics", "GET", pages.metrics),
        ],
        exception_handlers={HTTPException: no_page},
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )


class Counted:
    """An application whose requests under way the service knows, until their answers' last byte."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.service.active += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.service.active -= 1


class _Pages:
    def __init__(self, service: Service) -> None:
        self.service = service
        self._made = {
            "id": service.settings.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "sambay-sft",
        }
        self._made["max_model_len"] = service.settings.max_length

    async def answer(self, request: Any, *, chat: bool) -> Any:
        self.service.check_allowed(request.headers.get("authorization", ""))
        job, answers = await self.service.read(request, chat=chat)
        if job.asked.stream:
            return EventStream(self.service, job, answers)
        with answers:
            return _json(await unless_gone(request.receive, self.service.whole(job, answers)))

    async def models(self, request: Any) -> Any:
        self.service.check_allowed(request.headers.get("authorization", ""))
        return _json({"object": "list", "data": [self._made]})

    async def one_model(self, request: Any) -> Any:
        self.service.check_allowed(request.headers.get("authorization", ""))
        name = request.path_params["name"]
        if name != self.service.settings.name:
            raise ApiError(404, f"The model `{name}` does not exist.", param="model", code="model_not_found")
        return _json(self._made)

    async def health(self, request: Any) -> Any:
        self.service.check_running()
        return _json({"status": "ok"})

    async def metrics(self, request: Any) -> Any:
        text = self.service.metrics.text(self.service.gauges())
        return _response(text.encode(), 200, {"content-type": CONTENT_TYPE})


class EventStream:
    """A response that is sent while it is made; a client that goes away ends it."""

    def __init__(self, service: Service, job: Job, answers: Answers) -> None:
        self.service, self.job, self.answers = service, job, answers
        self.status_code = 200

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def send_part(part: bytes) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": True})

        with self.answers:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                await unless_gone(receive, self.service.stream(self.job, self.answers, send_part))
            except ClientGone:
                self.service.metrics.given_up += 1
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` comes to; it is stopped when the client goes away, which raises ClientGone."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()  # bounded: it is done
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _guarded(service: Service, handler: Handler, path: str, disconnect: type[Exception], request: Any) -> Any:
    """The response to a request: whatever goes wrong, one of the API's form."""
    try:
        response = await handler(request)
    except ApiError as error:
        response = _told(error)
    except (ClientGone, disconnect):
        service.metrics.given_up += 1
        response = _response(b"", 499, {})  # nobody reads it
    except Exception as error:
        traceback.print_exception(error)
        response = _told(ApiError(500, "The server has failed; its log says why."))
    service.metrics.requests[path, response.status_code] += 1
    return response


def _told(error: ApiError) -> Any:
    return _json(error.body, error.status, error.headers)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    return _response(json.dumps(value).encode(), status, {"content-type": "application/json", **(headers or {})})


def _response(body: bytes, status: int, headers: dict[str, str]) -> Any:
    from starlette.responses import Response

    return Response(body, status, headers)
