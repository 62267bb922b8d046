"""Exchanges with servers over kept-alive HTTP/1.1 connections.

Lean on purpose: every token of every stream passes here. A part of a body goes from the socket to the client's
connection in one callback, without waking a task.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from typing import cast

import httptools

from diptych.errors import Unavailable
from diptych.net import resolve
from diptych.router.config import ServerAddress
from diptych.router.exchange import Body, Client, Exchange, Headers, ServerLost

CONNECT_TIMEOUT_S = 5.0
IDLE_S = 4.0  # SGLang's servers close a connection that has been idle for 5 s
STALE_S = 0.25  # a kept connection that breaks so soon after a request had ended before it
MAX_IDLE = 256  # kept connections a server
MAX_HEAD_BYTES = 64 << 10
HIGH_WATER_BYTES = 256 << 10  # of a body that nobody reads yet
JOIN_BYTES = 64 << 10  # smaller bodies go out in one piece with their head
NAME_TTL_S = 1.0  # how long a resolved name is used again
_OWN_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS)


class HttpUpstream:
    """`Upstream` over sockets. Connections are kept for the next request; `close` ends them all."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle: dict[ServerAddress, deque[_Connection]] = {}
        self._names: dict[str, tuple[float, str]] = {}

    async def open(
        self, server: ServerAddress, method: str, path: str, headers: Headers, body: Body, *, fresh: bool = False
    ) -> Exchange:
        """See `Upstream`."""
        connection = (None if fresh else self._take(server)) or await self._connect(server)
        size = sum(map(len, body))
        exchange = connection.send((_head(server, method, path, headers, size), *body), size)
        try:
            await exchange.wait_head()
        except BaseException:
            exchange.close()
            raise
        return exchange

    def close(self) -> None:
        """End the connections that are idle; those in use end with their exchanges."""
        for connections in self._idle.values():
            for connection in list(connections):
                connection.abort()
        self._idle.clear()

    def forget(self, server: ServerAddress) -> None:
        """End a server's idle connections: it has gone, or may have."""
        for connection in list(self._idle.pop(server, ())):
            connection.abort()

    def _take(self, server: ServerAddress) -> _Connection | None:
        idle = self._idle.get(server)
        while idle:
            connection = idle.pop()
            if connection.usable(self._loop.time() - IDLE_S):
                return connection
            connection.abort()
        return None

    def give_back(self, connection: _Connection) -> None:
        idle = self._idle.setdefault(connection.server, deque())
        if len(idle) >= MAX_IDLE:
            idle.popleft().abort()
        connection.idle_at = self._loop.time()
        idle.append(connection)

    def drop(self, connection: _Connection) -> None:
        idle = self._idle.get(connection.server)
        if idle and connection in idle:
            idle.remove(connection)

    async def _connect(self, server: ServerAddress) -> _Connection:
        address = ""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                address = await self._resolve(server.host)
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(self, server), address, server.port
                )
        except (OSError, Unavailable) as error:  # TimeoutError is an OSError
            if isinstance(error, OSError) and _is_own_fault(error, address):
                raise Unavailable("the router is out of sockets; try again in a moment") from None
            self._names.pop(server.host, None)
            gone = isinstance(error, ConnectionRefusedError)
            raise ServerLost("the server could not be reached", sent=False, gone=gone) from None
        return connection

    async def _resolve(self, host: str) -> str:
        known = self._names.get(host)
        now = self._loop.time()
        if known and now - known[0] < NAME_TTL_S:
            return known[1]
        address = await resolve(host)
        self._names[host] = (now, address)
        return address


def _is_own_fault(error: OSError, address: str) -> bool:
    """The router is out of sockets, or of ports towards a server: it would be so whatever that server did.

    For IPv6 the error that says so may also mean that this machine has no IPv6, so nothing is concluded from it.
    """
    return error.errno in _OWN_FAULTS or (error.errno == errno.EADDRNOTAVAIL and ":" not in address)


def _head(server: ServerAddress, method: str, path: str, headers: Headers, size: int) -> bytes:
    lines = [f"{method} {path} HTTP/1.1\r\nhost: {server.bootstrap_host}:{server.port}\r\n".encode("latin-1")]
    lines += [b"%b: %b\r\n" % header for header in headers]
    if size or method != "GET":
        lines.append(b"content-length: %d\r\n" % size)
    lines.append(b"\r\n")
    return b"".join(lines)


