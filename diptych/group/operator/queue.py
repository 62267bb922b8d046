"""A queue of keys to look at again: each key once, never two workers on one key, failures ever later.

The rules are those of Kubernetes' own controllers (client-go's workqueue): a key added while it is being worked on is
worked on again afterwards, so that no change is missed and none is worked on twice at a time.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class KeyQueue(Generic[K]):
    """`base_s`·2^n up to `cap_s` is the wait after the n-th failure in a row of a key. Thread-safe."""

    def __init__(self, base_s: float = 0.1, cap_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._base_s, self._cap_s, self._clock = base_s, cap_s, clock
        self._changed = threading.Condition()
        self._due: OrderedDict[K, None] = OrderedDict()  # waiting for a worker, first come first served
        self._working: set[K] = set()
        self._again: set[K] = set()  # added while being worked on
        self._later: list[tuple[float, int, K]] = []
        self._at: dict[K, float] = {}  # when a key in `_later` is due; entries of the heap that differ are void
        self._failures: dict[K, int] = {}
        self._count = 0
        self._closed = False

    def __len__(self) -> int:
        """Keys that are due now."""
        with self._changed:
            return len(self._due)

    def add(self, key: K) -> None:
        """Work on `key` as soon as a worker is free."""
        with self._changed:
            self._add(key)

    def add_after(self, key: K, delay_s: float) -> None:
        """Work on `key` in `delay_s`, or earlier if something else asks for it."""
        with self._changed:
            at = self._clock() + delay_s
            if delay_s <= 0:
                self._add(key)
            elif at < self._at.get(key, float("inf")):
                self._at[key] = at
                self._count += 1
                heapq.heappush(self._later, (at, self._count, key))
                self._changed.notify()

    def retry(self, key: K, at_least_s: float = 0.0) -> float:
        """Work on `key` again after a failure. Returns the seconds until then."""
        with self._changed:
            failures = self._failures.get(key, 0)
            self._failures[key] = failures + 1
        delay_s = max(at_least_s, min(self._cap_s, self._base_s * 2.0 ** min(failures, 60)))
        self.add_after(key, delay_s)
        return delay_s

    def succeeded(self, key: K) -> None:
        """The next failure of `key` is its first."""
        with self._changed:
            self._failures.pop(key, None)

    def get(self, timeout_s: float) -> K | None:
        """The next key, which must be given back with `done`; None after `timeout_s` or `close`."""
        deadline = self._clock() + timeout_s
        with self._changed:
            while not self._closed:
                now = self._clock()
                self._take_due(now)
                if self._due:
                    key, _ = self._due.popitem(last=False)
                    self._working.add(key)
                    return key
                if now >= deadline:
                    return None
                next_at = self._later[0][0] if self._later else deadline
                self._changed.wait(max(0.0, min(deadline, next_at) - now))
            return None

    def done(self, key: K) -> None:
        with self._changed:
            self._working.discard(key)
            if key in self._again:
                self._again.discard(key)
                self._add(key)

    def close(self) -> None:
        """Every `get` returns None from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _add(self, key: K) -> None:
        self._at.pop(key, None)
        if key in self._working:
            self._again.add(key)
        elif key not in self._due:
            self._due[key] = None
            self._changed.notify()

    def _take_due(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            at, _, key = heapq.heappop(self._later)
            if self._at.get(key) == at:
                self._add(key)
