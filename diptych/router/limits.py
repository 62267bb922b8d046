"""How many requests are served at a time, and who waits: for a place among them, or for a server."""

from __future__ import annotations

import asyncio
from collections import deque

from diptych.errors import DeadlineExceeded, Overloaded, Unavailable
from diptych.router.config import RouterConfig
from diptych.router.fleet import NoServer

HOLD_BYTES = 256 << 20  # of all held requests; a single one may be larger, up to --max-payload-size
TURN_S = 2.0  # how long others wait for one that is tried alone: what kills a server mostly does so in its first step


class QueueTimeout(DeadlineExceeded):
    """The request has waited in the router's queue for too long."""

    status = 408
    code = "queue_timeout"


class Gate:
    """Lets `max_concurrent_requests` through; others wait in line, at most `queue_size` of them."""

    def __init__(self, config: RouterConfig) -> None:
        self._limit = config.max_concurrent_requests
        self._queue_size = config.queue_size
        self._timeout_s = config.queue_timeout_secs
        self._line: deque[asyncio.Future[None]] = deque()
        self.num_inside = 0

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    async def enter(self) -> None:
        """Wait for a place; whoever gets one calls `leave`. Raises Overloaded when the line is full, QueueTimeout."""
        if self._limit < 0 or (self.num_inside < self._limit and not self._line):
            self.num_inside += 1
            return
        if len(self._line) >= self._queue_size:
            raise Overloaded(f"{self.num_inside} requests are being served and {len(self._line)} wait; try again later")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(place)
        try:
            async with asyncio.timeout(self._timeout_s):
                await place
        except (TimeoutError, asyncio.CancelledError) as error:
            if place.done() and not place.cancelled():  # it came at the same moment: hand it on
                self.leave()
            elif place in self._line:  # unless `leave` has passed it over meanwhile
                self._line.remove(place)
            if isinstance(error, TimeoutError):
                raise QueueTimeout(f"the request waited {self._timeout_s:g} s for its turn; try again later") from None
            raise

    def leave(self) -> None:
        """Give the place to the next in line, if there is one."""
        while self._line:
            place = self._line.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.num_inside -= 1


class Hold:
    """Requests that no server can take, until one is back: an update of the only server of a role loses none of them.

    At most `hold_size` at a time, of HOLD_BYTES, each for `hold_timeout_secs` at a stretch.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._size = config.hold_size
        self.timeout_s = config.hold_timeout_secs
        self.num_held = 0
        self._num_bytes = 0

    async def wait(self, news: asyncio.Event, deadline: float, num_bytes: int, error: NoServer) -> None:
        """Return when there is news of the servers; the request keeps `num_bytes` meanwhile. Raises `error` when the
        loop's time is `deadline`, Unavailable at once if too many are held.
        """
        if not self._size or asyncio.get_running_loop().time() >= deadline:
            raise error
        if self.num_held >= self._size or (self.num_held and self._num_bytes + num_bytes > HOLD_BYTES):
            count = f"{self.num_held} requests of {self._num_bytes} bytes"
            raise Unavailable(f"{count} wait for a server already; try again in a moment") from None
        self.num_held += 1
        self._num_bytes += num_bytes
        try:
            async with asyncio.timeout_at(deadline):
                await news.wait()
        except TimeoutError:
            raise error from None
        finally:
            self.num_held -= 1
            self._num_bytes -= num_bytes


class Line:
    """Those that are tried one at a time, and the one whose turn it is."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.num_waiting = 0


class Turn:
    """A request's turn to be tried while no other of its `line` is."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._end: asyncio.TimerHandle | None = None  # while it has the turn

    async def take(self) -> None:
        """Wait for it: first come, first served. It is over with `leave`, or after TURN_S."""
        self._line.num_waiting += 1
        try:
            await self._line.turn.acquire()
        finally:
            self._line.num_waiting -= 1
        self._end = asyncio.get_running_loop().call_later(TURN_S, self.leave)

    def leave(self) -> None:
        """Idempotent."""
        if self._end is not None:
            self._end.cancel()
            self._end = None
            self._line.turn.release()
