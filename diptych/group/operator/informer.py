"""Keeps a Cache in step with the API server: list once, then watch.

A watch that ends goes on where it stopped; one that the server cannot continue (410) starts with a new list, and what
disappeared meanwhile is reported as deleted. So after any disturbance the copies are right again without a restart.
"""

from __future__ import annotations

import logging
import random
import threading
import time

from diptych.errors import DiptychError, NotFound
from diptych.group.operator.api import Api, Forbidden, Gone, Watch
from diptych.group.operator.cache import Cache
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.resources import key_of

log = logging.getLogger(__name__)

WATCH_S = 300  # the server is asked to end a watch after so long; clients then spread over its instances again
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 0.5  # short: a watch is one request, and what happens meanwhile is not seen
NOT_SERVED_S = 30.0  # how often a kind is tried that the cluster does not know
MAX_REFUSED = 5  # watches refused in a row until a list is tried: a restored server may not know our version yet


class Informer:
    """Feeds `cache` with its kind's objects of one namespace (or of all: ""), those with the labels of `selector`.

    `optional`: the cluster may lack the kind, or not let us see it; there are no objects then.
    """

    def __init__(
        self, api: Api, cache: Cache, namespace: str, selector: str, metrics: Metrics, *, optional: bool = False
    ) -> None:
        self.kind = cache.kind
        self._api, self._cache, self._namespace, self._selector = api, cache, namespace, selector
        self._metrics, self._optional = metrics, optional
        self._stopping = threading.Event()
        self._watch: Watch | None = None
        self._version = ""  # to watch from; empty: list first
        self._refused = 0
        self.synced = threading.Event()  # a first list is here (or the cluster lacks an optional kind)
        self._thread = threading.Thread(target=self._follow, name=f"watch-{self.kind.plural}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end; `join` waits for it."""
        self._stopping.set()
        if self._watch is not None:
            self._watch.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _follow(self) -> None:
        retry_s = FIRST_RETRY_S
        while not self._stopping.is_set():
            started = time.monotonic()
            pause_s = self._go_on()
            if time.monotonic() - started > LAST_RETRY_S:
                retry_s = FIRST_RETRY_S
            self._stopping.wait(pause_s if pause_s is not None else retry_s * random.uniform(0.8, 1.2))
            retry_s = min(LAST_RETRY_S, 2 * retry_s)

    def _go_on(self) -> float | None:
        """List if need be, and watch until the stream ends. Returns the pause until the next time; None: the usual."""
        try:
            if not self._version:
                self._list()
            self._watch_until_it_ends()
        except Gone:
            self._version = ""
            self._metrics.relists.labels(self.kind.kind).inc()
            return 0.0
        except (NotFound, Forbidden) as error:
            return self._denied(error)
        except DiptychError as error:
            self._refused += 1
            if self._refused >= MAX_REFUSED:
                self._version, self._refused = "", 0
            if not self._stopping.is_set():
                log.warning("%s: %s", self.kind.kind, error.message)
        except Exception:
            log.exception("following %s failed; it is listed again", self.kind.plural)
            self._version = ""
        return None

    def _denied(self, error: DiptychError) -> float | None:
        self._version = ""
        if self._optional:
            if not self.synced.is_set():
                log.info("%s is not used: %s", self.kind.kind, error.message)
            if isinstance(error, NotFound):
                self._cache.replace([], "")
            self.synced.set()
            return NOT_SERVED_S
        hint = "is the CRD installed (diptych crds | kubectl apply -f -)?"
        log.warning("%s: %s", error.message, hint if isinstance(error, NotFound) else "see deploy/operator/role")
        return None

    def _list(self) -> None:
        self._cache.begin_list()
        items, version = self._api.list(self.kind, self._namespace, self._selector)
        self._cache.replace(items, version)
        self._version = version
        self.synced.set()

    def _watch_until_it_ends(self) -> None:
        self._watch = self._api.watch(self.kind, self._namespace, self._selector, self._version, WATCH_S)
        self._refused = 0
        if self._stopping.is_set():
            self._watch.close()
        try:
            for event, obj in self._watch:
                self._version = obj["metadata"]["resourceVersion"]
                if event == "DELETED":
                    self._cache.drop(key_of(obj), self._version)
                elif event != "BOOKMARK":
                    self._cache.put(obj)
        except Gone:
            raise
        except DiptychError as error:
            if not self._stopping.is_set():
                log.info("%s: %s; going on from version %s", self.kind.kind, error.message, self._version)
