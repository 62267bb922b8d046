"""The operator's process: informers fill a queue with keys, workers of the leader reconcile them, one at a time a key.

Every operator of a cluster follows the API server, so that a new leader need not list first; only the leader works.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from diptych.errors import DiptychError, Overloaded, Unavailable
from diptych.group.operator.api import Conflict
from diptych.group.operator.informer import Informer
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.queue import KeyQueue
from diptych.group.operator.routes import Key

log = logging.getLogger(__name__)

UNAVAILABLE_RETRY_S = 1.0  # while the API server is away: soon after it is back, everything is repaired
POLL_S = 1.0


class Reconciler(Protocol):
    """Makes the cluster as one object wants it. Called for one key at a time, from any thread."""

    def reconcile(self, namespace: str, name: str) -> float | None:
        """Look at everything and write what differs. Returns the seconds after which time alone may change something,
        or None. Raises DiptychError to be called again later."""


class Workers:
    """`num` threads that take keys from `queue` while `leading` is set."""

    def __init__(
        self,
        queue: KeyQueue[Key],
        reconcilers: dict[str, Reconciler],
        metrics: Metrics,
        num: int,
        leading: threading.Event,
    ) -> None:
        self._queue, self._reconcilers, self._metrics, self._leading = queue, reconcilers, metrics, leading
        self._stopping = threading.Event()
        self.started = False
        self._threads = [threading.Thread(target=self._work, name=f"reconcile-{i}", daemon=True) for i in range(num)]

    def start(self) -> None:
        self.started = True
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Let reconciles in progress finish. False if one did not within `timeout_s`."""
        self._stopping.set()
        self._queue.close()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while not self._stopping.is_set():
            if not self._leading.wait(POLL_S):
                continue
            key = self._queue.get(POLL_S)
            self._metrics.queue_depth.labels("groups").set(len(self._queue))
            if key is not None:
                self._reconcile(key)
                self._queue.done(key)

    def _reconcile(self, key: Key) -> None:
        started = time.monotonic()
        result = "success"
        try:
            again_s = self._reconcilers[key.controller].reconcile(key.namespace, key.name)
            self._queue.succeeded(key)
            if again_s is not None:
                result = "requeue_after"
                self._queue.add_after(key, again_s)
        except Conflict:  # the newer object is on its way to us
            result = "conflict"
            self._queue.retry(key)
        except Unavailable as error:
            result = "error"
            log.warning("%s %s/%s: %s", *key, error.message)
            self._queue.add_after(key, UNAVAILABLE_RETRY_S)
        except DiptychError as error:
            result = "error"
            wait_s = self._queue.retry(key, error.retry_after_s if isinstance(error, Overloaded) else 0.0)
            log.warning("%s %s/%s: %s; again in %.1f s", *key, error.message, wait_s)
        except Exception:
            result = "error"
            wait_s = self._queue.retry(key)
            log.exception("%s %s/%s failed; again in %.1f s", *key, wait_s)
        if result == "error":
            self._metrics.retries.labels("groups").inc()
        self._metrics.reconciles.labels(key.controller, result).inc()
        self._metrics.reconcile_s.labels(key.controller).observe(time.monotonic() - started)


def wait_synced(informers: Sequence[Informer], stopping: threading.Event, on_wait: Callable[[str], None]) -> bool:
    """Wait until every informer has its first list. False if `stopping` came first. `on_wait` hears which kind is
    waited for, every 10 s."""
    for informer in informers:
        waited_s = 0.0
        while not informer.synced.wait(POLL_S):
            if stopping.is_set():
                return False
            waited_s += POLL_S
            if waited_s % 10 == 0:
                on_wait(informer.kind.kind)
    return not stopping.is_set()
