"""NIXL, an optional package: payloads by one-sided reads over whatever UCX finds (RDMA, NVLink, TCP).

Messages go over TCP. A payload waits in a staging ring of its sender, registered with NIXL and announced once; the
receiver reads it into its own registered buffer, and the notification that belongs to the read gives the piece back.
Each end of a link has an agent of its own, made when the first payload travels, and without a progress thread (it would
spin): while pieces are out, a task drives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import select
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from diptych.errors import ConfigError, ProtocolError
from diptych.transfer.link import Link, LinkClosed, Listener
from diptych.transfer.ring import RingSpace
from diptych.transfer.stream import StreamLink
from diptych.transfer.tcp import TcpTransport
from diptych.transfer.wire import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES

RING_BYTES = 32 << 20
_POLL_S = 0.0005
_EAGER_POLLS = 50  # a read over RDMA ends within microseconds
_PLACE = struct.Struct("<BQII")  # kind, offset in the ring, length, how many bytes to give back
_MESSAGE, _RING = 0, 1
_ABOUT_BYTES = 16384  # NIXL's description of an agent and a ring


class _Ring(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Where a sender's ring lies, and how NIXL reaches it."""

    base: int
    metadata: bytes


class NixlTransport:
    """Raises ConfigError if the package is not installed."""

    scheme = "nixl"
    pulls = False

    def __init__(self) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        try:
            from nixl._api import nixl_agent, nixl_agent_config
        except ImportError:
            raise ConfigError(
                "--disaggregation-transfer-backend nixl: the package is not installed; pip install 'diptych[nixl]'"
            ) from None
        self._new_agent = lambda: nixl_agent(os.urandom(12).hex(), nixl_agent_config(enable_prog_thread=False))
        self._tcp = TcpTransport()

    async def listen(self, host: str, on_link: Callable[[Link], None]) -> Listener:
        def on_stream(link: Link) -> None:
            assert isinstance(link, StreamLink)
            on_link(NixlLink(link, self._new_agent))

        listener = await self._tcp.listen(host, on_stream)
        listener.address = listener.address.replace("tcp://", "nixl://")
        return listener

    async def connect(self, address: str, timeout_s: float) -> Link:
        link = await self._tcp.connect(address.replace("nixl://", "tcp://"), timeout_s)
        assert isinstance(link, StreamLink)
        return NixlLink(link, self._new_agent)


class _Memory:
    """Anonymous memory registered with an agent; touched only where payloads have been."""

    def __init__(self, agent: Any, num_bytes: int) -> None:
        self.map = mmap.mmap(-1, num_bytes)
        self.base = int(np.frombuffer(self.map, np.uint8).ctypes.data)
        self._agent = agent
        self._registered = agent.register_memory([(self.base, num_bytes, 0, "")], "DRAM")

    def metadata(self) -> bytes:
        described: bytes = self._agent.get_agent_metadata()
        return described

    def piece(self, offset: int, num_bytes: int) -> Any:
        return self._agent.get_xfer_descs([(self.base + offset, num_bytes, 0)], "DRAM")

    def release(self) -> None:
        with contextlib.suppress(Exception):  # the agent's connections may be gone already; the process goes on
            self._agent.deregister_memory(self._registered)
        with contextlib.suppress(BufferError):  # somebody still looks at a payload
            self.map.close()


class _Reading:
    """A payload on its way into our buffer."""

    def __init__(self, header: bytes, length: int, handle: Any, state: str) -> None:
        self.header = header
        self.length = length
        self.handle = handle
        self.state = state


