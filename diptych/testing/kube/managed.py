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
    before, after = _changed_leaves(old, new, shape)
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    return changed, before.keys() - after.keys()


def _changed_leaves(old: Obj, new: Obj, shape: Shape) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """Leaves of both, of top-level parts that differ (equal ones are skipped: most writes touch one part)."""
    before: dict[Path, Any] = {}
    after: dict[Path, Any] = {}
    old, new = stripped(old), stripped(new)
    for name in {**old, **new}:
        if old.get(name) == new.get(name):
            continue
        for part, found in ((old, before), (new, after)):
            if name in part:
                found.update(leaves(part[name], shape.child(name), ("f:" + name,)))
    return before, after


def after_update(old: Obj | None, new: Obj, manager: Manager, shape: Shape) -> Owners:
    """The owners after a create, update or patch by `manager`: it takes what it changed from all others."""
    owners = owners_of(new if old is None else old)
    changed, removed = difference(old or {}, new, shape)
    for other in owners:
        if other != manager:
            owners[other] = owners[other] - changed - removed
    owners[manager] = frozenset((owners.get(manager, frozenset()) | changed) - removed)
    return owners
