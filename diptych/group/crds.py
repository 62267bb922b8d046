"""Custom resource definitions, generated from the structs of `kinds`.

Schemas are structural: every field has one type, defaults are valid, and fields that are not described are pruned,
except below `outline` objects (pod templates) and plain objects (patches). Patterns lose their Python-only ending.
"""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import yaml

from diptych.group.kinds import (
    API_GROUP,
    ClusterEngineRuntimeProfile,
    ObjectMeta,
    RoleBasedGroup,
    RoleBasedGroupScalingAdapter,
    RoleBasedGroupSet,
)
from diptych.group.reader import Object, fields_of, metas

Schema = dict[str, Any]
_PYTHON_END = r"$(?!\n)"  # Go's `$` is the end of the text already
_ANYTHING: Schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_AGE = {"name": "AGE", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
_LIMITS = {"ge": "minimum", "le": "maximum", "pattern": "pattern", "description": "description"}
_NAMED = {  # their names become parts of other names, beginning with those of Services
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 63, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}},
}


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """How a kind is served. `scale`: the paths of its scale subresource."""

    kind: type[Object]
    plural: str
    short_names: tuple[str, ...] = ()
    namespaced: bool = True
    columns: tuple[dict[str, Any], ...] = (_AGE,)
    scale: dict[str, str] | None = None
    metadata: Schema = msgspec.field(default_factory=lambda: {"type": "object"})


RESOURCES = (
    Resource(kind=ClusterEngineRuntimeProfile, plural="clusterengineruntimeprofiles", namespaced=False),
    Resource(
        kind=RoleBasedGroup,
        plural="rolebasedgroups",
        short_names=("rbg",),
        columns=(
            {"name": "READY", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Ready")].status'},
            _AGE,
        ),
        metadata=_NAMED,
    ),
    Resource(
        kind=RoleBasedGroupScalingAdapter,
        plural="rolebasedgroupscalingadapters",
        short_names=("rbgsa",),
        columns=(
            {"name": "PHASE", "type": "string", "jsonPath": ".status.phase"},
            {"name": "REPLICAS", "type": "integer", "jsonPath": ".status.replicas"},
            _AGE,
        ),
        scale={
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        },
    ),
    Resource(
        kind=RoleBasedGroupSet,
        plural="rolebasedgroupsets",
        short_names=("rbgs",),
        columns=(
            {"name": "DESIRED", "type": "integer", "jsonPath": ".spec.replicas"},
            {"name": "READY", "type": "integer", "jsonPath": ".status.readyReplicas"},
            {"name": "UPDATED", "type": "integer", "jsonPath": ".status.updatedReplicas"},
            _AGE,
        ),
        scale={"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas"},
        metadata=_NAMED,
    ),
)


def crds() -> list[dict[str, Any]]:
    """The CustomResourceDefinitions, sorted by name."""
    return [definition(each) for each in RESOURCES]


def crds_yaml() -> str:
    """One YAML stream, the same on every call."""
    return yaml.dump_all(crds(), Dumper=_Dumper, explicit_start=True, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes shared parts out instead of referring to them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def definition(resource: Resource) -> dict[str, Any]:
    subresources: dict[str, Any] = {"status": {}}
    if resource.scale:
        subresources["scale"] = resource.scale
    name = resource.kind.__name__
    names: dict[str, Any] = {
        "kind": name,
        "listKind": f"{name}List",
        "plural": resource.plural,
        "singular": name.lower(),
    }
    if resource.short_names:
        names["shortNames"] = list(resource.short_names)
    version = {
        "name": "v1alpha1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": kind_schema(resource)},
        "subresources": subresources,
        "additionalPrinterColumns": list(resource.columns),
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{API_GROUP}"},
        "spec": {
            "group": API_GROUP,
            "names": names,
            "scope": "Namespaced" if resource.namespaced else "Cluster",
            "versions": [version],
        },
    }


def kind_schema(resource: Resource) -> Schema:
    """The schema of a whole object. Its metadata is Kubernetes' own: only the name can be restricted."""
    result = schema(resource.kind)
    result["properties"]["metadata"] = resource.metadata
    result["required"] = ["spec"]
    return result


def schema(kind: Any) -> Schema:
    """The structural schema of a type: of a struct, or of a field as it is annotated."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return _plain_schema(_not_none(plain)) | _said(kind)


def _not_none(kind: Any) -> Any:
    """A union without None; IntOrPercent | None stays a union."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    rest = tuple(each for each in get_args(kind) if each is not type(None))
    return rest[0] if len(rest) == 1 else Union[rest]  # noqa: UP007 - built at run time


def _plain_schema(kind: Any) -> Schema:
    origin = get_origin(kind)
    if origin is Annotated:
        return schema(kind)
    if isinstance(kind, type) and issubclass(kind, Object):
        return _object_schema(kind)
    if origin in (Union, types.UnionType):
        return _int_or_string(get_args(kind))
    if origin is Literal:
        return {"type": "string", "enum": list(get_args(kind))}
    if origin is tuple:
        return {"type": "array", "items": schema(get_args(kind)[0])}
    if origin is dict:
        value = get_args(kind)[1]
        return dict(_ANYTHING) if value is Any else {"type": "object", "additionalProperties": schema(value)}
    return {"type": {str: "string", int: "integer", bool: "boolean"}[kind]}


def _int_or_string(kinds: tuple[Any, ...]) -> Schema:
    """Either of both; bounds of the number and pattern of the string stand side by side."""
    limits: Schema = {}
    for each in kinds:
        limits |= {name: value for name, value in schema(each).items() if name != "type"}
    return {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}], **limits}


def _said(kind: Any) -> Schema:
    """What the annotations of a type add to its schema."""
    result: Schema = {}
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    length = {tuple: "Items", dict: "Properties"}.get(get_origin(_not_none(plain)), "Length")
    for meta in metas(kind):
        for name, keyword in {**_LIMITS, "min_length": f"min{length}", "max_length": f"max{length}"}.items():
            value = getattr(meta, name)
            if value is not None:
                result[keyword] = value.replace(_PYTHON_END, "$") if name == "pattern" else value
        result |= meta.extra_json_schema or {}
    return result


def _object_schema(kind: type[Object]) -> Schema:
    properties: Schema = {}
    required = []
    for name, field in fields_of(kind).items():
        if field.type is ObjectMeta or (kind.outline is not None and name not in kind.outline):
            continue
        properties[name] = schema(field.type)
        if field.required:
            required.append(name)
        elif kind.outline is None and (default := _default(field)) is not None:
            properties[name]["default"] = default
    result: Schema = {"type": "object", "properties": properties}
    if required:
        result["required"] = required
    if kind.outline is not None:
        result["x-kubernetes-preserve-unknown-fields"] = True
    if kind.rules:
        result["x-kubernetes-validations"] = [{"rule": each.cel, "message": each.message} for each in kind.rules]
    if kind.__doc__:
        result["description"] = kind.__doc__.strip().split("\n")[0]
    return result


def _default(field: Any) -> Any:
    """The default that the API server writes into objects; none for what is empty."""
    value = field.default
    if isinstance(value, Object):
        return msgspec.to_builtins(value)
    return None if value in (msgspec.NODEFAULT, None, (), "") else value
