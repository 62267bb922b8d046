"""Revisions: what of a group's spec makes a new one, and how an old one is brought back. Pure, on plain objects.

Replicas are no part of a revision, nor are fields that say no more than the API's defaults: an object as written and
the same object as the API server stored it are one revision, and a later version of the API does not make new ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

import msgspec

from diptych.group.kinds import RoleTemplate
from diptych.group.reader import Object, fields_of
from diptych.group.role import Role

HASH_LENGTH = 10
Raw = dict[str, Any]


class Revision(msgspec.Struct, frozen=True):
    """`data`: {"roles": [...], "roleTemplates": [...]}, what `restore` needs; `hash` fits into labels and names."""

    hash: str
    data: Raw


def spec_revision(spec: Mapping[str, Any]) -> Revision:
    """The revision of a group's spec."""
    data: Raw = {"roles": [_role_data(role) for role in spec["roles"]]}
    if spec.get("roleTemplates"):
        data["roleTemplates"] = [_said(template, RoleTemplate) for template in spec["roleTemplates"]]
    return Revision(_digest(data), data)


def revision_data(data: Mapping[str, Any]) -> Raw:
    """What a stored revision keeps: one of ours, or of upstream's v0.5, a strategic merge patch that replaces lists."""
    kept = data.get("spec", data)
    return {
        field: [
            {name: value for name, value in each.items() if name != "$patch"} for each in kept[field] if "name" in each
        ]
        for field in ("roles", "roleTemplates")
        if kept.get(field)
    }


def restore(spec: Mapping[str, Any], data: Mapping[str, Any]) -> Raw:
    """The spec with the roles and templates of a revision; roles keep their replicas, and one that is not there now
    gets the default."""
    replicas = {role["name"]: role["replicas"] for role in spec["roles"] if role.get("replicas") is not None}
    roles = [
        role | ({"replicas": replicas[role["name"]]} if role["name"] in replicas else {}) for role in data["roles"]
    ]
    rest = {name: value for name, value in spec.items() if name not in ("roles", "roleTemplates")}
    templates = {"roleTemplates": data["roleTemplates"]} if data.get("roleTemplates") else {}
    return {**rest, "roles": roles, **templates}


def _role_data(role: Mapping[str, Any]) -> Raw:
    said = _said(role, Role)
    said.pop("replicas", None)
    return said


def _digest(data: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest()[:HASH_LENGTH]


def _said(value: Mapping[str, Any], kind: type[Object]) -> Raw:
    """What an object says beyond the defaults of its struct. Objects whose fields pass through unread stay whole."""
    fields = fields_of(kind)
    result = {}
    for name, each in _without_nulls(value).items():
        field = fields.get(name)
        if field is not None:
            each = _said_value(each, field.type)
            if each == _default(field):
                continue
        result[name] = each
    return result


def _said_value(value: Any, kind: Any) -> Any:
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    struct = next((each for each in (plain, *get_args(plain)) if _is_described(each)), None)
    if struct is not None and isinstance(value, Mapping):
        return _said(value, struct)
    if struct is not None and isinstance(value, list):
        return [_said(each, struct) for each in value]
    return value


def _is_described(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Object) and kind.outline is None


def _default(field: Any) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    if isinstance(field.default, Object):
        return {}  # a struct of defaults says nothing, once `_said` has gone through it
    return [] if field.default == () else field.default


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
