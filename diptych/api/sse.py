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
            # The server's own kind of writer, whose `write` can leave the waiting to us
            writer = cast(StreamWriter, await response.prepare(request))
            await _write(writer, first)
            await _rest(writer, events, rid)
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await response.write_eof()
        except (ConnectionError, TimeoutError):
            log.info("[%s] %s", rid, HUNG_UP)
            if request.transport is not None:  # it may only have stopped to read: don't wait until it takes the rest
                request.transport.abort()
    return response


async def _rest(writer: StreamWriter, events: AsyncGenerator[bytes, None], rid: str) -> None:
    try:
        async for data in events:
            await _write(writer, data)
    except ConnectionError:
        raise
    except DiptychError as error:
        log.info("[%s] ended with an error event: %s", rid, error.code)
        await _write(writer, event(error_body(error)) + DONE)
    except Exception:
        log.exception("[%s] failed", rid)
        internal = DiptychError("internal error; the server's log has the details")
        await _write(writer, event(error_body(internal)) + DONE)


async def _write(writer: StreamWriter, data: bytes) -> None:
    """Waits only for a client that is behind. Raises ConnectionError when it reads nothing for WRITE_TIMEOUT_S."""
    await writer.write(data, drain=False)
    if not writer.protocol.writing_paused:
        return
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await writer.drain()
    except TimeoutError:
        raise ConnectionError("the client reads nothing") from None
