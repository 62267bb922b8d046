"""The client's side: HTTP/1.1 connections, strict in what they take.

Framing is checked before anything is passed on: one length, or one chunked coding, never both; CRLF line ends; a
bounded head and body. What goes to the servers is framed anew, so that a request cannot hide inside another.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

import httptools

from diptych.errors import BadRequest, DiptychError, MethodNotAllowed, PayloadTooLarge
from diptych.net import BACKLOG
from diptych.router.answer import HttpAnswer
from diptych.router.exchange import Client, ClientRequest, Headers
from diptych.router.replies import send_error

MAX_HEAD_BYTES = 16 << 10
MAX_HEADERS = 128
MAX_PIPELINED = 4  # requests read ahead while one is being served
IDLE_S = 75.0  # between two requests
RECEIVE_S = 60.0  # for a request's head, and without progress of its body
STALL_S = 120.0  # without progress while an answer goes out
SWEEP_S = 1.0

Handler = Callable[[ClientRequest, Client], Awaitable[None]]

log = logging.getLogger(__name__)


class HeadTooLarge(BadRequest):
    status = 431
    code = "header_too_large"


class BodyTimeout(BadRequest):
    status = 408
    code = "body_timeout"


class HttpServer:
    """Listens, and has `handler` answer each request in a task of its own; a client that goes away cancels its task."""

    def __init__(self, handler: Handler, *, max_body_bytes: int, body_timeout_s: float) -> None:
        self.handler = handler
        self.max_body_bytes = max_body_bytes
        self.body_timeout_s = body_timeout_s
        self.connections: set[ClientConnection] = set()
        self.draining = False  # answers close their connections
        self.idle = asyncio.Event()  # no request is being served or waits for it
        self.idle.set()
        self.num_active = 0
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ClientConnection(self, loop), sock=sock, backlog=BACKLOG)
        self._sweep(loop)

    async def close(self) -> None:
        """Stop listening and end all connections at once."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.abort()
        if self.num_active:
            async with asyncio.timeout(5.0):
                await self.idle.wait()

    def count(self, change: int) -> None:
        self.num_active += change
        if self.num_active:
            self.idle.clear()
        else:
            self.idle.set()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self.connections):
            connection.check_deadline(now)
        self._sweeper = loop.call_later(SWEEP_S, self._sweep, loop)


