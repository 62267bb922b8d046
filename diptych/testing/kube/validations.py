"""Rules in CEL (x-kubernetes-validations) of a definition's schema, asked of objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diptych.testing.kube.cel import CelError, compiled
from diptych.testing.kube.rules import Cause
from diptych.testing.kube.status import Obj

_BLOCKING = ("Required value", "Unsupported value", "Too long", "Too many", "must be of type")
NOT_ASKED: Cause = (
    "<nil>",
    "Invalid value: null: some validation rules were not checked because the object was invalid; correct the existing "
    "errors to complete validation",
)


def rule_causes(value: Any, schema: Obj, found: list[Cause]) -> Iterator[Cause]:
    """What the rules find. As in a real API server they are not asked of an object whose shape is wrong, by what was
    `found` before."""
    if any(sign in message for _, message in found for sign in _BLOCKING):
        if next(_schemas(schema), None) is not None:
            yield NOT_ASKED
        return
    yield from _asked(value, schema, "")


def uncompiled(schema: Obj) -> Iterator[str]:
    """What is wrong with the rules themselves."""
    for below in _schemas(schema):
        for rule in below["x-kubernetes-validations"]:
            try:
                compiled(rule["rule"])
            except CelError as error:
                yield str(error)


def _schemas(schema: Any) -> Iterator[Obj]:
    """The parts of a schema that have rules."""
    if not isinstance(schema, dict):
        return
    if schema.get("x-kubernetes-validations"):
        yield schema
    for below in (*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")):
        yield from _schemas(below)


def _asked(value: Any, schema: Obj, path: str) -> Iterator[Cause]:
    for rule in schema.get("x-kubernetes-validations", []):
        message = rule.get("message") or f"failed rule: {rule['rule']}"
        try:
            if not compiled(rule["rule"])({"self": value}):
                yield path, f"Invalid value: {message}"
        except CelError as error:
            yield path, f'Invalid value: "{schema.get("type", "")}": {error} evaluating rule: {message}'
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _asked(item, schema.get("items", {}), f"{path}[{i}]")
    elif isinstance(value, dict):
        extra = schema.get("additionalProperties")
        for name, item in value.items():
            below = schema.get("properties", {}).get(name, extra if isinstance(extra, dict) else None)
            if below is not None:
                yield from _asked(item, below, f"{path}.{name}" if path else name)
