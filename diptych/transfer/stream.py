"""Messages over a connected stream socket: the Link that TCP is, and the control half of shared memory.

A message is `magic, version, header length, payload length`, the header, the payload. The socket is driven directly
(not through asyncio's transports) so that a payload is never copied on its way: the kernel reads from the sender's
buffer and writes into the receiver's, which is reused from message to message.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct

from diptych.errors import ProtocolError
from diptych.transfer.link import LinkClosed
from diptych.transfer.wire import HANDSHAKE_HEADER_BYTES, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, VERSION

PREFIX = struct.Struct("<2sBxII")
MAGIC = b"DP"
_READ_AHEAD = 64 << 10  # small messages are read together; what is larger goes straight to its place


class _Incoming:
    """A message that is partly here."""

    def __init__(self, header_bytes: int, payload: memoryview) -> None:
        self.header = bytearray(header_bytes)
        self.payload = payload
        self.filled = 0

    @property
    def missing(self) -> int:
        return len(self.header) + len(self.payload) - self.filled

    def window(self) -> memoryview:
        """Where the next bytes go: what is left of the header, then what is left of the payload."""
        if self.filled < len(self.header):
            return memoryview(self.header)[self.filled :]
        return self.payload[self.filled - len(self.header) :]


class StreamLink:
    """A Link over `sock`, which it owns. Must be created inside a running event loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.max_header_bytes = HANDSHAKE_HEADER_BYTES
        self.max_payload_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._closed: str | None = None  # why
        self._sending = asyncio.Lock()
        self._waiting_to_read: asyncio.Future[None] | None = None
        self._waiting_to_write: asyncio.Future[None] | None = None
        self._ahead = memoryview(bytearray(_READ_AHEAD))
        self._ahead_start = self._ahead_stop = 0
        self._incoming: _Incoming | None = None
        self._payload = bytearray()

    def fileno(self) -> int:
        return self._sock.fileno()

    def hung_up(self) -> bool:
        """The other side is gone, whatever it said before that is still to be read."""
        if self._closed is not None:
            return True
        news = select.poll()
        news.register(self._sock, select.POLLRDHUP)
        return bool(news.poll(0))

    # ---- sending ----

    async def send(self, header: bytes, payload: memoryview | None = None) -> None:
        body = memoryview(b"") if payload is None else payload.cast("B")
        if len(header) > MAX_HEADER_BYTES or len(body) > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"a message of {len(header)} + {len(body)} bytes is beyond the limits of a link")
        prefix = PREFIX.pack(MAGIC, VERSION, len(header), len(body))
        async with self._sending:
            self._check_open()
            await self._send_all([memoryview(prefix), memoryview(header), body])

    async def _send_all(self, parts: list[memoryview]) -> None:
        started = False
        try:
            while parts:
                try:
                    count = self._sock.sendmsg(parts)
                except (BlockingIOError, InterruptedError):
                    await self._until_writable()
                    continue
                started = True
                while parts and count >= len(parts[0]):
                    count -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][count:]
        except asyncio.CancelledError:
            if started:
                self.close()
            raise
        except OSError as error:
            raise self._end(f"the link broke ({error.strerror})") from None

    # ---- receiving ----

    async def recv(self) -> tuple[bytes, memoryview]:
        self._check_open()
        if self._incoming is None:
            while self._ahead_stop - self._ahead_start < PREFIX.size:
                await self._read_ahead()
            self._incoming = self._begin()
        message = self._incoming
        while message.missing:
            await self._fill(message)
        self._incoming = None
        return bytes(message.header), message.payload

    def _begin(self) -> _Incoming:
        """Check the prefix at the front of what was read ahead, and make room for the message."""
        magic, version, header_bytes, payload_bytes = PREFIX.unpack_from(self._ahead, self._ahead_start)
        self._ahead_start += PREFIX.size
        if magic != MAGIC or version != VERSION:
            self.close()
            raise ProtocolError("the other side does not speak this protocol")
        if header_bytes > self.max_header_bytes or payload_bytes > self.max_payload_bytes:
            self.close()
            raise ProtocolError(f"a message of {header_bytes} + {payload_bytes} bytes is beyond this link's limits")
        if payload_bytes > len(self._payload):
            self._payload = bytearray(payload_bytes)
        return _Incoming(header_bytes, memoryview(self._payload)[:payload_bytes])

    async def _fill(self, message: _Incoming) -> None:
        window = message.window()
        ready = min(len(window), self._ahead_stop - self._ahead_start)
        if ready:
            window[:ready] = self._ahead[self._ahead_start : self._ahead_start + ready]
            self._ahead_start += ready
            message.filled += ready
        elif len(window) < _READ_AHEAD:
            await self._read_ahead()
        else:
            message.filled += await self._read_into(window)

    async def _read_ahead(self) -> None:
        if self._ahead_start:
            left = self._ahead_stop - self._ahead_start
            self._ahead[:left] = bytes(self._ahead[self._ahead_start : self._ahead_stop])
            self._ahead_start, self._ahead_stop = 0, left
        self._ahead_stop += await self._read_into(self._ahead[self._ahead_stop :])

    async def _read_into(self, view: memoryview) -> int:
        while True:
            self._check_open()
            try:
                count = self._sock.recv_into(view)
            except (BlockingIOError, InterruptedError):
                await self._until_readable()
                continue
            except OSError as error:
                raise self._end(f"the link broke ({error.strerror})") from None
            if count == 0:
                raise self._end("the other side closed the link")
            return count

    # ---- waiting and closing ----

    async def _until_readable(self) -> None:
        waiting = self._waiting_to_read = self._loop.create_future()
        self._loop.add_reader(self._sock, wake, waiting)
        try:
            await waiting
        finally:
            self._waiting_to_read = None
            if self._closed is None:
                self._loop.remove_reader(self._sock)

    async def _until_writable(self) -> None:
        waiting = self._waiting_to_write = self._loop.create_future()
        self._loop.add_writer(self._sock, wake, waiting)
        try:
            await waiting
        finally:
            self._waiting_to_write = None
            if self._closed is None:
                self._loop.remove_writer(self._sock)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise LinkClosed(self._closed)

    def close(self) -> None:
        self._end("this side closed the link")

    def _end(self, why: str) -> LinkClosed:
        """Give the socket back and wake whoever waits for it. Returns what they get."""
        if self._closed is not None:
            return LinkClosed(self._closed)
        self._closed = why
        for waiting, remove in (
            (self._waiting_to_read, self._loop.remove_reader),
            (self._waiting_to_write, self._loop.remove_writer),
        ):
            if waiting is not None:
                remove(self._sock)
                if not waiting.done():
                    waiting.set_exception(LinkClosed(why))
        self._sock.close()
        return LinkClosed(why)


def wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
