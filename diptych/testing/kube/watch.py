"""Watches: from changes to events that one client asked for, each exactly once and in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from diptych.testing.kube.kinds import Kind
from diptych.testing.kube.selectors import LabelTest
from diptych.testing.kube.status import Obj
from diptych.testing.kube.store import Change


@dataclass(frozen=True)
class Filter:
    """What a watch shows of a kind."""

    kind: Kind
    namespace: str | None
    labels: LabelTest
    fields: Callable[[Obj], bool]

    def has(self, obj: Obj | None) -> bool:
        if obj is None or self.namespace not in (None, obj["metadata"].get("namespace", "")):
            return False
        return self.labels(obj["metadata"].get("labels", {})) and self.fields(obj)

    def event(self, change: Change) -> Obj | None:
        """The event of a change; None if it does not concern the watch. What a selector stops matching is DELETED."""
        before = self.has(change.before)
        after = change.type != "DELETED" and self.has(change.obj)
        if not before and not after:
            return None
        kind = "MODIFIED" if before and after else "ADDED" if after else "DELETED"
        obj = change.obj
        if kind == "DELETED" and change.type != "DELETED" and change.before is not None:
            version = obj["metadata"]["resourceVersion"]
            obj = {**change.before, "metadata": {**change.before["metadata"], "resourceVersion": version}}
        return self.shown(kind, obj)

    def shown(self, event: str, obj: Obj) -> Obj:
        return {"type": event, "object": {**obj, "apiVersion": self.kind.api_version}}


class Watcher:
    """The changes that one open watch has not sent yet. Fed under the cluster's lock, read by the server's loop."""

    def __init__(self, resource: tuple[str, str], loop: asyncio.AbstractEventLoop) -> None:
        self.resource = resource
        self.dropped = False
        self._loop = loop
        self._changes: deque[Change] = deque()
        self._news = asyncio.Event()

    def feed(self, change: Change) -> None:
        """From any thread."""
        idle = not self._changes
        self._changes.append(change)
        if idle:
            self._loop.call_soon_threadsafe(self._news.set)

    def drop(self) -> None:
        """From any thread: the connection is to be cut."""
        self.dropped = True
        self._loop.call_soon_threadsafe(self._news.set)

    def take(self) -> list[Change]:
        """All that is there, under the cluster's lock."""
        changes = list(self._changes)
        self._changes.clear()
        self._news.clear()
        return changes

    async def wait(self, timeout_s: float) -> None:
        """Until there is news, or the time is over."""
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError:
            pass
