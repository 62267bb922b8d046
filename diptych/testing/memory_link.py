"""A link of the in-memory network: two ends, and what is on its way between them. network.py says what befalls it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diptych.errors import ProtocolError
from diptych.transfer.link import LinkClosed
from diptych.transfer.wire import HANDSHAKE_HEADER_BYTES, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES

if TYPE_CHECKING:
    from diptych.testing.network import MemoryNetwork

Pair = tuple[str, str]
_WINDOW_BYTES = 4 << 20  # on its way in one direction of one link; then send waits
_OVERHEAD_BYTES = 64


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message on its way."""

    header: bytes
    payload: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.header) + len(self.payload) + _OVERHEAD_BYTES


@dataclass(eq=False)
class Direction:
    """One direction of a link."""

    pair: Pair
    in_flight: deque[Parcel] = field(default_factory=deque)  # sent, not yet delivered
    arrived: deque[Parcel] = field(default_factory=deque)
    num_bytes: int = 0  # in both
    ready_at: float = 0.0  # nothing sent later arrives earlier
    timers: deque[asyncio.TimerHandle] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: str = ""  # why nothing more arrives, once what has arrived is read
    lost: bool = False  # nothing arrives any more, and nobody is told


class MemoryLink:
    """One end of a link."""

    def __init__(self, network: MemoryNetwork, out: Direction, into: Direction) -> None:
        self.max_header_bytes = HANDSHAKE_HEADER_BYTES
        self.max_payload_bytes = 0
        self.other: MemoryLink
        self._network = network
        self._out, self._in = out, into
        self._closed = ""
        self._turn = asyncio.Lock()

    @property
    def ends(self) -> Pair:
        return self._out.pair

    @property
    def num_bytes_in_flight(self) -> int:
        return self._out.num_bytes + self._in.num_bytes

    @property
    def _gone(self) -> str:
        """Why nothing can be sent any more, "" if it can."""
        return self._closed or self._in.ended

    # ---- what users of a Link call ----

    async def send(self, header: bytes, payload: memoryview | None = None) -> None:
        parcel = Parcel(header, b"" if payload is None else bytes(payload.cast("B")))
        if len(header) > MAX_HEADER_BYTES or len(parcel.payload) > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"a message of {parcel.num_bytes} bytes is beyond the limits of a link")
        async with self._turn:
            try:
                while not self._gone and self._out.num_bytes >= _WINDOW_BYTES:
                    self._out.changed.clear()
                    await self._out.changed.wait()
            except asyncio.CancelledError:
                self.close()  # a socket would have taken half of it by now
                raise
            if self._gone:
                raise LinkClosed(self._gone)
            self._dispatch(parcel)

    async def recv(self) -> tuple[bytes, memoryview]:
        while not self._closed and not self._in.arrived and not self._in.ended:
            self._in.changed.clear()
            await self._in.changed.wait()
        if self._closed or not self._in.arrived:
            self._end(self._closed or self._in.ended)
            raise LinkClosed(self._closed)
        parcel = self._in.arrived.popleft()
        self._network.keep(self._in.pair[1], parcel)
        self._in.num_bytes -= parcel.num_bytes
        self._in.changed.set()
        if len(parcel.header) > self.max_header_bytes or len(parcel.payload) > self.max_payload_bytes:
            self.close()
            raise ProtocolError(f"a message of {parcel.num_bytes} bytes is beyond this link's limits")
        return parcel.header, memoryview(bytearray(parcel.payload))

    def close(self) -> None:
        """The other end reads what is on its way, then learns."""
        if not self._closed:
            self._end("this side closed the link")
            delay = max(0.0, self._out.ready_at - self._loop.time()) + self._network.draw_delay()
            self._out.timers.append(self._loop.call_later(delay, self._hang_up))

    # ---- what the network does ----

    def break_both(self, why: str) -> None:
        for end in (self, self.other):
            end.silence()
            end._end(why)

    def silence(self) -> None:
        """What is on its way is lost."""
        for pipe in (self._out, self._in):
            while pipe.timers:
                pipe.timers.popleft().cancel()
            pipe.in_flight.clear()
            pipe.lost = True

    def flush(self) -> None:
        """A stall is over."""
        for end in (self, self.other):
            while end._out.in_flight and not self._network.is_stalled(end._out.pair):
                end._deliver()
            if end._closed and not end._out.in_flight:
                end._hang_up()

    # ---- inside ----

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    @property
    def _past_handshake(self) -> bool:
        return self.max_header_bytes > HANDSHAKE_HEADER_BYTES

    def _dispatch(self, parcel: Parcel) -> None:
        network, out, faults = self._network, self._out, self._network.faults
        network.num_messages += 1
        if network.rng.random() < faults.cut_p:
            self.break_both("the link broke (connection reset)")
            raise LinkClosed(self._closed)
        parcels = [parcel] if faults.tamper is None else faults.tamper(out.pair, parcel)
        if network.rng.random() < faults.duplicate_p and self._past_handshake and self.other._past_handshake:
            parcels = [copy for copy in parcels for _ in range(2)]
        if parcel.payload:
            parcels = parcels + network.draw_stale(out.pair[1])
        delay = network.draw_delay() + (faults.pause_s if network.rng.random() < faults.pause_p else 0.0)
        out.ready_at = max(out.ready_at, self._loop.time() + delay)
        for copy in parcels:
            out.num_bytes += copy.num_bytes
            if out.lost:
                continue
            out.in_flight.append(copy)
            out.timers.append(self._loop.call_at(out.ready_at, self._arrive))

    def _arrive(self) -> None:
        self._out.timers.popleft()
        if self._out.in_flight and not self._network.is_stalled(self._out.pair):
            self._deliver()

    def _deliver(self) -> None:
        self._out.arrived.append(self._out.in_flight.popleft())
        self._out.changed.set()

    def _hang_up(self) -> None:
        if not self._network.is_stalled(self._out.pair) and not self._out.lost:
            self._out.ended = "the other side closed the link"
            self._out.changed.set()
            self._in.changed.set()

    def _end(self, why: str) -> None:
        if not self._closed:
            self._closed = why
            self._out.changed.set()
            self._in.changed.set()
            if self.other._closed:
                self._network.forget(self)
                self._network.forget(self.other)
