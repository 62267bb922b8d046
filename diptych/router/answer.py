"""An answer on a client's HTTP/1.1 connection."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Protocol

from diptych.router.exchange import Client, Headers

_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}


class Writable(Protocol):
    """What an answer needs to know of its connection."""

    @property
    def writable(self) -> asyncio.Event: ...


class HttpAnswer(Client):
    """See `Client`. A streamed answer is chunked, or ends with the connection for HTTP/1.0.

    `keep_alive`: the connection may serve another request after this answer.
    """

    def __init__(
        self, connection: Writable, transport: asyncio.Transport, method: str, *, keep_alive: bool, http10: bool
    ) -> None:
        self.keep_alive = keep_alive and not http10
        self._writable = connection.writable
        self._transport = transport
        self._bodiless = method == "HEAD"
        self._chunked = not http10
        self._finished = False

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        self.status, self._finished = status, True
        lines = self._head(status, headers)
        lines.append(b"\r\n" if status == 204 else b"content-length: %d\r\n\r\n" % len(body))
        if not self._bodiless:
            lines.append(body)
        self._transport.write(b"".join(lines))

    def start(self, status: int, headers: Headers) -> None:
        self.status = status
        lines = self._head(status, headers)
        lines.append(b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        self._transport.write(b"".join(lines))

    def write(self, data: bytes) -> bool:
        if data and not self._bodiless:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return self._writable.is_set()

    async def drain(self) -> None:
        await self._writable.wait()

    def finish(self) -> None:
        self._finished = True
        if self._chunked and not self._bodiless:
            self._transport.write(b"0\r\n\r\n")

    def break_off(self) -> None:
        if not self._finished:
            self.keep_alive = False
            self._transport.abort()

    def _head(self, status: int, headers: Headers) -> list[bytes]:
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status]
        lines += [b"%b: %b\r\n" % header for header in headers]
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        return lines
