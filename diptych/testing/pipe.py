"""Socket pairs between the processes of one simulated server: ordered, reliable, late by a random virtual time.

The real Channel speaks over them, so what is sent is packed and unpacked as between real processes.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from diptych.engine.channel import Channel

DELAY_S = (0.00005, 0.001)
LATE_P, LATE_S = 0.03, 0.04  # now and then the reading process is not scheduled for a while


class PipeEnd(asyncio.Transport):
    """One end. What is written arrives at the other end in order, then its close."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.other: PipeEnd
        self._rng = rng
        self._protocol: asyncio.Protocol | None = None
        self._on_the_way: deque[bytes | None] = deque()  # None: the close
        self._arrived: deque[bytes | None] = deque()  # until there is a protocol
        self._ready_at = 0.0  # nothing written later arrives earlier
        self._closed = False
        self._dead = False

    def attach(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        protocol.connection_made(self)
        while self._arrived:
            self._hand_over(self._arrived.popleft())

    def write(self, data: Any) -> None:
        self._dispatch(bytes(data))

    def close(self) -> None:
        """As a socket's: this end's protocol hears of it soon, the other's after all that was written."""
        if not self._closed:
            self._dispatch(None)
            self._closed = True
            asyncio.get_running_loop().call_soon(self._hand_over, None)

    def die(self) -> None:
        """The process of this end is gone: the kernel delivers what it wrote, then an end-of-file."""
        self._dispatch(None)
        self._closed = self._dead = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        return None

    def _dispatch(self, item: bytes | None) -> None:
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        delay = LATE_S if self._rng.random() < LATE_P else self._rng.uniform(*DELAY_S)
        self._ready_at = max(self._ready_at, loop.time() + delay)
        self._on_the_way.append(item)
        loop.call_at(self._ready_at, self._arrive)

    def _arrive(self) -> None:
        self.other._hand_over(self._on_the_way.popleft())

    def _hand_over(self, item: bytes | None) -> None:
        if self._dead:
            return
        if self._protocol is None:
            self._arrived.append(item)
        elif item is None:
            self._protocol.connection_lost(None)
        else:
            self._protocol.data_received(item)


class Pipes:
    """The pairs of one server; their ends have numbers, as file descriptors are."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._ends: list[PipeEnd] = []

    def pair(self) -> tuple[int, int]:
        one, other = PipeEnd(self._rng), PipeEnd(self._rng)
        one.other, other.other = other, one
        self._ends += [one, other]
        return len(self._ends) - 2, len(self._ends) - 1

    def __getitem__(self, fd: int) -> PipeEnd:
        return self._ends[fd]


class PipeChannel(Channel):
    """A Channel whose `fd` is an end's number."""

    def __init__(
        self, pipes: Pipes, receives: Any, on_message: Callable[[Any], None], on_close: Callable[[], None]
    ) -> None:
        super().__init__(receives, on_message, on_close)
        self._pipes = pipes

    async def open(self, fd: int) -> None:
        self._pipes[fd].attach(self)
