"""Shared memory: for two processes of one user on one host.

Messages go over a Unix socket (abstract name, so nothing lies in the file system); a payload goes through a staging
ring that its sender owns: a sealed memfd, passed once over the socket and mapped by the receiver, which reads from it
in place. The receiver gives a piece back by adding its size to an eventfd of the sender's. Memory and descriptors
belong to the two processes alone: whichever way they die, the kernel takes everything back.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from diptych.errors import ProtocolError
from diptych.transfer.link import Link, LinkClosed, Listener
from diptych.transfer.ring import RingSpace
from diptych.transfer.stream import StreamLink, wake
from diptych.transfer.tcp import SocketListener
from diptych.transfer.unix import check_same_user, connect_unix, listen_unix
from diptych.transfer.wire import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES

if TYPE_CHECKING:
    from diptych.kv.store import Lending, PageStore

RING_BYTES = 32 << 20  # an address range: memory is used only where payloads have been
_GREETING = b"diptych shm 1\n\0\0"
_GREETING_TIMEOUT_S = 5.0
_PLACE = struct.Struct("<QII")  # before each header: offset in the ring, length, how many bytes to give back
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # shrinking the file would kill its reader


class ShmTransport:
    scheme = "shm"

    async def listen(self, host: str, on_link: Callable[[Link], None]) -> Listener:
        """`host` plays no part: the address is a random name."""
        return _ShmListener(*listen_unix(self.scheme), on_link)

    async def connect(self, address: str, timeout_s: float) -> Link:
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(timeout_s):
                sock = await connect_unix(address)
                return await _greet(sock)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, TimeoutError):
                raise LinkClosed(f"no answer within {timeout_s:g} s") from None
            if isinstance(error, OSError):  # another network namespace, or gone
                raise LinkClosed(f"cannot connect ({error.strerror})") from None
            raise

    def lending(self, store: PageStore) -> Lending | None:
        return None


class _ShmListener(SocketListener):
    """A SocketListener whose connections first exchange rings."""

    def __init__(self, sock: socket.socket, address: str, on_link: Callable[[Link], None]) -> None:
        self._on_link = on_link
        self._greetings: set[asyncio.Task[None]] = set()
        super().__init__(sock, address, self._begin)

    def _begin(self, sock: socket.socket) -> None:
        task = asyncio.get_running_loop().create_task(self._finish(sock), name="shm-greeting")
        self._greetings.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._greetings.discard(task)
            if task.cancelled():  # perhaps before it began
                sock.close()

        task.add_done_callback(ended)

    async def _finish(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(_GREETING_TIMEOUT_S):
                sock.setblocking(False)
                link = await _greet(sock)
        except (LinkClosed, OSError, TimeoutError):  # not one of us: the caller is told by the closed socket
            sock.close()
            return
        self._on_link(link)

    def close(self) -> None:
        super().close()
        for task in self._greetings:
            task.cancel()


async def _greet(sock: socket.socket) -> ShmLink:
    """Give the other side our ring and our eventfd, take theirs. On LinkClosed only `sock` is left to be closed."""
    check_same_user(sock)
    with contextlib.ExitStack() as always, contextlib.ExitStack() as on_error:
        ring_fd = _new_ring()
        always.callback(os.close, ring_fd)
        freed_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        on_error.callback(os.close, freed_fd)
        news = on_error.enter_context(select.epoll())
        socket.send_fds(sock, [_GREETING], [ring_fd, freed_fd])
        await _until_readable(sock)
        greeting, fds, _, _ = socket.recv_fds(sock, len(_GREETING), 2, socket.MSG_CMSG_CLOEXEC)
        for fd, where in zip(fds, (always, on_error), strict=False):
            where.callback(os.close, fd)
        if greeting != _GREETING or len(fds) != 2:
            raise LinkClosed("the other side does not speak this protocol")
        ours, theirs = _map(ring_fd, mmap.ACCESS_WRITE), _map(fds[0], mmap.ACCESS_READ)
        link = ShmLink(sock, news, ours, freed_fd, theirs, fds[1])
        on_error.pop_all()
        return link


def _new_ring() -> int:
    fd = os.memfd_create("diptych-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, RING_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def _map(fd: int, access: int) -> mmap.mmap:
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(fd).st_size != RING_BYTES:
            raise LinkClosed("the other side's memory is not what was agreed")
    except OSError:  # not a memfd
        raise LinkClosed("the other side's memory is not what was agreed") from None
    return mmap.mmap(fd, RING_BYTES, access=access)


async def _until_readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


class ShmLink:
    """A Link that owns its socket, both mappings, both eventfds and the epoll that watches for space."""

    def __init__(
        self,
        sock: socket.socket,
        news: select.epoll,
        ring: mmap.mmap,
        freed_fd: int,
        their_ring: mmap.mmap,
        their_freed_fd: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._control = StreamLink(sock)
        self.max_header_bytes = self._control.max_header_bytes
        self.max_payload_bytes = 0
        self._ring, self._freed_fd, self._space = ring, freed_fd, RingSpace(RING_BYTES)
        self._their_ring, self._their_freed_fd = their_ring, their_freed_fd
        self._give_back = 0  # bytes of the payload last received
        self._sending = asyncio.Lock()
        self._closed = False
        self._waiting_for_space: asyncio.Future[None] | None = None
        # Becomes readable when a piece comes back or the other side is gone, even with unread messages in the socket.
        self._news = news
        self._news.register(freed_fd, select.EPOLLIN)
        self._news.register(sock, select.EPOLLRDHUP)

    async def send(self, header: bytes, payload: memoryview | None = None) -> None:
        body = memoryview(b"") if payload is None else payload.cast("B")
        if len(header) > MAX_HEADER_BYTES - _PLACE.size or len(body) > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"a message of {len(header)} + {len(body)} bytes is beyond the limits of a link")
        async with self._sending:
            offset, size = await self._alloc(len(body)) if len(body) else (0, 0)
            try:
                if size:
                    self._ring[offset : offset + len(body)] = body
                await self._control.send(_PLACE.pack(offset, len(body), size) + header)
            except (LinkClosed, asyncio.CancelledError):  # cancelled: the piece would never come back
                self.close()
                raise

    async def _alloc(self, num_bytes: int) -> tuple[int, int]:
        """A piece of our ring; waits until the other side has given enough back."""
        while True:
            if self._closed:
                raise LinkClosed("this side closed the link")
            self._collect()
            place = self._space.alloc(num_bytes)
            if place is not None:
                return place
            if any(mask & (select.EPOLLRDHUP | select.EPOLLHUP) for _, mask in self._news.poll(0)):
                self.close()
                raise LinkClosed("the other side closed the link")
            await self._until_news()

    def _collect(self) -> None:
        try:
            self._space.take_back(os.eventfd_read(self._freed_fd))
        except BlockingIOError:
            return
        except ValueError:
            self.close()
            raise ProtocolError("the other side gave back memory that it never had") from None

    async def _until_news(self) -> None:
        waiting = self._waiting_for_space = self._loop.create_future()
        self._loop.add_reader(self._news.fileno(), wake, waiting)
        try:
            await waiting
        finally:
            self._waiting_for_space = None
            if not self._closed:
                self._loop.remove_reader(self._news.fileno())

    async def recv(self) -> tuple[bytes, memoryview]:
        if self._give_back and not self._closed:
            os.eventfd_write(self._their_freed_fd, self._give_back)
            self._give_back = 0
        self._control.max_header_bytes = self.max_header_bytes + _PLACE.size
        try:
            message, _ = await self._control.recv()
        except (LinkClosed, ProtocolError):
            self.close()
            raise
        if len(message) < _PLACE.size:
            self.close()
            raise ProtocolError("a message without a place")
        offset, length, size = _PLACE.unpack_from(message)
        if length > self.max_payload_bytes or offset + length > RING_BYTES:
            self.close()
            raise ProtocolError(f"a payload of {length} bytes at {offset} is beyond this link's limits")
        self._give_back = size
        return message[_PLACE.size :], memoryview(self._their_ring)[offset : offset + length]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._control.close()
        if self._waiting_for_space is not None:
            self._loop.remove_reader(self._news.fileno())
            if not self._waiting_for_space.done():
                self._waiting_for_space.set_exception(LinkClosed("this side closed the link"))
        self._news.close()
        os.close(self._freed_fd)
        os.close(self._their_freed_fd)
        for ring in (self._ring, self._their_ring):
            with contextlib.suppress(BufferError):  # somebody still looks at a payload: unmapped with the last view
                ring.close()
