"""CustomResourceDefinitions: which kinds one serves, its status, and what makes one wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diptych.testing.kube.kinds import Kind
from diptych.testing.kube.rules import Cause
from diptych.testing.kube.status import Obj
from diptych.testing.kube.validations import uncompiled


def kinds_of(crd: Obj) -> list[Kind]:
    """The kinds of the served versions. A version without a schema keeps unknown fields."""
    spec, names = crd["spec"], crd["spec"]["names"]
    found = []
    for version in spec["versions"]:
        if not version.get("served", True):
            continue
        subresources = version.get("subresources", {})
        open_schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        scale = subresources.get("scale")
        found.append(
            Kind(
                group=spec["group"],
                version=version["name"],
                name=names["kind"],
                plural=names["plural"],
                namespaced=spec.get("scope") != "Cluster",
                short=tuple(names.get("shortNames", ())),
                status="status" in subresources,
                generation=True,
                scale=dict(scale) if scale else None,
                schema=version.get("schema", {}).get("openAPIV3Schema", open_schema),
            )
        )
    return found


def established(crd: Obj, now: str) -> Obj:
    """The status of a CRD whose kinds are served."""
    conditions = [
        {"type": "NamesAccepted", "status": "True", "reason": "NoConflicts", "message": "no conflicts found"},
        {"type": "Established", "status": "True", "reason": "InitialNamesAccepted", "message": "ready"},
    ]
    return {
        "conditions": [{**condition, "lastTransitionTime": now} for condition in conditions],
        "acceptedNames": crd["spec"]["names"],
        "storedVersions": [version["name"] for version in crd["spec"]["versions"] if version.get("storage")],
    }


def crd_causes(crd: Obj) -> Iterator[Cause]:
    spec = crd["spec"]
    wanted = f"{spec['names']['plural']}.{spec['group']}"
    if crd["metadata"]["name"] != wanted:
        yield "metadata.name", f'Invalid value: "{crd["metadata"]["name"]}": must be spec.names.plural+"."+spec.group'
    if sum(bool(version.get("storage")) for version in spec["versions"]) != 1:
        yield "spec.versions", "Invalid value: must have exactly one version marked as storage version"
    for i, version in enumerate(spec["versions"]):
        path = f"spec.versions[{i}].schema.openAPIV3Schema"
        schema = version.get("schema", {}).get("openAPIV3Schema")
        if schema is None:
            yield path, "Required value: schemas are required"
        else:
            yield from _structural(schema, path)
            yield from ((path, f"Invalid value: {message}") for message in uncompiled(schema))


_INFERRED = ("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields")


def _structural(schema: Any, path: str) -> Iterator[Cause]:
    """The rules of structural schemas that are easily broken by a generator."""
    if not schema.get("type") and not any(schema.get(name) for name in _INFERRED):
        yield f"{path}.type", "Required value: must not be empty for specified object fields"
    if schema.get("type") == "array" and "items" not in schema:
        yield f"{path}.items", "Required value: must be specified"
    if "properties" in schema and schema.get("additionalProperties"):
        yield f"{path}.additionalProperties", "Forbidden: additionalProperties and properties are mutual exclusive"
    if "$ref" in schema:
        yield f"{path}.$ref", "Forbidden: $ref is not supported"
    if schema.get("x-kubernetes-list-type") == "map":
        yield from _map_keys(schema, path)
    for name, below in schema.get("properties", {}).items():
        yield from _structural(below, f"{path}.properties[{name}]")
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from _structural(schema[name], f"{path}.{name}")


def _map_keys(schema: Obj, path: str) -> Iterator[Cause]:
    keys, items = schema.get("x-kubernetes-list-map-keys", []), schema.get("items", {})
    if not keys:
        yield f"{path}.x-kubernetes-list-map-keys", "Required value: must not be empty if x-kubernetes-list-type is map"
    for key in keys:
        below = items.get("properties", {}).get(key)
        if below is None:
            yield (
                f"{path}.x-kubernetes-list-map-keys",
                f'Invalid value: "{key}": entries must all be names of properties',
            )
        elif key not in items.get("required", []) and "default" not in below:
            yield (
                f"{path}.items.properties[{key}].default",
                "Required value: a key of a list must have a default or be a required property",
            )
