"""Sets of fields, as managedFields know them: paths of elements in the notation of FieldsV1.

An element is `f:<field>`, `k:<JSON of a list item's keys>` or `v:<JSON of a set's value>`. A set holds the paths of
leaves (scalars, atomic lists and maps, empty ones) and of list items themselves (`.` in FieldsV1).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from diptych.testing.kube.shapes import Keys, Shape
from diptych.testing.kube.status import Obj, bad_request

Path = tuple[str, ...]
Fields = frozenset[Path]
_MEMBER = object()


def item_key(item: Any, keys: Keys) -> str:
    """The element of a list item. Raises 400 when a key is missing."""
    if not isinstance(item, dict):
        raise bad_request(f"an item of a keyed list must be an object, not {json.dumps(item)}")
    found = {}
    for name, default in keys:
        value = item.get(name, default)
        if value is not None:
            found[name] = value
        elif len(keys) == 1:
            raise bad_request(f'associative list with keys has an element that omits key field "{name}"')
    return _key_text(tuple(found.items()))


@lru_cache(maxsize=4096)
def _key_text(pairs: tuple[tuple[str, Any], ...]) -> str:
    return "k:" + json.dumps(dict(pairs), sort_keys=True, separators=(",", ":"))


def leaves(value: Any, shape: Shape, path: Path = ()) -> dict[Path, Any]:
    """path → value of all that a FieldsV1 set names. Raises 400 for a keyed list that has an item twice."""
    found: dict[Path, Any] = {}
    _leaves(value, shape, path, found)
    return found


def _leaves(value: Any, shape: Shape, path: Path, found: dict[Path, Any]) -> None:
    if value in ({}, []):
        found[path] = value
    elif isinstance(value, dict) and not shape.atomic_map:
        for name, child in value.items():
            _leaves(child, shape.child(name), (*path, "f:" + name), found)
    elif isinstance(value, list) and shape.keys is not None:
        below = shape.item()
        for item in value:
            here = (*path, item_key(item, shape.keys))
            if here in found:
                raise bad_request(f"duplicate entries for key {here[-1][2:]} in {dotted(path)}")
            found[here] = _MEMBER
            _item_leaves(item, below, here, found)
    elif isinstance(value, list) and shape.is_set:
        for item in value:
            found[(*path, "v:" + json.dumps(item))] = item
    else:
        found[path] = value


def _item_leaves(item: Obj, shape: Shape, path: Path, found: dict[Path, Any]) -> None:
    if shape.atomic_map:
        found[path] = item
        return
    for name, child in item.items():
        _leaves(child, shape.child(name), (*path, "f:" + name), found)


def ensured(fields: Fields) -> set[Path]:
    """The set with the fields above its members: an owner of a leaf keeps what the leaf is in."""
    found = set(fields)
    for path in fields:
        for depth in range(len(path) - 1, 0, -1):
            above = path[:depth]
            if above in found and above[-1].startswith("f:"):
                break  # and so are those above
            if above[-1].startswith("f:"):
                found.add(above)
    return found


def to_v1(fields: Fields) -> Obj:
    """As `fieldsV1`. Equal sets share the result: read it, never change it."""
    known = _rendered.get(fields)
    if known is not None:
        return known
    root: Obj = {}
    for path in sorted(fields):
        node = root
        for element in path:
            node = node.setdefault(element, {})
        if path[-1].startswith("k:"):
            node["."] = {}
    if len(_rendered) >= _REMEMBERED:
        _rendered.clear()
        _parsed.clear()
    _rendered[fields] = root
    _parsed[id(root)] = root, fields
    return root


# what to_v1 made, both ways: nearly all that from_v1 is asked is an object that came from it
_REMEMBERED = 20_000
_rendered: dict[Fields, Obj] = {}
_parsed: dict[int, tuple[Obj, Fields]] = {}


def from_v1(fields: Obj) -> Fields:
    known = _parsed.get(id(fields))
    if known is not None and known[0] is fields:
        return known[1]
    return frozenset(_walk_v1(fields, ()))


def _walk_v1(node: Obj, path: Path) -> Iterator[Path]:
    below = [name for name in node if name != "."]
    if path and (not below or "." in node):
        yield path
    for name in below:
        yield from _walk_v1(node[name], (*path, name))


def dotted(path: Path) -> str:
    """A path as conflicts show it: `.spec.containers[name="a"].image`."""
    text = ""
    for element in path:
        kind, rest = element[:2], element[2:]
        if kind == "f:":
            text += f".{rest}"
        elif kind == "k:":
            pairs = ",".join(f"{name}={json.dumps(value)}" for name, value in json.loads(rest).items())
            text += f"[{pairs}]"
        else:
            text += f"[={rest}]"
    return text


def remove(value: Any, shape: Shape, gone: set[Path], path: Path = ()) -> Any:
    """`value` without the paths of `gone` and all below them; what is shared with `value` is not copied."""
    if isinstance(value, dict) and not shape.atomic_map:
        kept = {}
        for name, child in value.items():
            here = (*path, "f:" + name)
            if here not in gone:
                kept[name] = remove(child, shape.child(name), gone, here)
        return kept
    if isinstance(value, list) and shape.keys is not None:
        below = shape.item()
        pairs = [((*path, item_key(item, shape.keys)), item) for item in value]
        return [remove(item, below, gone, here) for here, item in pairs if here not in gone]
    if isinstance(value, list) and shape.is_set:
        return [item for item in value if (*path, "v:" + json.dumps(item)) not in gone]
    return value
