"""The socket: who may hold a connection how long, and how the server ends."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from sft.generate.streaming import AsyncEngine
from sft.serve.app import Counted, build_app
from sft.serve.errors import ApiError
from sft.serve.service import Service
from sft.serve.settings import Settings
from sft.utils.errors import UserError
from sft.utils.say import say
from sft.utils.signals import STOP_SIGNALS

HEAD_SECONDS, WRITE_SECONDS = 30.0, 60.0
"""In which a connection must bring a request's head, and take some of what is sent to it."""


class Listener:
    """A service at a socket, from `run` until `stop`."""

    def __init__(self, front: AsyncEngine, settings: Settings, at: socket.socket) -> None:
        self.service, self.settings, self.socket = Service(front, settings), settings, at
        self.host, self.port = at.getsockname()[:2]
        self.cut_off = 0
        self._server = _server(self.service)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._stops = 0

    def run(self, *, signals: bool = True, ready: Callable[[], None] = lambda: None) -> bool:
        """Answer until `stop` is called, or, with `signals`, until one of those arrives. Whether all that was under
        way then got its answer.

        Args:
            ready: called when requests can come.
        """
        return asyncio.run(self._run(signals, ready))

    def stop(self) -> None:
        """End in order, from any thread: new requests are refused, and those under way finished while there is time;
        a second time: at once."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._asked_to_stop)

    def _asked_to_stop(self) -> None:
        self._stops += 1
        assert self._stop is not None
        self._stop.set()

    async def _run(self, signals: bool, ready: Callable[[], None]) -> bool:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        # One that was ignored when the process began (nohup, a background job) stays ignored.
        heard = [number for number in STOP_SIGNALS if signals and signal.getsignal(number) != signal.SIG_IGN]
        for number in heard:
            self._loop.add_signal_handler(number, self._asked_to_stop)
        serving = asyncio.create_task(self._server.serve([self.socket]))
        stopping = asyncio.create_task(self._stop.wait())  # bounded: ended below, whatever happens
        try:
            while not (self._server.started or serving.done()):
                await asyncio.sleep(0.01)
            if self._server.started:
                ready()
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await self._drain()
            self._server.should_exit = True
            await serving
        finally:
            stopping.cancel()
            closed = await asyncio.to_thread(self.service.close)
            for number in heard:
                self._loop.remove_signal_handler(number)
        if not closed:
            raise UserError("The engine didn't stop: its last step is still running.")
        return self.cut_off == 0

    async def _drain(self) -> None:
        """Finish what is under way; what isn't done in time, or when asked again, gets an error."""
        service, loop = self.service, asyncio.get_running_loop()
        service.draining = True
        if service.active:
            say(f"stopping: {service.active} requests are finished, within {self.settings.drain_seconds:g} seconds")
        until = loop.time() + self.settings.drain_seconds
        while service.active and loop.time() < until and self._stops < 2:
            await asyncio.sleep(0.02)
        self.cut_off = service.active
        if self.cut_off:
            await asyncio.to_thread(service.close)


def _server(service: Service) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:
            return nullcontext()  # they are the listener's

    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    return Server(
        uvicorn.Config(
            Counted(build_app(service), service),
            http=_patient_protocol(),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level="error",
            server_header=False,
            timeout_graceful_shutdown=2,
            backlog=2048,
        )
    )


def _patient_protocol() -> Any:
    """uvicorn's protocol, whose patience with a client ends."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        head: asyncio.TimerHandle | None = None
        taken: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch_head()

        def watch_head(self) -> None:
            """A client that brings no request, or what no request asked for, is left after some time."""
            busy = self.cycle is not None and not self.cycle.response_complete
            if busy and self.head is not None:
                self.head.cancel()
                self.head = None
            elif not busy and self.head is None:
                self.head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.watch_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.taken = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.taken is not None:
                self.taken.cancel()
                self.taken = None

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self.head, self.taken):
                if timer is not None:
                    timer.cancel()
            self.head = self.taken = None
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            body = json.dumps(ApiError(400, msg).body).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            headers.append((b"content-length", str(len(body)).encode()))
            try:
                start = self.conn.send(h11.Response(status_code=400, headers=headers, reason=b"Bad Request"))
                self.transport.write(start + self.conn.send(h11.Data(data=body)) + self.conn.send(h11.EndOfMessage()))
                self.transport.close()
            except h11.LocalProtocolError:
                self.transport.abort()  # in the middle of an answer

    return Patient
