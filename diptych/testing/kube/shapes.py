"""How an object's parts merge: which lists are maps or sets, which maps are one value.

A shape is asked on the way down: `child(name)` for a field, `item()` for a list's items. Built-in kinds go by field
names (the table is compared with the published schemas in tests/kube); custom ones by their structural schema.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

from diptych.testing.kube.kinds import Kind
from diptych.testing.kube.status import Obj

Keys = tuple[tuple[str, Any], ...]  # key field, default

LIST_KEYS: dict[str, Keys] = {
    "conditions": (("type", None),),
    "containers": (("name", None),),
    "initContainers": (("name", None),),
    "ephemeralContainers": (("name", None),),
    "evictionResponders": (("name", None),),
    "env": (("name", None),),
    "claims": (("name", None),),
    "resourceClaims": (("name", None),),
    "resourceClaimStatuses": (("name", None),),
    "schedulingGates": (("name", None),),
    "imagePullSecrets": (("name", None),),
    "secrets": (("name", None),),
    "volumes": (("name", None),),
    "volumeMounts": (("mountPath", None),),
    "volumeDevices": (("devicePath", None),),
    "hostAliases": (("ip", None),),
    "podIPs": (("ip", None),),
    "ownerReferences": (("uid", None),),
    "topologySpreadConstraints": (("topologyKey", None), ("whenUnsatisfiable", None)),
}
CONTAINER_PORT: Keys = (("containerPort", None), ("protocol", "TCP"))
SERVICE_PORT: Keys = (("port", None), ("protocol", "TCP"))
SETS = frozenset({"finalizers"})
ATOMIC_MAPS = frozenset(
    {
        "selector",
        "labelSelector",
        "namespaceSelector",
        "nodeSelector",
        "fieldRef",
        "resourceFieldRef",
        "configMapKeyRef",
        "secretKeyRef",
        "fileKeyRef",
        "secretRef",
        "claimRef",
        "involvedObject",
        "related",
        "regarding",
    }
)


class Shape(Protocol):
    @property
    def keys(self) -> Keys | None:
        """Of a list of type map: its key fields with defaults."""

    @property
    def is_set(self) -> bool: ...

    @property
    def atomic_map(self) -> bool: ...

    def child(self, name: str) -> Shape: ...

    def item(self) -> Shape: ...


class ByName:
    """Built-in kinds: the field's name decides, and its parent's where one name has two meanings."""

    def __init__(self, name: str = "", parent: str = "", *, item: bool = False) -> None:
        self._name, self._parent, self._item = name, parent, item

    @property
    def keys(self) -> Keys | None:
        if self._item:
            return None
        if self._name == "ports":
            return SERVICE_PORT if self._parent == "spec" else CONTAINER_PORT
        return LIST_KEYS.get(self._name)

    @property
    def is_set(self) -> bool:
        return self._name in SETS

    @property
    def atomic_map(self) -> bool:
        if self._item:
            return self._name in ("ownerReferences", "imagePullSecrets")
        return self._name in ATOMIC_MAPS

    def child(self, name: str) -> ByName:
        # below labels, annotations or data every name is a plain key
        if self._name in ("labels", "annotations", "data", "limits", "requests") and not self._item:
            return _by_name("", "", False)
        return _by_name(name, self._name, False)

    def item(self) -> ByName:
        return _by_name(self._name, self._parent, True)


@lru_cache(maxsize=4096)
def _by_name(name: str, parent: str, item: bool) -> ByName:
    return ByName(name, parent, item=item)


class BySchema:
    """Custom kinds. Where the schema says nothing (preserve-unknown-fields), lists are atomic and maps granular."""

    def __init__(self, schema: Obj) -> None:
        self._schema = schema

    @property
    def keys(self) -> Keys | None:
        if self._schema.get("x-kubernetes-list-type") != "map":
            return None
        properties = self._schema.get("items", {}).get("properties", {})
        names = self._schema.get("x-kubernetes-list-map-keys", [])
        return tuple((name, properties.get(name, {}).get("default")) for name in names)

    @property
    def is_set(self) -> bool:
        return self._schema.get("x-kubernetes-list-type") == "set"

    @property
    def atomic_map(self) -> bool:
        return self._schema.get("x-kubernetes-map-type") == "atomic"

    def child(self, name: str) -> BySchema:
        below = self._schema.get("properties", {}).get(name)
        if below is None:
            below = self._schema.get("additionalProperties")
        return BySchema(below if isinstance(below, dict) else {})

    def item(self) -> BySchema:
        return BySchema(self._schema.get("items", {}))


class _Custom(BySchema):
    """The root of a custom object: its metadata is built in."""

    def child(self, name: str) -> Any:
        return ByName(name) if name == "metadata" else super().child(name)


def shape_of(kind: Kind) -> Shape:
    return ByName() if kind.schema is None else _Custom(kind.schema)
