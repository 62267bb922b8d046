"""A CRD's structural schema at work: pruning of unknown fields, defaults, validation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from diptych.testing.kube.fields import item_key
from diptych.testing.kube.rules import Cause
from diptych.testing.kube.shapes import BySchema
from diptych.testing.kube.status import ApiError, Obj

_ROOT_FIELDS = ("apiVersion", "kind", "metadata")


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def prune(value: Any, schema: Obj, path: str = "", *, root: bool = True) -> list[str]:
    """Removes, in place, fields that the schema does not know; returns their paths."""
    gone: list[str] = []
    if isinstance(value, list):
        for i, item in enumerate(value):
            gone += prune(item, schema.get("items", {}), f"{path}[{i}]", root=False)
    elif isinstance(value, dict):
        keep = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        properties = schema.get("properties", {})
        extra = schema.get("additionalProperties")
        embedded = root or schema.get("x-kubernetes-embedded-resource")
        for name in list(value):
            if embedded and name in _ROOT_FIELDS:
                continue
            below = properties.get(name, extra if isinstance(extra, dict) else None)
            if below is not None:
                gone += prune(value[name], below, _below(path, name), root=False)
            elif not keep and not extra:
                gone.append(_below(path, name))
                del value[name]
    return gone


def set_defaults(value: Any, schema: Obj) -> None:
    """Fills defaults in, in place. A null where null is not allowed counts as absent if there is a default."""
    if isinstance(value, list):
        for item in value:
            set_defaults(item, schema.get("items", {}))
    elif isinstance(value, dict):
        for name, below in schema.get("properties", {}).items():
            absent = name not in value or (value[name] is None and not below.get("nullable"))
            if absent and "default" in below:
                value[name] = json.loads(json.dumps(below["default"]))
            if name in value:
                set_defaults(value[name], below)
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                set_defaults(value[name], extra)


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}
    return names[type(value)]


def causes(value: Any, schema: Obj, path: str = "") -> Iterator[Cause]:
    """What is wrong with `value`. Its CEL rules are asked afterwards (`validations`)."""
    if value is None and schema.get("nullable"):
        return
    got, wanted = _type_of(value), schema.get("type")
    if schema.get("x-kubernetes-int-or-string"):
        if got not in ("integer", "string"):
            yield path, f'Invalid value: "{got}": {path} in body must be of type integer or string: "{got}"'
    elif wanted and got != wanted and not (wanted == "number" and got == "integer"):
        if wanted == "integer" and got == "number" and float(value).is_integer():
            return
        yield path, f'Invalid value: "{got}": {path} in body must be of type {wanted}: "{got}"'
        return
    if "enum" in schema and value not in schema["enum"]:
        supported = ", ".join(json.dumps(one) for one in schema["enum"])
        yield path, f"Unsupported value: {json.dumps(value)}: supported values: {supported}"
    yield from _combined(value, schema, path)
    if isinstance(value, str):
        yield from _string(value, schema, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _number(value, schema, path)
    elif isinstance(value, list):
        yield from _list(value, schema, path)
    elif isinstance(value, dict):
        yield from _object(value, schema, path)


def _combined(value: Any, schema: Obj, path: str) -> Iterator[Cause]:
    for below in schema.get("allOf", []):
        yield from causes(value, below, path)
    for name, wanted in (("anyOf", None), ("oneOf", 1)):
        if name in schema:
            valid = sum(not any(causes(value, below, path)) for below in schema[name])
            if valid == 0 or (wanted is not None and valid != wanted):
                number = "one and only one" if wanted else "at least one"
                yield (
                    path,
                    f"Invalid value: {json.dumps(value)}: must validate {number} schema ({name})",
                )
    if "not" in schema and not any(causes(value, schema["not"], path)):
        yield path, f"Invalid value: {json.dumps(value)}: must not validate the schema (not)"


def _string(value: str, schema: Obj, path: str) -> Iterator[Cause]:
    """The first of its mistakes, as the real one."""
    if len(value) > schema.get("maxLength", len(value)):
        yield path, f"Too long: may not be more than {schema['maxLength']} bytes"
    elif len(value) < schema.get("minLength", 0):
        yield path, f'Invalid value: "{value}": {path} in body should be at least {schema["minLength"]} chars long'
    elif "pattern" in schema and not re.search(schema["pattern"], value):
        yield path, f"Invalid value: \"{value}\": {path} in body should match '{schema['pattern']}'"


def _number(value: float, schema: Obj, path: str) -> Iterator[Cause]:
    low, high = schema.get("minimum", value), schema.get("maximum", value)
    if value < low or (schema.get("exclusiveMinimum") and value == low):
        yield path, f"Invalid value: {value}: {path} in body should be greater than or equal to {low}"
    if value > high or (schema.get("exclusiveMaximum") and value == high):
        yield path, f"Invalid value: {value}: {path} in body should be less than or equal to {high}"
    if "multipleOf" in schema and value % schema["multipleOf"]:
        yield path, f"Invalid value: {value}: {path} in body should be a multiple of {schema['multipleOf']}"
    if schema.get("format") == "int32" and not -(2**31) <= value < 2**31:
        yield path, f"Invalid value: {value}: {path} in body must be of type int32"


def _list(value: list[Any], schema: Obj, path: str) -> Iterator[Cause]:
    if len(value) < schema.get("minItems", 0):
        yield path, f"Invalid value: {len(value)}: {path} in body should have at least {schema['minItems']} items"
    if len(value) > schema.get("maxItems", len(value)):
        yield path, f"Too many: {len(value)}: must have at most {schema['maxItems']} items"
    for i, item in enumerate(value):
        yield from causes(item, schema.get("items", {}), f"{path}[{i}]")
    yield from _duplicates(value, schema, path)


def _duplicates(value: list[Any], schema: Obj, path: str) -> Iterator[Cause]:
    keys = BySchema(schema).keys
    seen: set[str] = set()
    if keys is None and schema.get("x-kubernetes-list-type") != "set":
        return
    for i, item in enumerate(value):
        try:
            key = json.dumps(item, sort_keys=True) if keys is None else item_key(item, keys)
        except ApiError as error:
            yield f"{path}[{i}]", f"Required value: {error.message}"
            continue
        if key in seen:
            yield f"{path}[{i}]", f"Duplicate value: {key.removeprefix('k:')}"
        seen.add(key)


def _object(value: Obj, schema: Obj, path: str) -> Iterator[Cause]:
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
    for name in schema.get("required", []):
        if name not in value:
            yield _below(path, name), "Required value"
    if len(value) < schema.get("minProperties", 0):
        yield path, f"Invalid value: {len(value)}: should have at least {schema['minProperties']} properties"
    if len(value) > schema.get("maxProperties", len(value)):
        yield path, f"Too many: {len(value)}: must have at most {schema['maxProperties']} properties"
    for name, item in value.items():
        below = properties.get(name, extra if isinstance(extra, dict) else None)
        if below is not None:
            yield from causes(item, below, _below(path, name))
