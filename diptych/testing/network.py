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
from dataclasses import dataclass

from diptych.kv.store import Lending, PageStore
from diptych.testing.memory_link import Direction, MemoryLink, Pair, Parcel
from diptych.transfer.link import Link, LinkClosed

_NUM_KEPT = 32  # data frames that each endpoint got last, for `stale_p`


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
        there, back = Direction((endpoint, to)), Direction((to, endpoint))
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
