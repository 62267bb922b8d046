"""What a Sender and a Receiver have in common: the states a room goes through, its deadline, its timing."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable

import msgspec

from diptych.errors import DeadlineExceeded, RoomInUse, TransferError
from diptych.types import Finish

ROOM_TIMEOUTS = 6  # a room may last so many bootstrap timeouts


class KVPoll(enum.IntEnum):
    """States of a room. They only move up; Failed and Success are the end."""

    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class HubOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Deadlines and the secret, as in ServerConfig; and what measures how long something took, in seconds."""

    secret: str = ""
    bootstrap_timeout_s: float = 300.0
    heartbeat_timeout_s: float = 5.0
    clock: Callable[[], float] = time.perf_counter  # uvloop's own counts whole milliseconds

    @property
    def room_timeout_s(self) -> float:
        """From a room's opening to its end, whatever it waits for: half an hour by default, as a router has."""
        return ROOM_TIMEOUTS * self.bootstrap_timeout_s


class Timing(msgspec.Struct):
    """Where a room's time went. 0 until known."""

    bootstrap_ms: float = 0.0  # opened -> the two sides have met
    alloc_ms: float = 0.0  # decode: met -> pages reserved
    latency_ms: float = 0.0  # prefill: first page handed over -> decode has all; decode: pages reserved -> all here
    num_bytes: int = 0

    @property
    def speed_gb_s(self) -> float:
        return self.num_bytes / self.latency_ms / 1e6 if self.latency_ms else 0.0


def failure(message: str, code: str, status: int = TransferError.status) -> Finish:
    return Finish(type="abort", message=message, status=status, code=code)


def in_use(room: int) -> RoomInUse:
    return RoomInUse(
        f"room {room} is in use by another request; draw a new bootstrap_room for each", param="bootstrap_room"
    )


class RoomEnd:
    """One side of one room. `on_change(room)` is called from the loop, never from within a call of the owner's.

    Waiting for the other side to appear, or for the next step of a transfer, may take `options.bootstrap_timeout_s`.
    Waiting in a queue may take longer, the other server's queue included: that server lives, or its heartbeat would
    have ended the room, and it has deadlines of its own. All in all a room may last `options.room_timeout_s`.
    """

    def __init__(self, room: int, on_change: Callable[[int], None], options: HubOptions) -> None:
        self.room = room
        self.state = KVPoll.Bootstrapping
        self.error: Finish | None = None  # why it failed
        self.timing = Timing()
        self._loop = asyncio.get_running_loop()
        self._on_change = on_change
        self._timeout_s = options.bootstrap_timeout_s
        self._clock = options.clock
        self._entered_at = self._clock()
        self._room_timeout_s = options.room_timeout_s
        self._ends_at = self._loop.time() + self._room_timeout_s
        self._deadline: asyncio.TimerHandle | None = None
        self._extend()

    @property
    def ended(self) -> bool:
        return self.state in (KVPoll.Failed, KVPoll.Success)

    def _changed(self) -> None:
        self._loop.call_soon(self._on_change, self.room)

    def _enter(self, state: KVPoll, *, queued: bool = False) -> float:
        """Move on. Returns the milliseconds spent in the state that is left."""
        now = self._clock()
        spent_ms = (now - self._entered_at) * 1e3
        self.state, self._entered_at = state, now
        self._extend(queued=queued)
        self._changed()
        return spent_ms

    def _extend(self, *, queued: bool = False) -> None:
        """Start the deadline over; none once the room has ended."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if not self.ended:
            soon = self._loop.time() + self._timeout_s
            self._deadline = self._loop.call_at(self._ends_at if queued else min(soon, self._ends_at), self._expire)

    def _expire(self) -> None:
        flag = "--disaggregation-bootstrap-timeout"
        if self._loop.time() >= self._ends_at:
            message = f"the hand-over took {self._room_timeout_s:g} s with its queues ({ROOM_TIMEOUTS} times {flag})"
        elif self.state == KVPoll.Bootstrapping:
            message = f"waited {self._timeout_s:g} s for the other server to meet in the room ({flag})"
        else:
            message = f"waited {self._timeout_s:g} s for the KV transfer to go on ({flag})"
        self._fail(failure(message, DeadlineExceeded.code, DeadlineExceeded.status))

    def _fail(self, error: Finish) -> None:
        """End the room and tell whoever must know."""
        raise NotImplementedError
