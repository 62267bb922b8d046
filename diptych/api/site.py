"""Puts an application on a socket: how connections are kept, what becomes of malformed HTTP and of unread answers."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from diptych.api.limits import MAX_HEADER_BYTES, WRITE_TIMEOUT_S
from diptych.api.wire import error_response
from diptych.errors import BadRequest, DiptychError
from diptych.net import BACKLOG

log = logging.getLogger(__name__)

CUT_S = 1.0  # what still runs when the site ends is cut off after this; draining comes before
KEEPALIVE_S = 75.0  # longer than the pools of usual clients and proxies keep a connection
SERVER_NAME = "diptych"  # not which library, in which version


async def start_site(app: web.Application, sock: socket.socket) -> web.AppRunner:
    """Serve `app` on a bound socket, which listens from then on. The caller ends it with `await runner.cleanup()`.

    A client that goes away cancels its handler, which aborts its requests in the engine.
    """
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=CUT_S)
    await runner.setup()
    await _Site(runner, sock).start()
    return runner


class _Site(web.BaseSite):
    """Accepts on a socket. aiohttp's own sites have connections of its own kind only."""

    def __init__(self, runner: web.AppRunner, sock: socket.socket) -> None:
        super().__init__(runner)
        self._sock = sock
        self._manager = runner.server

    @property
    def name(self) -> str:
        return f"http://{self._sock.getsockname()}"

    async def start(self) -> None:
        await super().start()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connect, sock=self._sock, backlog=BACKLOG)

    def _connect(self) -> Connection:
        assert self._manager is not None
        return Connection(
            self._manager,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=KEEPALIVE_S,
            auto_decompress=False,  # compressed bodies are refused
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )


class Connection(web.RequestHandler):
    """One connection of a client."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What a client is told whose request never reached the application: it is malformed. Ends the connection."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        if isinstance(exc, LineTooLong):
            error: DiptychError = BadRequest(f"a line of the request's head has more than {MAX_HEADER_BYTES} bytes")
        elif status < 500:
            error = BadRequest("the request is malformed HTTP")
        else:
            log.error("a request failed outside of the application", exc_info=exc)
            error = DiptychError("internal error; the server's log has the details")
        response = error_response(error)
        response.headers["Server"] = SERVER_NAME
        response.force_close()
        return response

    async def finish_response(self, request: web.BaseRequest, resp: web.StreamResponse, start_time: Any) -> Any:
        """Send what is left of an answer: all of it, unless it is streamed."""
        if self.transport is None:
            return await super().finish_response(request, resp, start_time)
        with ended_if_unread(self.transport):
            return await super().finish_response(request, resp, start_time)


@contextmanager
def ended_if_unread(transport: asyncio.WriteTransport) -> Iterator[None]:
    """End the connection once its other end has taken nothing for WRITE_TIMEOUT_S: it looks that often."""
    loop = asyncio.get_running_loop()
    timer = loop.call_later(WRITE_TIMEOUT_S, lambda: look(math.inf))

    def look(unsent: float) -> None:
        nonlocal timer
        left = transport.get_write_buffer_size()
        if left >= unsent:
            log.info("a client reads nothing of its answer")
            transport.abort()
        else:
            timer = loop.call_later(WRITE_TIMEOUT_S, look, left)

    try:
        yield
    finally:
        timer.cancel()
