"""Server-sent events: one write for each step of the engine, and clean ends whatever happens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from aiohttp import web
from aiohttp.http_writer import StreamWriter

from diptych.api.limits import WRITE_TIMEOUT_S
from diptych.api.wire import HUNG_UP, encode, error_body
from diptych.errors import DiptychError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(value: object) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


async def respond(request: web.Request, events: AsyncGenerator[bytes, None], rid: str) -> web.StreamResponse:
    """Send what `events` yields, which ends with DONE. It is closed early, and so its jobs aborted, when the client
    leaves.

    What goes wrong before the first bytes is raised, and becomes an ordinary error reply; later it becomes an error
    event.
    """
    async with aclosing(events):
        first = await anext(events)
        response = web.StreamResponse(headers=_HEADERS)
        response.headers["X-Request-Id"] = rid
        try:
            out = _Out(request, cast(StreamWriter, await response.prepare(request)))
            await out.write(first)
            await _rest(out, events, rid)
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await response.write_eof()
        except (ConnectionError, TimeoutError):
            log.info("[%s] %s", rid, HUNG_UP)
            if request.transport is not None:  # it may only have stopped to read: don't wait until it takes the rest
                request.transport.abort()
    return response


class _Out:
    """The body of a response whose head has been sent, written straight to its connection: each token comes by here,
    and aiohttp's own way is four calls and three copies longer.
    """

    __slots__ = ("_chunked", "_request", "_writer")

    def __init__(self, request: web.Request, writer: StreamWriter) -> None:
        self._request = request
        self._writer = writer
        self._chunked = writer.chunked  # not for HTTP/1.0, whose body ends with its connection

    async def write(self, data: bytes) -> None:
        """Waits only for a client that is behind. Raises ConnectionError when it has left, or has read nothing for
        WRITE_TIMEOUT_S.
        """
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionError("the client has left")
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        if not self._request.protocol.writing_paused:
            return
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._writer.drain()
        except TimeoutError:
            raise ConnectionError("the client reads nothing") from None


async def _rest(out: _Out, events: AsyncGenerator[bytes, None], rid: str) -> None:
    try:
        async for data in events:
            await out.write(data)
    except ConnectionError:
        raise
    except DiptychError as error:
        log.info("[%s] ended with an error event: %s", rid, error.code)
        await out.write(event(error_body(error)) + DONE)
    except Exception:
        log.exception("[%s] failed", rid)
        internal = DiptychError("internal error; the server's log has the details")
        await out.write(event(error_body(internal)) + DONE)
