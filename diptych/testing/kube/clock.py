"""Time of a cluster: the machine's, or one that moves only when a test says so. With it, timers."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache

START_S = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


@lru_cache(maxsize=16)
def _whole_seconds(now_s: int) -> str:
    return datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Clock:
    """`now()` in seconds since 1970. A manual clock starts at 2026-01-01 and stands still between `move` calls."""

    def __init__(self, *, manual: bool) -> None:
        self.manual = manual
        self._now_s = START_S
        self._offset_s = time.time() - time.monotonic()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def now(self) -> float:
        return self._now_s if self.manual else time.monotonic() + self._offset_s

    def stamp(self, *, micro: bool = False) -> str:
        """Now, as metav1.Time (whole seconds) or metav1.MicroTime."""
        now_s = self.now()
        if micro:
            return datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return _whole_seconds(int(now_s))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self.now() + seconds, next(self._number), action))

    def next_at(self) -> float | None:
        """When the next timer is due."""
        return self._timers[0][0] if self._timers else None

    def move(self, to_s: float) -> None:
        """Sets a manual clock; never backwards."""
        self._now_s = max(self._now_s, to_s)

    def pop_due(self) -> Callable[[], None] | None:
        """The action of the earliest timer that is due, removed; None if none is."""
        if self._timers and self._timers[0][0] <= self.now():
            return heapq.heappop(self._timers)[2]
        return None