class _Connection(asyncio.Protocol):
    """One connection to a server. Serves one exchange at a time and goes back to the pool when its answer is whole."""

    def __init__(self, pool: HttpUpstream, server: ServerAddress) -> None:
        self.server = server
        self.idle_at = 0.0
        self.uses = 0
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: HttpExchange | None = None
        self._headers: Headers = []
        self._head_bytes = 0

    def send(self, message: Body, size: int) -> HttpExchange:
        """Send a head and its body of `size` bytes."""
        transport = cast(asyncio.Transport, self._transport)
        self.uses += 1
        self._headers = []
        self._head_bytes = 0
        self._exchange = exchange = HttpExchange(self, transport, reused=self.uses > 1)
        if size < JOIN_BYTES:
            transport.write(b"".join(message))
        else:
            transport.writelines(message)
        return exchange

    def usable(self, not_before: float) -> bool:
        return self.idle_at >= not_before and self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:  # an answer that nobody asked for
            self.abort()
            return
        exchange.active = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            exchange.fail("the server sent bytes that are no HTTP")
            self.abort()
            return
        if exchange.status == 0:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                exchange.fail(f"the server sent a head of more than {MAX_HEAD_BYTES} bytes")
                self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self._exchange, self._transport = self._exchange, None, None
        if exchange is None:
            self._pool.drop(self)
        elif exchange.until_eof and exc is None:
            exchange.end()
        elif exchange.fail("the server's connection broke before its answer was whole"):
            self._pool.forget(self.server)  # the others may have ended with it

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, []
        if status >= 200 and self._exchange is not None:
            self._exchange.begin(status, headers)

    def on_body(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.part(data)

    def on_message_complete(self) -> None:
        exchange, transport = self._exchange, self._transport
        if exchange is None or exchange.status == 0 or transport is None:  # status 0: a 1xx went by
            return
        self._exchange = None
        exchange.end()
        # A server that answers before it has read the whole request may close, so don't use such a connection again.
        if self._parser.should_keep_alive() and not transport.get_write_buffer_size() and not transport.is_closing():
            transport.resume_reading()
            self._pool.give_back(self)
        else:
            transport.abort()


class HttpExchange(Exchange):
    """An exchange on one connection; see `Exchange`. `active`: something has arrived since it was last cleared."""

    def __init__(self, connection: _Connection, transport: asyncio.Transport, *, reused: bool) -> None:
        self.status = 0
        self.headers: Headers = []
        self.active = False
        self.until_eof = False
        self._connection = connection
        self._transport = transport
        self._reused = reused
        self._sent_at = asyncio.get_running_loop().time()
        self._parts: deque[bytes] = deque()
        self._held_bytes = 0
        self._paused = False
        self._ended = False
        self._error: ServerLost | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._client: Client | None = None

    # from the connection

    def begin(self, status: int, headers: Headers) -> None:
        self.status = status
        self.headers = headers
        names = {name for name, _ in headers}
        self.until_eof = b"content-length" not in names and b"transfer-encoding" not in names
        self._wake()

    def part(self, data: bytes) -> None:
        if self._client is not None:
            if not self._client.write(data):
                self._pause()
                self._wake()
            return
        self._parts.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > HIGH_WATER_BYTES:
            self._pause()
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def fail(self, reason: str) -> bool:
        """End the exchange with an error; False if it had ended before."""
        if self._ended or self._error is not None:
            return False
        untouched = self.status == 0 and not self.active
        at_once = asyncio.get_running_loop().time() - self._sent_at < STALE_S
        self._error = ServerLost(reason, sent=True, reused=self._reused and untouched and at_once)
        self._wake()
        return True

    # for the core

    async def wait_head(self) -> None:
        while self.status == 0:
            await self._wait()

    async def read(self) -> bytes:
        while not self._parts:
            if self._ended:
                return b""
            await self._wait()
        data = b"".join(self._parts) if len(self._parts) > 1 else self._parts[0]
        self._parts.clear()
        self._held_bytes = 0
        self._resume()
        return data

    async def relay(self, client: Client) -> None:
        while self._parts:
            if not client.write(self._parts.popleft()):
                await client.drain()
        self._held_bytes = 0
        self._client = client
        self._resume()
        while not self._ended:
            await self._wait()
            if self._paused:
                await client.drain()
                self._resume()

    def close(self) -> None:
        if not self._ended:
            self._error = self._error or ServerLost("the exchange was closed", sent=True)
            self._client = None
            self._transport.abort()
            self._wake()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        # What arrived before the connection broke is handed out first.
        if self._error is not None and not self._parts:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pause(self) -> None:
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            if not self._transport.is_closing() and not self._ended:
                self._transport.resume_reading()
