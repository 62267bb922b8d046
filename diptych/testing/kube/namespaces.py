"""The namespace controller: a namespace that is deleted takes its content along."""

from __future__ import annotations

from collections.abc import Iterable

from diptych.testing.kube.api import CONTROLLER, Api
from diptych.testing.kube.controllers import Key
from diptych.testing.kube.store import Change


class Namespaces:
    def __init__(self, api: Api) -> None:
        self._api = api

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == ("", "namespaces"):
            yield (change.key[1],)
        elif change.type == "DELETED" and change.key[0]:
            yield (change.key[0],)

    def sync(self, key: Key) -> None:
        (name,) = key
        found = self._api.store.get(("", "namespaces"), "", name)
        if found is None or "deletionTimestamp" not in found["metadata"]:
            return
        empty = True
        for resource in self._api.store.resources():
            for obj in self._api.store.all(resource, name):
                empty = False
                if "deletionTimestamp" not in obj["metadata"]:
                    kind = next(kind for kind in self._api.kinds if kind.key == resource)
                    self._api.delete(kind, name, obj["metadata"]["name"])
        if empty:
            spec = {**found["spec"], "finalizers": []}
            self._api.update("Namespace", "", name, {**found, "spec": spec}, manager=CONTROLLER)
