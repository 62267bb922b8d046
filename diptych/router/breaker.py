"""When a server that fails is left alone, and when it is tried again. Pure: the time is an argument."""

from __future__ import annotations

from collections import deque
from enum import IntEnum

from diptych.router.config import RouterConfig


class Circuit(IntEnum):
    """A breaker's state; the numbers are those of the metric."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


class Breaker:
    """Closed: requests pass. Open, after enough failures in the window: none pass. Half open, some time later: one at a
    time passes, until enough have succeeded or one has failed.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._enabled = not config.disable_circuit_breaker
        self._failures_to_open = config.cb_failure_threshold
        self._successes_to_close = config.cb_success_threshold
        self._open_s = config.cb_timeout_duration_secs
        self._window_s = config.cb_window_duration_secs
        self._failed_at: deque[float] = deque(maxlen=config.cb_failure_threshold)
        self._opened_at: float | None = None
        self._successes = 0
        self._trying = 0  # requests let through while half open

    def state(self, now: float) -> Circuit:
        if self._opened_at is None:
            return Circuit.CLOSED
        return Circuit.HALF_OPEN if now - self._opened_at >= self._open_s else Circuit.OPEN

    def allows(self, now: float) -> bool:
        """Whether a request may go to the server now."""
        if self._opened_at is None:
            return True
        return now - self._opened_at >= self._open_s and not self._trying

    def begin(self, now: float) -> bool:
        """A request goes to the server. What this returns belongs in `end`: whether it is a trial."""
        if self._opened_at is None or now - self._opened_at < self._open_s:
            return False
        self._trying += 1
        return True

    def end(self, now: float, failed: bool | None, trial: bool) -> None:
        """The request is over. `failed` None: that says nothing about the server (as when the client has left)."""
        if trial:
            self._trying -= 1
        if failed is None or not self._enabled:
            return
        if failed:
            self._fail(now, trial)
        elif trial and self._opened_at is not None:
            self._successes += 1
            if self._successes >= self._successes_to_close:
                self._opened_at = None
                self._failed_at.clear()

    def _fail(self, now: float, trial: bool) -> None:
        self._failed_at.append(now)
        enough = len(self._failed_at) == self._failures_to_open and now - self._failed_at[0] <= self._window_s
        if trial or (self._opened_at is None and enough):
            self._opened_at = now
            self._successes = 0
