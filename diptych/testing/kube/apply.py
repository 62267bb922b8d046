"""Server-side apply: merge what a manager declares into an object, and keep the account of who owns what.

The semantics are those of Kubernetes' structured merge: the declared fields win; what the manager declared before, no
longer declares, and nobody else owns, goes away; a field that another manager owns and whose value would change is a
conflict, unless forced, and then it changes hands.
"""

from __future__ import annotations

from typing import Any

from diptych.testing.kube.fields import Fields, Path, dotted, ensured, item_key, leaves, remove
from diptych.testing.kube.managed import Manager, Owners, difference, owners_of, stripped
from diptych.testing.kube.shapes import Keys, Shape
from diptych.testing.kube.status import ApiError, Obj, apply_conflict


def merge(live: Any, config: Any, shape: Shape) -> Any:
    """`config` over `live`: maps by field, keyed lists by item, sets as unions, all else replaced."""
    if isinstance(live, dict) and isinstance(config, dict) and not shape.atomic_map:
        merged = dict(live)
        for name, value in config.items():
            merged[name] = merge(live[name], value, shape.child(name)) if name in live else value
        return merged
    if isinstance(live, list) and isinstance(config, list):
        if shape.keys is not None:
            return _merge_items(live, config, shape, shape.keys)
        if shape.is_set:
            return live + [item for item in config if item not in live]
    return config


def _merge_items(live: list[Any], config: list[Any], shape: Shape, keys: Keys) -> list[Any]:
    """In config's order; items only in `live` stay behind the one they stood behind, in front of new ones."""
    declared = {item_key(item, keys): item for item in config}
    old = {item_key(item, keys): item for item in live}
    left, merged = list(declared), []
    for key, item in old.items():
        if key not in declared:
            merged.append(item)
        while key in left:  # all declared up to and with this one
            merged.append(_merge_item(old, declared, left.pop(0), shape))
    return merged + [_merge_item(old, declared, key, shape) for key in left]


def _merge_item(old: Obj, declared: Obj, key: str, shape: Shape) -> Any:
    return merge(old[key], declared[key], shape.item()) if key in old else declared[key]


def without_nulls(value: Any) -> Any:
    """A declared null is a field not declared."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def first(config: Obj, manager: Manager, shape: Shape, status_apart: bool) -> Owners:
    """The owners of an object that an apply creates."""
    return {manager: _declared_fields(config, shape, without="status" if status_apart else "")}


def _declared_fields(config: Obj, shape: Shape, *, without: str = "") -> Fields:
    """Raises 500, as Kubernetes does, for a declaration that its schema has no place for."""
    declared = {k: v for k, v in stripped(config).items() if k != without}
    try:
        return frozenset(leaves(declared, shape)) if declared else frozenset()
    except ApiError as error:
        raise ApiError(500, "", f"failed to create typed patch object: {error.message}") from None


def apply(
    live: Obj, config: Obj, manager: Manager, shape: Shape, *, force: bool, main: bool, status: bool = False
) -> tuple[Obj, Owners]:
    """The new object and its owners.

    `main`: through an object whose status is a subresource, so that a declared status counts for nothing; `status`:
    through that subresource, so that only the status counts. Raises 409 with every conflicting field and its owner,
    when not forced.
    """
    owners = owners_of(live)
    last = owners.get(manager, frozenset())
    if status:
        config = {k: v for k, v in config.items() if k == "status"}
    elif main:
        config = {k: v for k, v in config.items() if k != "status"}
    owners[manager] = _declared_fields(config, shape)
    merged = merge(live, config, shape)
    merged = _prune(merged, shape, last, owners)
    changed, removed = difference(live, merged, shape)
    _take(owners, manager, changed, live["apiVersion"], force=force)
    for other in owners:
        if other != manager:
            owners[other] = owners[other] - removed
    return merged, owners


def _prune(merged: Obj, shape: Shape, last: Fields, owners: Owners) -> Obj:
    """Without what the manager's last declaration had and nobody owns any more."""
    if not last:
        return merged
    owned = ensured(frozenset().union(*owners.values()))
    gone = ensured(last) - owned
    pruned: Obj = remove(merged, shape, gone) if gone else merged
    return pruned


def _take(owners: Owners, manager: Manager, changed: set[Path], api_version: str, *, force: bool) -> None:
    conflicts = []
    for other, fields in owners.items():
        if other == manager:
            continue
        taken = fields & changed
        if taken and force:
            owners[other] = fields - taken
        conflicts += [(_described(other, api_version), dotted(path)) for path in sorted(taken)]
    if conflicts and not force:
        raise apply_conflict(conflicts)


def _described(manager: Manager, api_version: str) -> str:
    text = f'"{manager.name}"'
    if manager.subresource:
        text += f' with subresource "{manager.subresource}"'
    return f"{text} using {api_version}" if manager.operation == "Update" else text


def same(one: Obj, other: Obj) -> bool:
    """Whether two objects are equal but for the times of managedFields."""
    return _untimed(one) == _untimed(other)


def _untimed(obj: Obj) -> Obj:
    metadata = dict(obj["metadata"])
    metadata["managedFields"] = [
        {key: value for key, value in entry.items() if key != "time"} for entry in metadata.get("managedFields", [])
    ]
    return {**obj, "metadata": metadata}