class ClientConnection(asyncio.Protocol):
    """One connection of a client: parses requests and serves them one after the other."""

    def __init__(self, server: HttpServer, loop: asyncio.AbstractEventLoop) -> None:
        self.writable = asyncio.Event()
        self.writable.set()
        self._server = server
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[tuple[ClientRequest, bool, bool]] = deque()  # request, keep alive, HTTP/1.0
        self._task: asyncio.Task[None] | None = None
        self._closing = False  # nothing more is read; what waits is still served
        self._refusal: DiptychError | None = None  # the last answer of a connection that broke the rules
        self._since = loop.time()  # of the state that check_deadline looks at
        self._unsent_bytes = 0  # of an answer, when it looked last
        self._body_since = 0.0  # when the last head was complete
        self._receiving = False
        self._reset()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def check_deadline(self, now: float) -> None:
        """End a connection that has made no progress for too long; requests being served have the router's deadline."""
        if not self.writable.is_set() and self._transport is not None:
            limit = STALL_S
            unsent = self._transport.get_write_buffer_size()
            if unsent < self._unsent_bytes:
                self._since = now
            self._unsent_bytes = unsent
        elif self._task is not None:
            return
        else:
            limit = RECEIVE_S if self._receiving or self._closing else IDLE_S
        if now - self._since > limit:
            self.abort()
        elif self._receiving and self._head_done and now - self._body_since > self._server.body_timeout_s:
            self._refuse(BodyTimeout(f"the body did not arrive within {self._server.body_timeout_s:g} s"))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._transport = None
        self._server.count(-len(self._waiting))
        self._waiting.clear()
        self.writable.set()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._since = self._loop.time()
        self.writable.clear()

    def resume_writing(self) -> None:
        self._since = self._loop.time()
        self.writable.set()
        if self._task is None:
            self._serve_next()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if not self._receiving or self._head_done:  # a head has one deadline, a body one and must go on meanwhile
            self._since = self._loop.time()
        self._receiving = True
        try:
            self._unparsed_bytes += len(data)
            self._parser.feed_data(data)
            self._check_unparsed()
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, DiptychError) else BadRequest("the request is malformed HTTP"))
        except httptools.HttpParserError:
            self._refuse(BadRequest("the request is malformed HTTP"))
        except DiptychError as error:
            self._refuse(error)

    # httptools; what these raise comes out of feed_data as HttpParserCallbackError

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + 4)
        if self._head_done:  # a trailer: not passed on
            return
        self._headers.append((name.lower(), value))
        if len(self._headers) > MAX_HEADERS:
            raise HeadTooLarge(f"the request has more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        self._head_done = True
        self._unparsed_bytes = 0
        self._body_since = self._loop.time()
        self._version = self._parser.get_http_version()
        self._upgrading = self._parser.should_upgrade()
        if self._upgrading and self._parser.get_method() == b"CONNECT":
            raise MethodNotAllowed("the router is no tunnel")
        length, waits = check_head(self._version, self._headers)
        self._check_body(length)
        if waits and self._task is None and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._unparsed_bytes = 0
        self._body += data
        self._check_body(len(self._body))

    def on_message_complete(self) -> None:
        if self._upgrading:  # the parser takes what follows for another protocol
            return
        method = self._parser.get_method().decode("latin-1")
        request = ClientRequest(method, request_target(self._url), self._headers, bytes(self._body))
        self._waiting.append((request, self._parser.should_keep_alive(), self._version == "1.0"))
        self._server.count(1)
        self._reset()
        self._receiving = False
        if self._task is None:
            self._serve_next()
        if len(self._waiting) >= MAX_PIPELINED and self._transport is not None:
            self._transport.pause_reading()

    def _reset(self) -> None:
        self._url = b""
        self._version = "1.1"
        self._headers: Headers = []
        self._head_bytes = 0  # of what has been parsed
        self._unparsed_bytes = 0  # received since the last part of a body, or the end of a head or request
        self._head_done = False
        self._upgrading = False
        self._body = bytearray()  # no list of parts: clients may send millions of them

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLarge(f"the request's head is longer than {MAX_HEAD_BYTES} bytes")

    def _check_unparsed(self) -> None:
        """The parser holds back a header, or a trailer, that has no end yet."""
        if self._unparsed_bytes > 2 * MAX_HEAD_BYTES:
            raise HeadTooLarge(f"the request's head is longer than {MAX_HEAD_BYTES} bytes")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Take a request that asks for an upgrade as a plain one, its connection's last; `rest` follows its head."""
        kept = [header for header in self._headers if header[0] not in (b"upgrade", b"connection", b"http2-settings")]
        lines = [b"%b %b HTTP/1.1" % (self._parser.get_method(), self._url)]
        lines += [b"%b: %b" % header for header in (*kept, (b"connection", b"close"))]
        self._parser = httptools.HttpRequestParser(self)
        self._reset()
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _check_body(self, size: int) -> None:
        if size > self._server.max_body_bytes:
            raise PayloadTooLarge(f"the body is longer than {self._server.max_body_bytes} bytes")

    # serving

    def _serve_next(self) -> None:
        """Start on the request that has waited longest, if the client reads; end the connection after the last."""
        if self._transport is None or self._transport.is_closing() or not self.writable.is_set():
            return
        if not self._waiting:
            if self._closing:
                self._end(self._transport)
            return
        request, keep_alive, http10 = self._waiting.popleft()
        keep_alive = keep_alive and not self._server.draining
        answer = HttpAnswer(self, self._transport, request.method, keep_alive=keep_alive, http10=http10)
        self._task = self._loop.create_task(self._serve(request, answer))
        self._task.add_done_callback(lambda _: self._served(answer))

    async def _serve(self, request: ClientRequest, answer: HttpAnswer) -> None:
        try:
            await self._server.handler(request, answer)
        except Exception:
            log.exception("a request failed inside the router")
            if not answer.started:
                send_error(answer, DiptychError("the router failed; see its log"), [])
            answer.break_off()

    def _served(self, answer: HttpAnswer) -> None:
        self._task = None
        self._server.count(-1)
        self._since = self._loop.time()
        if self._transport is None or self._transport.is_closing():
            return
        if not answer.keep_alive or (self._server.draining and not self._waiting):  # it may have begun before
            self._transport.close()
            return
        if len(self._waiting) - 1 < MAX_PIPELINED:  # once the next is being served
            self._transport.resume_reading()
        self._serve_next()

    def _refuse(self, error: DiptychError | None) -> None:
        """Read no more: what comes next on this connection cannot be told from the body of what came before."""
        self._closing = True
        self._refusal = error
        if self._task is None:
            self._serve_next()

    def _end(self, transport: asyncio.Transport) -> None:
        if self._refusal is not None:
            send_error(HttpAnswer(self, transport, "", keep_alive=False, http10=False), self._refusal, [])
        transport.close()


def check_head(version: str, headers: Headers) -> tuple[int, bool]:
    """The declared length of the body, and whether the client waits for 100 Continue.

    Raises BadRequest if the framing is unclear. The parser has refused repeated and malformed lengths, and lengths
    beside a transfer coding, before this.
    """
    length, waits, coded, num_hosts = 0, False, False, 0
    for name, value in headers:
        if name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            coded = True
            if value.strip().lower() != b"chunked":
                raise BadRequest("only the transfer coding chunked is supported")
        elif name == b"expect":
            waits = value.lower() == b"100-continue"
        elif name == b"host":
            num_hosts += 1
    if version not in ("1.0", "1.1"):
        raise BadRequest(f"HTTP/{version} is not supported")
    if coded and version == "1.0":
        raise BadRequest("HTTP/1.0 has no transfer codings")
    if num_hosts > 1 or (num_hosts == 0 and version == "1.1"):
        raise BadRequest("a request needs exactly one Host header")
    return length, waits


def request_target(url: bytes) -> str:
    """The path and query of a request's target, whatever host an absolute one names; "*" for what has no path."""
    if url.startswith(b"/"):
        return url.partition(b"#")[0].decode("latin-1")
    try:
        parsed = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError:
        return "*"
    path = parsed.path or b"/"
    if not path.startswith(b"/"):
        return "*"
    return (path + b"?" + parsed.query if parsed.query else path).decode("latin-1")
