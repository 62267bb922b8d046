"""Strategic merge patch of a pod template, as Kubernetes applies it. Pure.

A patch is a partial object. Objects merge field by field, null deletes a field, and a list replaces a list, except the
lists of `_KEYS`: their items merge by a key. Directives: `$patch: replace` (an object; in an item, which is then none
itself, the list) and `$patch: delete` (an object becomes empty, an item goes), `$retainKeys` (fields that stay; the
others of the object go). See "Strategic merge patch" in Kubernetes' API conventions.

In one thing more stays than Kubernetes (1.36) leaves. Its key of ports is their number, that of topology spread
constraints their topologyKey: of a patch's 53/UDP and 53/TCP it keeps one if the template has ports, and of a
template's it changes the first, whichever was meant. Here, where a key occurs twice in the template or in the patch,
`_FURTHER` tells the items apart, as server-side apply does. Where it occurs once, all is as in Kubernetes: a patch that
says 53/UDP makes that of a template's 53/TCP.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from diptych.errors import ConfigError

# Lists of a pod template that merge: where they are, and the field that tells their items apart.
_CONTAINER = {"env": "name", "ports": "containerPort", "volumeMounts": "mountPath", "volumeDevices": "devicePath"}
_KEYS = {
    f"spec.{field}": key
    for field, key in {
        "containers": "name",
        "initContainers": "name",
        "ephemeralContainers": "name",
        "volumes": "name",
        "imagePullSecrets": "name",
        "hostAliases": "ip",
        "topologySpreadConstraints": "topologyKey",
        "resourceClaims": "name",
        "schedulingGates": "name",
    }.items()
} | {
    f"spec.{containers}.{field}": key
    for containers in ("containers", "initContainers", "ephemeralContainers")
    for field, key in _CONTAINER.items()
}
_FURTHER = {"containerPort": ("protocol", "TCP"), "topologyKey": ("whenUnsatisfiable", None)}  # field, default
_DIRECTIVE = "$patch"
_RETAIN = "$retainKeys"


def merge_pod_template(template: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """The patched template; neither argument changes. Raises ConfigError that names the field of the patch."""
    return _merge_object(template, patch, "")


def _merge_object(original: Mapping[str, Any], patch: Mapping[str, Any], path: str) -> dict[str, Any]:
    directive = patch.get(_DIRECTIVE, "merge")
    if directive == "delete":
        return {}
    if directive == "replace":
        return _without_nulls({name: value for name, value in patch.items() if name != _DIRECTIVE})
    if directive != "merge":
        raise ConfigError(f"{_join(path, _DIRECTIVE)}: must be merge, replace or delete, not {directive}")
    merged = copy.deepcopy(dict(original))
    if _RETAIN in patch:
        retained = _retained(patch, path)
        merged = {name: value for name, value in merged.items() if name in retained}
    for name, value in patch.items():
        where = _join(path, name)
        if name in (_DIRECTIVE, _RETAIN):
            continue
        if name.startswith("$"):
            raise ConfigError(f"{where}: this directive is not supported; use $patch or $retainKeys")
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merge_value(merged.get(name), value, where)
    return merged


def _retained(patch: Mapping[str, Any], path: str) -> list[str]:
    names = patch[_RETAIN]
    missing = [name for name in patch if not name.startswith("$") and name not in names]
    if missing:
        raise ConfigError(f"{_join(path, _RETAIN)}: must list every field of its object; {missing[0]} is not in it")
    return list(names)


def _merge_value(original: Any, value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return _merge_object(original if isinstance(original, Mapping) else {}, value, path)
    if isinstance(value, list):
        key = _KEYS.get(_pattern(path))
        if key is not None:
            return _merge_list(original if isinstance(original, list) else [], value, key, path)
        return [_without_nulls(each) for each in value]
    return value


def _merge_list(original: Sequence[Any], patch: Sequence[Any], key: str, path: str) -> list[Any]:
    for i, item in enumerate((*original, *patch)):
        if not isinstance(item, Mapping) or not (
            isinstance(item.get(key), (str, int)) or item.get(_DIRECTIVE) == "replace"
        ):
            where = f"{path}[{i - len(original)}]" if i >= len(original) else f"{path}[{i}] of the template"
            raise ConfigError(f"{where}: needs {key}, by which the items of {path.rsplit('.', 1)[-1]} are merged")
    if any(item.get(_DIRECTIVE) == "replace" for item in patch):
        return [_without_nulls(item) for item in patch if _DIRECTIVE not in item]
    names = _Names(original, patch, key)
    there: dict[Any, Any] = {}
    for item in original:
        name = names.of(item)
        while name in there:  # a second one of the same name: no patch can mean it
            name = (name, "again")
        there[name] = item
    deletions = [item for item in patch if item.get(_DIRECTIVE) == "delete"]
    kept = {name: item for name, item in there.items() if not any(names.meant(by, item) for by in deletions)}
    patched: dict[Any, Any] = {}
    for i, item in enumerate(patch):
        if item.get(_DIRECTIVE) != "delete":
            name = names.of(item)
            patched[name] = _merge_object(patched.get(name, kept.get(name, {})), item, f"{path}[{i}]")
    return _in_order(kept, patched, list(there))


class _Names:
    """What tells the items of a list apart: their key or, where that occurs twice, the key and a further field."""

    def __init__(self, original: Sequence[Any], patch: Sequence[Any], key: str) -> None:
        self._key = key
        self._field, self._default = _FURTHER.get(key, ("", None))
        self._first = {item[key]: item.get(self._field) for item in reversed(original)}
        counts = (Counter(item[key] for item in items) for items in (original, patch))
        self._twice = {value for each in counts for value, count in each.items() if count > 1}

    def of(self, item: Mapping[str, Any]) -> Any:
        """An item that does not say the further field has its default, or means the template's first."""
        value = item[self._key]
        if not self._field or value not in self._twice:
            return value
        return value, item.get(self._field) or self._default or self._first.get(value)

    def meant(self, deletion: Mapping[str, Any], item: Mapping[str, Any]) -> bool:
        """Whether the item goes: one that does not say the further field takes all of its key."""
        if self._field in deletion:
            return bool(self.of(deletion) == self.of(item))
        return bool(deletion[self._key] == item[self._key])


def _in_order(kept: Mapping[Any, Any], patched: Mapping[Any, Any], order: list[Any]) -> list[Any]:
    """Items of the patch in the patch's order, the others in their old order; between the two, the old order decides
    where it knows both, and a new item comes before those that were there."""
    named, others = list(patched), [name for name in kept if name not in patched]
    merged = []
    while named and others:
        later = named[0] in order and order.index(named[0]) > order.index(others[0])
        merged.append(others.pop(0) if later else named.pop(0))
    return [patched[name] if name in patched else copy.deepcopy(kept[name]) for name in (*merged, *others, *named)]


def _without_nulls(value: Any) -> Any:
    """A copy of what a patch adds: nulls in it had nothing to delete, directives nothing to steer."""
    if isinstance(value, Mapping):
        return {
            name: _without_nulls(each)
            for name, each in value.items()
            if each is not None and name not in (_DIRECTIVE, _RETAIN)
        }
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value


def _pattern(path: str) -> str:
    """spec.containers[1].env -> spec.containers.env"""
    return ".".join(part.split("[")[0] for part in path.split("."))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
