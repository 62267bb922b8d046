"""Patches other than server-side apply: JSON patch (RFC 6902), merge patch (RFC 7386), strategic merge."""

from __future__ import annotations

from typing import Any

from diptych.testing.kube.fields import item_key
from diptych.testing.kube.shapes import Keys, Shape
from diptych.testing.kube.status import ApiError, Obj, bad_request


def merge_patch(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patch(result.get(name), value)
    return result


def strategic_patch(target: Any, patch: Any, shape: Shape) -> Any:
    """Merge patch in which keyed lists merge by item, with the directives `$patch` (delete, replace) and
    `$retainKeys`."""
    if isinstance(patch, dict):
        if patch.get("$patch") == "replace":
            return {name: value for name, value in patch.items() if name != "$patch"}
        result = dict(target) if isinstance(target, dict) else {}
        if "$retainKeys" in patch:
            result = {name: value for name, value in result.items() if name in patch["$retainKeys"]}
        for name, value in patch.items():
            if value is None:
                result.pop(name, None)
            elif not name.startswith("$"):
                result[name] = strategic_patch(result.get(name), value, shape.child(name))
        return result
    if isinstance(patch, list) and shape.keys is not None:
        return _strategic_items(target or [], patch, shape, shape.keys)
    if isinstance(patch, list) and shape.is_set:
        return [*(target or []), *(item for item in patch if item not in (target or []))]
    return patch


def _strategic_items(target: list[Any], patch: list[Any], shape: Shape, keys: Keys) -> list[Any]:
    """By the first key field alone, unlike server-side apply: of several items with one value the first is changed,
    also by a second one of the patch. Where there is no list, the patch's is taken. (As Kubernetes 1.36 answers.)"""
    changes = [item for item in patch if "$patch" not in item]
    if any(item.get("$patch") == "replace" for item in patch):
        return changes
    if not target:
        return [strategic_patch(None, change, shape.item()) for change in changes]
    gone = {item_key(item, keys[:1]) for item in patch if item.get("$patch") == "delete"}
    items = [item for item in target if item_key(item, keys[:1]) not in gone]
    for change in changes:
        names = [item_key(item, keys[:1]) for item in items]
        name = item_key(change, keys[:1])
        at = names.index(name) if name in names else len(names)
        items[at : at + 1] = [strategic_patch(items[at] if at < len(items) else None, change, shape.item())]
    wanted = [item_key(change, keys[:1]) for change in changes]
    named = [item for name in dict.fromkeys(wanted) for item in items if item_key(item, keys[:1]) == name]
    others = [item for item in items if item_key(item, keys[:1]) not in wanted]
    return _sorted(others, named, [item_key(item, keys[:1]) for item in target], keys[:1])


def _sorted(others: list[Any], named: list[Any], order: list[str], keys: Keys) -> list[Any]:
    """What the patch names in its order, the others in theirs; of two heads the one that was first in `order` goes
    first if both were in it, else the patch's."""
    result = []
    while others and named:
        ours, theirs = item_key(others[0], keys), item_key(named[0], keys)
        first = theirs in order and order.index(ours) < order.index(theirs)
        result.append(others.pop(0) if first else named.pop(0))
    return [*result, *others, *named]


def json_patch(target: Obj, operations: list[Obj]) -> Any:
    """Applies in order; `target` must be a copy that may be changed. Raises 422 where an operation does not fit."""
    document: Any = target
    for operation in operations:
        try:
            document = _operate(document, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            text = f"the server rejected our request due to an error in our request ({error})"
            raise ApiError(422, "Invalid", text) from None
    return document


def _parts(pointer: str) -> list[str]:
    if pointer and not pointer.startswith("/"):
        raise bad_request(f"{pointer!r} is no JSON pointer")
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]


def _at(document: Any, parts: list[str]) -> Any:
    for part in parts:
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def _operate(document: Any, operation: Obj) -> Any:
    name, parts = operation["op"], _parts(operation["path"])
    if name == "test":
        if _at(document, parts) != operation.get("value"):
            raise ValueError(f"testing value {operation['path']} failed")
        return document
    if name == "remove":
        _remove(document, parts)
        return document
    if name in ("add", "replace"):
        if name == "replace":
            _at(document, parts)
        return _set(document, parts, operation["value"], insert=name == "add")
    if name in ("move", "copy"):
        source = _parts(operation["from"])
        value = _at(document, source)
        if name == "move":
            _remove(document, source)
        return _set(document, parts, value, insert=True)
    raise ValueError(f"unknown operation {name!r}")


def _remove(document: Any, parts: list[str]) -> None:
    parent = _at(document, parts[:-1])
    del parent[int(parts[-1]) if isinstance(parent, list) else parts[-1]]


def _set(document: Any, parts: list[str], value: Any, *, insert: bool) -> Any:
    if not parts:
        return value
    parent, last = _at(document, parts[:-1]), parts[-1]
    if not isinstance(parent, list):
        parent[last] = value
    elif not insert:
        parent[int(last)] = value
    elif last == "-":
        parent.append(value)
    else:
        if int(last) > len(parent):
            raise IndexError(f"index {last} is out of range")
        parent.insert(int(last), value)
    return document
