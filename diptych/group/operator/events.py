"""Events on objects, as `kubectl describe` shows them: what happened and what a person can do about it.

An event that repeats is counted on the same object instead of being written anew, and written at most once a minute.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

from diptych.errors import DiptychError
from diptych.group.operator.api import Api, ApiError
from diptych.group.operator.resources import EVENT, Json

log = logging.getLogger(__name__)

QUIET_S = 60.0
MAX_KNOWN = 4096
MAX_MESSAGE = 1024  # what the API takes

Level = Literal["Normal", "Warning"]


class Events:
    """Writes events as `component`. A failure to write one is logged and nothing else."""

    def __init__(self, api: Api, component: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._component, self._clock = api, component, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[float, int, str]] = OrderedDict()  # name: written at, count, first time

    @contextmanager
    def of_refusals(self, obj: Json) -> Iterator[None]:
        """Says about `obj` what the API server refuses meanwhile: only a person can change that."""
        try:
            yield
        except ApiError as error:
            self.tell(obj, "Warning", "FailedReconcile", error.message)
            raise

    def tell(self, obj: Json, level: Level, reason: str, message: str) -> None:
        """Say `message` about `obj`."""
        metadata = obj["metadata"]
        message = message[:MAX_MESSAGE]
        digest = hashlib.sha256(f"{metadata['uid']}/{reason}/{message}".encode()).hexdigest()[:16]
        name = f"{metadata['name']}.{digest}"
        now, stamp = self._clock(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with self._lock:
            written_at, count, first = self._known.get(name, (float("-inf"), 0, stamp))
            quiet = now - written_at < QUIET_S
            self._known[name] = (written_at if quiet else now, count + 1, first)
            self._known.move_to_end(name)
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        if quiet:
            return
        event = {
            "metadata": {"namespace": metadata.get("namespace") or "default", "name": name},
            "involvedObject": {
                "apiVersion": obj["apiVersion"],
                "kind": obj["kind"],
                "namespace": metadata.get("namespace", ""),
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
            "type": level,
            "reason": reason,
            "message": message,
            "source": {"component": self._component},
            "firstTimestamp": first,
            "lastTimestamp": stamp,
            "count": count + 1,
        }
        try:
            self._api.apply(EVENT, event)
        except DiptychError as error:
            log.warning("an event was not written: %s", error.message)
