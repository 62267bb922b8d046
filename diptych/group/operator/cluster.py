"""What reconcilers see and touch of a cluster: the caches for reading, writes that happen only if needed.

Server-side apply of the same fields changes nothing, but it is a request; so what was applied last is remembered, and
applied again only if it differs or the object was changed since. A new process has no memory and applies once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from diptych.errors import DiptychError, NotFound, Unavailable
from diptych.group.operator.api import Api, ApiError
from diptych.group.operator.cache import Cache, controller_of
from diptych.group.operator.events import Events
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.resources import GROUP, Json, Kind, key_of
from diptych.group.operator.takeover import taken_over

MIN_FORGET = 256


class Leaving(DiptychError):
    """An object of an earlier group of the same name is in the way, and is being deleted."""

    code = "leaving"


class Applied(msgspec.Struct, frozen=True):
    """Our last write of an object: what, and what came out of it."""

    digest: bytes
    uid: str
    version: str  # see _version


class Cluster:
    """Safe for several threads, as long as one object is written by one of them at a time.

    `may_write` is asked before every write, which raises Unavailable if it says no.
    """

    def __init__(
        self,
        api: Api,
        caches: Mapping[Kind, Cache],
        events: Events,
        metrics: Metrics,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        self.events = events
        self._api, self._caches, self._metrics, self._may_write = api, caches, metrics, may_write
        self._lock = threading.Lock()
        self._applied: dict[tuple[Kind, str, str], Applied] = {}
        self._forget_at = MIN_FORGET

    def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        return self._caches[kind].get(namespace, name)

    def of_group(self, kind: Kind, namespace: str, group: str) -> list[Json]:
        """The objects that carry the group's label."""
        return self._caches[kind].of_group(namespace, group)

    def owned(self, kind: Kind, uid: str) -> list[Json]:
        """The objects whose controller is the object `uid`."""
        return self._caches[kind].owned(uid)

    def look_up(self, kind: Kind, namespace: str, name: str) -> Json | None:
        """As the API server has it at this moment, whatever its labels."""
        try:
            return self._api.get(kind, namespace, name)
        except NotFound:
            return None

    def apply(self, kind: Kind, obj: Json) -> bool:
        """Write `obj`, all that is ours of it, unless it is there like that. Whether it was written.

        Raises ApiError if an object of this name belongs to somebody else, or if there is no such kind; Leaving if it
        belongs to a group that is gone.
        """
        namespace, name = key_of(obj)
        key = (kind, namespace, name)
        digest = hashlib.sha256(msgspec.json.encode(obj, order="sorted")).digest()
        live = self.get(kind, namespace, name)
        with self._lock:
            last = self._applied.get(key)
        if live is not None and last == Applied(digest, live["metadata"]["uid"], _version(live)) and _says(live, obj):
            return False
        self._check_owner(kind, obj, live)
        self._take_over(kind, namespace, name)
        try:
            new = self._write("apply", kind, lambda: self._api.apply(kind, obj))
        except NotFound as error:
            raise ApiError(
                f"the cluster knows no {kind.kind} of {kind.api_version}; install what brings it, or do without ("
                f"{error.message})"
            ) from None
        with self._lock:
            self._applied[key] = Applied(digest, new["metadata"]["uid"], _version(new))
            self._forget()
        return True

    def apply_status(self, kind: Kind, obj: Json, status: Json) -> bool:
        """Write the status of `obj` unless it is so. Whether it was written."""
        old = obj.get("status") or {}
        if all(old.get(field) == value for field, value in status.items()):
            return False
        namespace, name = key_of(obj)
        self._take_over(kind, namespace, name)
        new = {"metadata": {"namespace": namespace, "name": name}, "status": status}
        self._write("apply", kind, lambda: self._api.apply(kind, new, "status"))
        return True

    def merge(self, kind: Kind, namespace: str, name: str, patch: Json) -> None:
        self._write("patch", kind, lambda: self._api.merge(kind, namespace, name, patch))

    def replace(self, kind: Kind, obj: Json) -> None:
        """Raises Conflict if the object has changed since it was read."""
        self._write("update", kind, lambda: self._api.replace(kind, obj))

    def scale_group(self, group: Json, field: str, index: int, replicas: int) -> None:
        """Set `spec.<field>[<index>].replicas`. Raises Conflict if the group has changed."""
        metadata = group["metadata"]
        items = [dict(each) for each in group["spec"][field]]
        items[index]["replicas"] = replicas
        patch = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "spec": {field: items}}
        self.merge(GROUP, metadata["namespace"], metadata["name"], patch)

    def delete(self, kind: Kind, obj: Json, *, foreground: bool = False) -> bool:
        """Delete this very object, unless that has been asked for already. Whether it was asked for now. `foreground`:
        as in Api."""
        metadata = obj["metadata"]
        if metadata.get("deletionTimestamp"):
            return False
        where = metadata.get("namespace", ""), metadata["name"], metadata["uid"]
        return bool(self._write("delete", kind, lambda: self._api.delete(kind, *where, foreground=foreground)))

    def is_upstreams(self, kind: Kind, obj: Json) -> bool:
        """Whether the upstream controller owns fields of the object."""
        return self._caches[kind].is_upstreams(*key_of(obj))

    def _take_over(self, kind: Kind, namespace: str, name: str) -> None:
        """What the upstream controller owned of the object is ours. Raises Conflict if the object has changed."""
        if self._caches[kind].is_upstreams(namespace, name):
            metadata = self._api.get(kind, namespace, name)["metadata"]
            mine = {
                "resourceVersion": metadata["resourceVersion"],
                "managedFields": taken_over(metadata["managedFields"]),
            }
            self.merge(kind, namespace, name, {"metadata": mine})

    def _write(self, verb: str, kind: Kind, call: Callable[[], Any]) -> Any:
        """The answer; the cache need not wait for the watch to show it."""
        if not self._may_write():
            raise Unavailable("this operator does not hold the lease at the moment")
        self._metrics.writes.labels(verb, kind.kind).inc()
        answer = call()
        if answer and "resourceVersion" in answer.get("metadata", {}):
            self._caches[kind].put(answer)
        return answer

    def _forget(self) -> None:
        """What is gone is forgotten now and then."""
        if len(self._applied) < self._forget_at:
            return
        for kind, namespace, name in list(self._applied):
            if not self._caches[kind].has(namespace, name):
                del self._applied[kind, namespace, name]
        self._forget_at = max(MIN_FORGET, 2 * len(self._applied))

    def _check_owner(self, kind: Kind, obj: Json, live: Json | None) -> None:
        """Server-side apply would take over whatever has this name; a user's own object must not be lost so."""
        namespace, name = key_of(obj)
        live = live or self.look_up(kind, namespace, name)
        if live is None:
            return
        wanted = obj["metadata"]["ownerReferences"][0]
        owners = live["metadata"].get("ownerReferences") or []
        if any(each["uid"] == wanted["uid"] for each in owners) or is_orphan(live, obj["metadata"]["labels"]):
            return
        if any((each["kind"], each["name"]) == (wanted["kind"], wanted["name"]) for each in owners):
            raise Leaving(f"{kind.kind} {name} belongs to a {wanted['kind']} {wanted['name']} that is being deleted")
        raise ApiError(
            f"{kind.kind} {name} exists and does not belong to this group; rename the group or its role, or delete"
            f" that {kind.kind}"
        )


def is_orphan(obj: Json, labels: Mapping[str, str]) -> bool:
    """Whether the object says by these labels that it belonged to the group, and belongs to nobody now: its owner
    reference was removed, or the group was deleted without its dependents and has been made again."""
    metadata = obj["metadata"]
    ending = "deletionTimestamp" in metadata
    return not ending and not controller_of(obj) and labels.items() <= (metadata.get("labels") or {}).items()


def _version(obj: Json) -> str:
    """What changes when somebody changes what we applied: the generation, or for objects without one their version."""
    metadata = obj["metadata"]
    return str(metadata.get("generation") or metadata["resourceVersion"])


def _says(live: Json, obj: Json) -> bool:
    """Whether our labels, annotations and owner are on it: they make no new generation."""
    have, want = live["metadata"], obj["metadata"]
    for field in ("labels", "annotations"):
        if not (want.get(field) or {}).items() <= (have.get(field) or {}).items():
            return False
    return {each["uid"] for each in want["ownerReferences"]} <= {
        each["uid"] for each in have.get("ownerReferences") or []
    }
