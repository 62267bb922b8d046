"""Who owns which fields: the entries of metadata.managedFields, and what a plain write does to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diptych.testing.kube.fields import Fields, Path, from_v1, leaves, to_v1
from diptych.testing.kube.shapes import Shape
from diptych.testing.kube.status import Obj

# never owned: the server sets them (the fields that kube-apiserver strips from every set)
_STRIPPED = frozenset(
    {"name", "namespace", "creationTimestamp", "selfLink", "uid", "generation", "managedFields", "resourceVersion"}
    | {"deletionTimestamp", "deletionGracePeriodSeconds", "generateName"}
)


@dataclass(frozen=True, order=True)
class Manager:
    name: str
    operation: str  # Apply | Update
    subresource: str = ""


Owners = dict[Manager, Fields]


def stripped(obj: Obj) -> Obj:
    """The object without what nobody owns."""
    metadata = {key: value for key, value in obj.get("metadata", {}).items() if key not in _STRIPPED}
    kept = {key: value for key, value in obj.items() if key not in ("apiVersion", "kind", "metadata")}
    if metadata:
        kept["metadata"] = metadata
    return kept


def owners_of(obj: Obj) -> Owners:
    found: Owners = {}
    for entry in obj.get("metadata", {}).get("managedFields", []):
        manager = Manager(entry["manager"], entry["operation"], entry.get("subresource", ""))
        found[manager] = from_v1(entry["fieldsV1"])
    return found


def with_owners(obj: Obj, owners: Owners, before: Obj | None, now: str) -> Obj:
    """`obj` with its managedFields; an entry whose fields are as `before` keeps its time."""
    old = owners_of(before) if before else {}
    times = {
        Manager(entry["manager"], entry["operation"], entry.get("subresource", "")): entry["time"]
        for entry in (before or {}).get("metadata", {}).get("managedFields", [])
    }
    entries = []
    for manager in sorted(owners, key=lambda one: (one.operation, one.name, one.subresource)):
        fields = owners[manager]
        if not fields:
            continue
        entry = {
            "manager": manager.name,
            "operation": manager.operation,
            "apiVersion": obj["apiVersion"],
            "time": times[manager] if old.get(manager) == fields else now,
            "fieldsType": "FieldsV1",
            "fieldsV1": to_v1(fields),
        }
        if manager.subresource:
            entry["subresource"] = manager.subresource
        entries.append(entry)
    metadata = {**obj["metadata"], "managedFields": entries}
    if not entries:
        metadata.pop("managedFields")
    return {**obj, "metadata": metadata}


def difference(old: Obj, new: Obj, shape: Shape) -> tuple[set[Path], set[Path]]:
    """(changed or added, removed) paths between two objects."""
    before: dict[Path, Any] = {}
    after: dict[Path, Any] = {}
    _differing(stripped(old), stripped(new), shape, (), before, after)
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    return changed, before.keys() - after.keys()


def _differing(old: Obj, new: Obj, shape: Shape, path: Path, before: dict[Path, Any], after: dict[Path, Any]) -> None:
    """Leaves of both, of parts that differ (most writes touch one part of an object)."""
    for name in {**old, **new}:
        one, other = old.get(name), new.get(name)
        here, below = (*path, "f:" + name), shape.child(name)
        if one and other and isinstance(one, dict) and isinstance(other, dict) and not below.atomic_map:
            if one != other:
                _differing(one, other, below, here, before, after)
        elif one != other or (name in old) != (name in new):
            if name in old:
                before.update(leaves(one, below, here))
            if name in new:
                after.update(leaves(other, below, here))


def after_update(old: Obj | None, new: Obj, manager: Manager, shape: Shape) -> Owners:
    """The owners after a create, update or patch by `manager`: it takes what it changed from all others."""
    owners = owners_of(new)
    changed, removed = difference(old or {}, new, shape)
    for other in owners:
        if other != manager:
            owners[other] = owners[other] - changed - removed
    owners[manager] = frozenset((owners.get(manager, frozenset()) | changed) - removed)
    return owners
