"""The garbage collector: objects go with their owners; foreground deletion waits for them, orphaning lets them be."""

from __future__ import annotations

from collections.abc import Iterable

from diptych.testing.kube.api import Api
from diptych.testing.kube.controllers import Key, Work
from diptych.testing.kube.deletion import Deleting
from diptych.testing.kube.kinds import Kind
from diptych.testing.kube.status import Obj
from diptych.testing.kube.store import Change, ResourceKey

MANAGER = "garbage-collector"
Place = tuple[ResourceKey, str, str]  # resource, namespace, name


def _finalizers(obj: Obj) -> list[str]:
    found: list[str] = obj["metadata"].get("finalizers", [])
    return found


class GarbageCollector:
    def __init__(self, api: Api, work: Work) -> None:
        self._api, self._work = api, work

    def keys(self, change: Change) -> Iterable[Key]:
        metadata = change.obj["metadata"]
        if change.type == "DELETED":
            for resource, child in self._api.store.children(metadata["uid"]):
                yield self._place(resource, child)
            for owner in metadata.get("ownerReferences", []):
                yield from self._owner(owner["uid"])
        elif "deletionTimestamp" in metadata and ({"foregroundDeletion", "orphan"} & set(_finalizers(change.obj))):
            yield self._place(change.resource, change.obj)
        elif "ownerReferences" in metadata:
            before = (change.before or {}).get("metadata", {}).get("ownerReferences", [])
            if metadata["ownerReferences"] != before:
                yield self._place(change.resource, change.obj)
                for owner in before:  # one that waits may be waited for no longer
                    yield from self._owner(owner["uid"])

    def _owner(self, uid: str) -> Iterable[Key]:
        owner = self._api.store.by_uid(uid)
        if owner is not None and "foregroundDeletion" in _finalizers(owner):
            yield self._place(self._kind_of(owner).key, owner)

    def _place(self, resource: ResourceKey, obj: Obj) -> Place:
        return resource, obj["metadata"].get("namespace", ""), obj["metadata"]["name"]

    def _kind_of(self, obj: Obj) -> Kind:
        return self._api.kinds.find(f"{obj['apiVersion']}/{obj['kind']}")

    def sync(self, key: Key) -> None:
        resource, namespace, name = key
        obj = self._api.store.get(resource, namespace, name)
        if obj is None:
            return
        if "deletionTimestamp" not in obj["metadata"]:
            self._collect(obj)
        elif "orphan" in _finalizers(obj):
            self._orphan(obj)
        elif "foregroundDeletion" in _finalizers(obj):
            self._foreground(obj)

    def _collect(self, obj: Obj) -> None:
        """Deletes an object none of whose owners exists (or stays)."""
        owners = obj["metadata"].get("ownerReferences", [])
        namespace = obj["metadata"].get("namespace", "")
        solid, waiting, gone = [], [], []
        for reference in owners:
            owner = self._api.store.by_uid(reference["uid"])
            if owner is None or owner["metadata"].get("namespace", namespace) != namespace:
                gone.append(reference)
            elif "foregroundDeletion" in _finalizers(owner) and "deletionTimestamp" in owner["metadata"]:
                waiting.append(reference)
            else:
                solid.append(reference)
        if not owners or (solid and not gone and not waiting):
            return
        if solid:
            self._patch(obj, {"metadata": {"ownerReferences": solid}})
            return
        children = self._api.store.children(obj["metadata"]["uid"])
        policy = "Foreground" if waiting and children else "Background"
        uid = obj["metadata"]["uid"]
        self._api.delete(self._kind_of(obj), namespace, obj["metadata"]["name"], Deleting(policy=policy, uid=uid))

    def _foreground(self, owner: Obj) -> None:
        """Deletes what blocks the owner's end; without any left, the owner may go."""
        uid, blocked = owner["metadata"]["uid"], False
        for _, child in self._api.store.children(uid):
            if "deletionTimestamp" not in child["metadata"]:
                self._collect(child)
        for _, child in self._api.store.children(uid):
            references = child["metadata"].get("ownerReferences", [])
            blocked |= any(one["uid"] == uid and one.get("blockOwnerDeletion") for one in references)
        if not blocked:
            self._finalize(owner, "foregroundDeletion")

    def _orphan(self, owner: Obj) -> None:
        uid = owner["metadata"]["uid"]
        for _, child in self._api.store.children(uid):
            rest = [one for one in child["metadata"]["ownerReferences"] if one["uid"] != uid]
            self._patch(child, {"metadata": {"ownerReferences": rest or None}})
        self._finalize(owner, "orphan")

    def _finalize(self, obj: Obj, finalizer: str) -> None:
        rest = [name for name in _finalizers(obj) if name != finalizer]
        self._patch(obj, {"metadata": {"finalizers": rest or None}})

    def _patch(self, obj: Obj, patch: Obj) -> None:
        namespace, name = obj["metadata"].get("namespace", ""), obj["metadata"]["name"]
        self._api.patch(self._kind_of(obj), namespace, name, patch, manager=MANAGER)