class NixlLink:
    """A Link over `control`, which it owns, as it does both agents' memory."""

    def __init__(self, control: StreamLink, new_agent: Callable[[], Any]) -> None:
        self._control = control
        self.max_header_bytes = control.max_header_bytes
        self.max_payload_bytes = 0
        self._new_agent = new_agent
        self._closed = False
        self._turn = asyncio.Lock()
        # what we send
        self._space = RingSpace(RING_BYTES)
        self._ring: _Memory | None = None
        self._ring_agent: Any = None
        self._driver: asyncio.Task[None] | None = None
        self._freed = asyncio.Event()
        # what we receive
        self._agent: Any = None
        self._buffer: _Memory | None = None
        self._their_ring: _Ring | None = None
        self._their_name: Any = None
        self._reading: _Reading | None = None

    # ---- sending ----

    async def send(self, header: bytes, payload: memoryview | None = None) -> None:
        body = memoryview(b"") if payload is None else payload.cast("B")
        if len(header) > MAX_HEADER_BYTES - _PLACE.size or len(body) > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"a message of {len(header)} + {len(body)} bytes is beyond the limits of a link")
        async with self._turn:
            if not len(body):
                await self._say(_PLACE.pack(_MESSAGE, 0, 0, 0) + header)
                return
            ring = await self._announced()
            offset, size = await self._alloc(len(body))
            ring.map[offset : offset + len(body)] = body
            if self._driver is None or self._driver.done():
                self._driver = asyncio.get_running_loop().create_task(self._drive(), name="nixl-progress")
            await self._say(_PLACE.pack(_MESSAGE, offset, len(body), size) + header)

    async def _say(self, message: bytes) -> None:
        try:
            await self._control.send(message)
        except (LinkClosed, asyncio.CancelledError):  # cancelled: half a message, or a piece that never comes back
            self.close()
            raise

    async def _announced(self) -> _Memory:
        """Our ring, which the other side knows."""
        if self._ring is None:
            agent = await asyncio.to_thread(self._new_agent)
            if self._closed:
                raise LinkClosed("this side closed the link")
            self._ring_agent, self._ring = agent, _Memory(agent, RING_BYTES)
            about = msgspec.msgpack.encode(_Ring(self._ring.base, self._ring.metadata()))
            await self._say(_PLACE.pack(_RING, 0, 0, 0) + about)
        return self._ring

    async def _alloc(self, num_bytes: int) -> tuple[int, int]:
        while (place := self._space.alloc(num_bytes)) is None:
            self._freed.clear()
            await self._freed.wait()
            if self._closed:
                raise LinkClosed("the link was closed")
        return place

    async def _drive(self) -> None:
        """While pieces are out: let NIXL serve the reads, take back what was read, notice when the other side dies."""
        if self._closed:
            return
        alive = select.poll()
        alive.register(self._control.fileno(), select.POLLRDHUP)
        while self._space.used and not self._closed:
            try:
                for notes in self._ring_agent.get_new_notifs().values():
                    for note in notes:
                        self._space.take_back(int(note))
                        self._freed.set()
            except ValueError:  # more than is out
                self.close()
                return
            if alive.poll(0):
                self.close()
                return
            await asyncio.sleep(_POLL_S)

    # ---- receiving ----

    async def recv(self) -> tuple[bytes, memoryview]:
        while self._reading is None:
            self._control.max_header_bytes = max(self.max_header_bytes, _ABOUT_BYTES) + _PLACE.size
            try:
                message, _ = await self._control.recv()
            except (LinkClosed, ProtocolError):
                self.close()
                raise
            if len(message) < _PLACE.size:
                raise self._wrong("a message without a place")
            kind, offset, length, size = _PLACE.unpack_from(message)
            header = message[_PLACE.size :]
            if len(header) > self.max_header_bytes and kind != _RING:
                raise self._wrong(f"a header of {len(header)} bytes is beyond this link's limits")
            if kind == _RING:
                await asyncio.shield(self._meet(header))
            elif not length:
                return header, memoryview(b"")
            else:
                self._begin(header, offset, length, size)
        return await self._finish(self._reading)

    async def _meet(self, about: bytes) -> None:
        """Learn where their ring is."""
        if not self.max_payload_bytes or self._their_ring is not None:
            raise self._wrong("beyond this link's limits: memory that was not asked for")
        try:
            ring = msgspec.msgpack.decode(about, type=_Ring)
        except msgspec.MsgspecError:
            raise self._wrong("not a ring") from None
        agent = await asyncio.to_thread(self._new_agent)
        if self._closed:
            raise LinkClosed("this side closed the link")
        self._agent, self._buffer, self._their_ring = agent, _Memory(agent, MAX_PAYLOAD_BYTES), ring
        with self._nixl_errors():
            self._their_name = agent.add_remote_agent(ring.metadata)

    def _begin(self, header: bytes, offset: int, length: int, size: int) -> None:
        if length > self.max_payload_bytes or offset + length > RING_BYTES:
            raise self._wrong(f"a payload of {length} bytes at {offset} is beyond this link's limits")
        if self._their_ring is None or self._buffer is None:
            raise self._wrong("a payload in a ring that was never announced")
        agent = self._agent
        with self._nixl_errors():
            remote = agent.get_xfer_descs([(self._their_ring.base + offset, length, 0)], "DRAM")
            local = self._buffer.piece(0, length)
            handle = agent.initialize_xfer("READ", local, remote, self._their_name, str(size).encode())
            self._reading = _Reading(header, length, handle, agent.transfer(handle))

    async def _finish(self, reading: _Reading) -> tuple[bytes, memoryview]:
        """Wait for the read. If cancelled, the next recv goes on waiting."""
        polls = 0
        while reading.state == "PROC":
            await asyncio.sleep(0 if polls < _EAGER_POLLS else _POLL_S)
            polls += 1
            if self._closed:
                raise LinkClosed("this side closed the link")
            with self._nixl_errors():
                reading.state = self._agent.check_xfer_state(reading.handle)
        self._reading = None
        with self._nixl_errors():
            reading.handle.release()
            if reading.state != "DONE":
                raise ConnectionError("the read failed")
        assert self._buffer is not None
        return reading.header, memoryview(self._buffer.map)[: reading.length]

    def _wrong(self, message: str) -> ProtocolError:
        self.close()
        return ProtocolError(message)

    @contextlib.contextmanager
    def _nixl_errors(self) -> Any:
        """NIXL's errors have no common root: whatever it raises, the link is broken."""
        try:
            yield
        except Exception as error:
            self.close()
            raise LinkClosed(f"NIXL could not read ({type(error).__name__})") from None

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._control.close()
        self._freed.set()
        if self._reading is not None:
            with contextlib.suppress(Exception):  # an aborted read says so by raising
                self._reading.handle.release()
            self._reading = None
        for memory in (self._ring, self._buffer):
            if memory is not None:
                memory.release()
        self._ring = self._buffer = self._ring_agent = self._agent = None
