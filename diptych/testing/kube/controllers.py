"""What runs the simulated controllers: keyed work from changes and timers, one item at a time, in a fixed order."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Protocol

from diptych.testing.kube.clock import Clock
from diptych.testing.kube.status import ApiError
from diptych.testing.kube.store import Change

RETRY_S = 1.0
Key = tuple[Any, ...]
_log = logging.getLogger(__name__)


class Controller(Protocol):
    def keys(self, change: Change) -> Iterable[Key]:
        """Which of its objects a change concerns."""

    def sync(self, key: Key) -> None:
        """Brings one of them nearer to what it should be. An ApiError is retried after RETRY_S."""


class Work:
    """The queue of all controllers. A key waits in it at most once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._controllers: list[Controller] = []
        self._queue: dict[tuple[Controller, Key], None] = {}

    def add(self, controller: Controller) -> None:
        self._controllers.append(controller)

    def notice(self, change: Change) -> None:
        for controller in self._controllers:
            for key in controller.keys(change):
                self._queue[controller, key] = None

    def enqueue(self, controller: Controller, key: Key) -> None:
        self._queue[controller, key] = None

    def after(self, seconds: float, controller: Controller, key: Key) -> None:
        self._clock.after(seconds, lambda: self.enqueue(controller, key))

    def run_one(self) -> bool:
        """One item, or a timer that is due; False when neither is there."""
        if not self._queue:
            action = self._clock.pop_due()
            if action is None:
                return False
            action()
            return True
        controller, key = next(iter(self._queue))
        del self._queue[controller, key]
        try:
            controller.sync(key)
        except ApiError as error:
            _log.debug("%s %s: %s", type(controller).__name__, key, error)
            self.after(RETRY_S, controller, key)
        return True
