"""What reconcilers see and touch of a cluster: the informers' copies for reading, writes that happen only if needed.

Server-side apply of the same fields changes nothing, but it is a request; so what was applied last is remembered, and
applied again only if it differs or the object was changed since. A new process has no memory and applies once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping

import msgspec

from diptych.errors import NotFound
from diptych.group.operator.api import Api, ApiError
from diptych.group.operator.events import Events
from diptych.group.operator.informer import Informer
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.resources import GROUP, Json, Kind, key_of


class Applied(msgspec.Struct, frozen=True):
    """Our last write of an object: what, and what came out of it."""

    digest: bytes
    uid: str
    mark: str  # see _mark


class Cluster:
    """Safe for several threads, as long as one object is written by one of them at a time."""

    def __init__(self, api: Api, informers: Mapping[Kind, Informer], events: Events, metrics: Metrics) -> None:
        self.api, self.events = api, events
        self._informers, self._metrics = informers, metrics
        self._lock = threading.Lock()
        self._applied: dict[tuple[Kind, str, str, str], Applied] = {}

    def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        return self._informers[kind].get(namespace, name)

    def of_group(self, kind: Kind, namespace: str, group: str) -> list[Json]:
        """The objects that carry the group's label."""
        return self._informers[kind].of_group(namespace, group)

    def owned(self, kind: Kind, uid: str) -> list[Json]:
        """The objects whose owner is the object `uid`."""
        return self._informers[kind].owned(uid)

    def apply(self, kind: Kind, obj: Json, subresource: str = "") -> bool:
        """Write `obj`, all that is ours of it, unless it is there like that. Whether it was written.

        Raises ApiError if an object of this name belongs to somebody else.
        """
        namespace, name = key_of(obj)
        key = (kind, namespace, name, subresource)
        digest = hashlib.sha256(msgspec.json.encode(obj, order="sorted")).digest()
        live = self.get(kind, namespace, name)
        with self._lock:
            last = self._applied.get(key)
        if live is not None and last == Applied(digest, live["metadata"]["uid"], _mark(live, subresource)):
            return False
        if not subresource and obj["metadata"].get("ownerReferences"):
            self._check_owner(kind, obj, live)
        new = self.api.apply(kind, obj, subresource)
        self._metrics.writes.labels("apply", kind.kind).inc()
        with self._lock:
            self._applied[key] = Applied(digest, new["metadata"]["uid"], _mark(new, subresource))
        self._informers[kind].saw(new)
        return True

    def merge(self, kind: Kind, namespace: str, name: str, patch: Json, subresource: str = "") -> None:
        new = self.api.merge(kind, namespace, name, patch, subresource)
        self._metrics.writes.labels("patch", kind.kind).inc()
        self._informers[kind].saw(new)

    def replace(self, kind: Kind, obj: Json) -> None:
        """Raises Conflict if the object has changed since it was read."""
        new = self.api.replace(kind, obj)
        self._metrics.writes.labels("update", kind.kind).inc()
        self._informers[kind].saw(new)

    def scale_group(self, group: Json, field: str, index: int, replicas: int) -> None:
        """Set `spec.<field>[<index>].replicas`. Raises Conflict if the group has changed."""
        metadata = group["metadata"]
        items = [dict(each) for each in group["spec"][field]]
        items[index]["replicas"] = replicas
        patch = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "spec": {field: items}}
        self.merge(GROUP, metadata["namespace"], metadata["name"], patch)

    def delete(self, kind: Kind, obj: Json, propagation: str = "Background") -> bool:
        """Delete this very object, unless that has been asked for already. Whether it was asked for now."""
        metadata = obj["metadata"]
        if metadata.get("deletionTimestamp"):
            return False
        self._metrics.writes.labels("delete", kind.kind).inc()
        return self.api.delete(kind, metadata.get("namespace", ""), metadata["name"], metadata["uid"], propagation)

    def forget(self, kind: Kind, namespace: str, name: str) -> None:
        """The object is gone for good."""
        with self._lock:
            for subresource in ("", "status"):
                self._applied.pop((kind, namespace, name, subresource), None)

    def _check_owner(self, kind: Kind, obj: Json, live: Json | None) -> None:
        """Server-side apply would take over whatever has this name; a user's own object must not be lost so."""
        namespace, name = key_of(obj)
        if live is None:
            try:
                live = self.api.get(kind, namespace, name)
            except NotFound:
                return
        owners = {each["uid"] for each in live["metadata"].get("ownerReferences") or []}
        wanted = {each["uid"] for each in obj["metadata"]["ownerReferences"]}
        if not wanted <= owners:
            raise ApiError(
                f"{kind.kind} {name} exists and does not belong to this group; rename the group or its role, or delete"
                f" that {kind.kind}"
            )


def _mark(obj: Json, subresource: str) -> str:
    """What changes when somebody changes what we applied: the generation, or for objects without one their version."""
    metadata = obj["metadata"]
    if subresource:
        return ""  # a status is ours alone
    return str(metadata.get("generation") or metadata["resourceVersion"])
