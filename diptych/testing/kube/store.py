"""Objects, one revision counter, and what happened: the part of the API server that etcd and the watch cache are.

A stored object is never changed in place; every write replaces it. Not thread-safe: `Cluster.lock` guards it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from diptych.testing.kube.status import Obj, expired

ResourceKey = tuple[str, str]  # API group, plural
ObjectKey = tuple[str, str]  # namespace ("" for cluster scope), name
_encode = msgspec.json.encode
_decode = msgspec.json.decode


@dataclass(frozen=True, slots=True)
class Change:
    """One write. `type` is ADDED, MODIFIED or DELETED; `before` is the object that it replaced or removed."""

    revision: int
    type: str
    resource: ResourceKey
    obj: Obj
    before: Obj | None

    @property
    def key(self) -> ObjectKey:
        return key_of(self.obj)


def key_of(obj: Obj) -> ObjectKey:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def copy(obj: Obj) -> Obj:
    """A deep copy that the caller may change."""
    copied: Obj = _decode(_encode(obj))
    return copied


class Store:
    """`history`: how many changes of a resource stay replayable; older ones answer a watch with 410."""

    def __init__(self, history: int = 10_000) -> None:
        self.revision = 1
        self.listeners: list[Callable[[Change], None]] = []
        self._objects: dict[ResourceKey, dict[ObjectKey, Obj]] = defaultdict(dict)
        self._history: dict[ResourceKey, deque[Change]] = defaultdict(lambda: deque(maxlen=history))
        self._forgotten: dict[ResourceKey, int] = defaultdict(int)
        self._floor = 0
        self._children: dict[str, dict[tuple[ResourceKey, ObjectKey], None]] = defaultdict(dict)
        self._by_uid: dict[str, tuple[ResourceKey, ObjectKey]] = {}

    def get(self, resource: ResourceKey, namespace: str, name: str) -> Obj | None:
        """The object itself: read it, never change it."""
        return self._objects[resource].get((namespace, name))

    def all(self, resource: ResourceKey, namespace: str | None = None) -> Iterator[Obj]:
        """In the order of creation; `namespace` None means every one."""
        for key, obj in list(self._objects[resource].items()):
            if namespace is None or key[0] == namespace:
                yield obj

    def at(self, resource: ResourceKey, revision: int) -> dict[ObjectKey, Obj]:
        """The objects as they were at `revision`. Raises 410 when that is too long ago."""
        objects = self._objects[resource]
        if revision == self.revision:
            return objects
        objects = dict(objects)
        for change in reversed(self.since(resource, revision)):
            if change.before is None:
                objects.pop(change.key, None)
            else:
                objects[change.key] = change.before
        return objects

    def resources(self) -> list[ResourceKey]:
        return [resource for resource, objects in self._objects.items() if objects]

    def children(self, uid: str) -> list[tuple[ResourceKey, Obj]]:
        """Objects that name `uid` in their owner references, in the order of creation."""
        return [(resource, self._objects[resource][key]) for resource, key in self._children.get(uid, ())]

    def by_uid(self, uid: str) -> Obj | None:
        place = self._by_uid.get(uid)
        return self._objects[place[0]][place[1]] if place else None

    def put(self, resource: ResourceKey, obj: Obj) -> Obj:
        """Stores `obj` under a new revision and returns it as stored."""
        before = self._objects[resource].get(key_of(obj))
        self.revision += 1
        obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.revision)}}
        self._objects[resource][key_of(obj)] = obj
        self._index(resource, before, obj)
        self._commit(Change(self.revision, "MODIFIED" if before else "ADDED", resource, obj, before))
        return obj

    def remove(self, resource: ResourceKey, namespace: str, name: str) -> Obj:
        """Removes the object; the last version, under the revision of its removal, is returned."""
        before = self._objects[resource].pop((namespace, name))
        self.revision += 1
        obj = {**before, "metadata": {**before["metadata"], "resourceVersion": str(self.revision)}}
        self._index(resource, before, None)
        self._commit(Change(self.revision, "DELETED", resource, obj, before))
        return obj

    def since(self, resource: ResourceKey, revision: int) -> list[Change]:
        """Changes after `revision`, oldest first. Raises 410 when some of them are forgotten."""
        if revision < max(self._forgotten[resource], self._floor):
            raise expired(f"too old resource version: {revision} ({self.revision})")
        found = []
        for change in reversed(self._history[resource]):
            if change.revision <= revision:
                break
            found.append(change)
        return found[::-1]

    def forget(self) -> None:
        """Compaction: every revision before now is too old to watch from."""
        self._floor = self.revision
        self._history.clear()

    def _commit(self, change: Change) -> None:
        history = self._history[change.resource]
        if len(history) == history.maxlen:
            self._forgotten[change.resource] = history[0].revision
        history.append(change)
        for listener in self.listeners:
            listener(change)

    def _index(self, resource: ResourceKey, before: Obj | None, after: Obj | None) -> None:
        place = (resource, key_of(after or before or {}))
        old, new = _owners(before), _owners(after)
        for uid in old - new:
            self._children[uid].pop(place, None)
            if not self._children[uid]:
                del self._children[uid]
        for uid in sorted(new - old):
            self._children[uid][place] = None
        if after is None and before is not None:
            self._by_uid.pop(before["metadata"]["uid"], None)
        elif after is not None:
            self._by_uid[after["metadata"]["uid"]] = place


def _owners(obj: Obj | None) -> set[str]:
    return {owner["uid"] for owner in obj["metadata"].get("ownerReferences", [])} if obj else set()
