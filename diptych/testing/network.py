"""An in-memory network with faults, for tests and simulation: deterministic from a seed on a virtual-time loop.

Endpoints are named; each has a Transport. Links are reliable and ordered, as TCP's are, so what a bad network does to
them is what TCP makes of it: a lost packet is a pause, a dead route is a silent link, a reset is a broken one. On top
of that come faults that no honest link shows (duplicates, stale frames, flipped bits): the protocol must survive those
as well.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from diptych.errors import ProtocolError
from diptych.kv.store import Lending, PageStore
from diptych.transfer.link import Link, LinkClosed
from diptych.transfer.wire import HANDSHAKE_HEADER_BYTES, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES

Pair = tuple[str, str]
_WINDOW_BYTES = 4 << 20  # on its way in one direction of one link; then send waits
_OVERHEAD_BYTES = 64
_NUM_KEPT = 32  # data frames that each endpoint got last, for `stale_p`


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message on its way."""

    header: bytes
    payload: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.header) + len(self.payload) + _OVERHEAD_BYTES


@dataclass(slots=True)
class Faults:
    """What the network does to each message, link and connection. Times in seconds, `_p` are probabilities."""

    delay_s: tuple[float, float] = (0.0001, 0.002)  # drawn for each message; order within a link is kept
    pause_p: float = 0.0  # a lost packet: the link stands still for `pause_s`
    pause_s: float = 0.3
    duplicate_p: float = 0.0  # the message is delivered twice (once both ends are past the handshake)
    cut_p: float = 0.0  # the link breaks instead of delivering the message
    connect_fail_p: float = 0.0
    stale_p: float = 0.0  # a data frame that the other end got before, over any link, comes again after this message
    tamper: Callable[[Pair, Parcel], list[Parcel]] | None = None  # what arrives instead


@dataclass(eq=False)
class _Pipe:
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


class MemoryNetwork:
    """`faults` hold for all links and may be changed at any time."""

    def __init__(self, seed: int = 0, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.rng = random.Random(seed)
        self.num_messages = 0
        self._listeners: dict[str, MemoryListener] = {}
        self._links: list[MemoryLink] = []  # one of each two ends, in order of creation
        self._num_addresses = 0
        self._stalled: set[Pair] = set()  # directions in which nothing moves
        self._dead: set[str] = set()
        self._kept: dict[str, deque[Parcel]] = {}
        self._relaxed = asyncio.Event()  # a stall has ended, or an endpoint is back

    def transport(self, endpoint: str, *, pulls: bool = False) -> MemoryTransport:
        return MemoryTransport(self, endpoint, pulls)

    @property
    def num_links(self) -> int:
        return len(self._links)

    @property
    def num_bytes_in_flight(self) -> int:
        """Sent and not yet read, on all links in both directions."""
        return sum(link.num_bytes_in_flight for link in self._links)

    # ---- faults, from outside ----

    def cut(self, one: str, other: str) -> None:
        """Break the links between two endpoints, both ends notice. New ones can be made."""
        for link in self._between(one, other):
            link.break_both("the link broke (connection reset)")

    def stall(self, one: str, other: str, *, both: bool = True) -> None:
        """Nothing moves from `one` to `other` any more (nor back); nobody is told. Connecting hangs."""
        self._stalled.add((one, other))
        if both:
            self._stalled.add((other, one))

    def resume(self, one: str, other: str) -> None:
        """End a stall; what was sent meanwhile arrives."""
        self._stalled -= {(one, other), (other, one)}
        self._relaxed.set()
        for link in self._between(one, other):
            link.flush()

    def kill(self, endpoint: str, *, silently: bool = False) -> None:
        """The process dies: its links break and it listens no more. `silently`: its host dies, nobody is told."""
        self._dead.add(endpoint)
        for address in [a for a, listener in self._listeners.items() if listener.endpoint == endpoint]:
            del self._listeners[address]
        for link in [x for x in self._links if endpoint in x.ends]:
            if silently:
                link.silence()
            else:
                link.break_both("the other side is gone")

    def revive(self, endpoint: str) -> None:
        """A new process under an old name."""
        self._dead.discard(endpoint)
        self._relaxed.set()

    # ---- used by transports and links ----

    def is_stalled(self, pair: Pair) -> bool:
        return pair in self._stalled

    def add_listener(self, endpoint: str, on_link: Callable[[Link], None]) -> MemoryListener:
        self._num_addresses += 1
        listener = MemoryListener(self, endpoint, f"mem://{endpoint}/{self._num_addresses}", on_link)
        self._listeners[listener.address] = listener
        return listener

    def remove_listener(self, address: str) -> None:
        self._listeners.pop(address, None)

    def forget(self, link: MemoryLink) -> None:
        if link in self._links:
            self._links.remove(link)

    async def connect(self, endpoint: str, address: str) -> Link:
        """Raises LinkClosed if nobody listens; hangs while the way there or back is stalled."""
        to = address.removeprefix("mem://").rpartition("/")[0]
        await asyncio.sleep(2 * self.draw_delay())
        while self.is_stalled((endpoint, to)) or self.is_stalled((to, endpoint)) or endpoint in self._dead:
            self._relaxed.clear()
            await self._relaxed.wait()
        listener = self._listeners.get(address)
        if listener is None or self.rng.random() < self.faults.connect_fail_p:
            raise LinkClosed("cannot connect (connection refused)")
        there, back = _Pipe((endpoint, to)), _Pipe((to, endpoint))
        ours, theirs = MemoryLink(self, there, back), MemoryLink(self, back, there)
        ours.other, theirs.other = theirs, ours
        self._links.append(ours)
        listener.on_link(theirs)
        return ours

    def keep(self, endpoint: str, parcel: Parcel) -> None:
        """Only data frames have payloads."""
        if self.faults.stale_p and parcel.payload:
            self._kept.setdefault(endpoint, deque(maxlen=_NUM_KEPT)).append(parcel)

    def draw_stale(self, endpoint: str) -> list[Parcel]:
        kept = self._kept.get(endpoint)
        return [self.rng.choice(kept)] if kept and self.rng.random() < self.faults.stale_p else []

    def draw_delay(self) -> float:
        return self.rng.uniform(*self.faults.delay_s)

    def _between(self, one: str, other: str) -> list[MemoryLink]:
        return [link for link in self._links if {*link.ends} == {one, other}]


class MemoryTransport:
    scheme = "mem"

    def __init__(self, network: MemoryNetwork, endpoint: str, pulls: bool = False) -> None:
        self.pulls = pulls
        self._network = network
        self._endpoint = endpoint

    async def listen(self, host: str, on_link: Callable[[Link], None]) -> MemoryListener:
        return self._network.add_listener(self._endpoint, on_link)

    async def connect(self, address: str, timeout_s: float) -> Link:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._network.connect(self._endpoint, address)
        except TimeoutError:
            raise LinkClosed(f"no answer within {timeout_s:g} s") from None

    def lending(self, store: PageStore) -> Lending | None:
        return store if self.pulls and isinstance(store, Lending) else None


class MemoryListener:
    def __init__(self, network: MemoryNetwork, endpoint: str, address: str, on_link: Callable[[Link], None]) -> None:
        self.address = address
        self.endpoint = endpoint
        self.on_link = on_link
        self._network = network

    def close(self) -> None:
        self._network.remove_listener(self.address)


class MemoryLink:
    """One end of a link."""

    def __init__(self, network: MemoryNetwork, out: _Pipe, into: _Pipe) -> None:
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
