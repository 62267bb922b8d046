"""Small objects that the tests of the API server create."""

from __future__ import annotations

from typing import Any

Obj = dict[str, Any]
LABELS = {"app": "web"}


def template(image: str = "web:1", **spec: Any) -> Obj:
    containers = [{"name": "main", "image": image}]
    return {"metadata": {"labels": dict(LABELS)}, "spec": {"containers": containers, **spec}}


def stateful_set(name: str = "web", replicas: int = 3, image: str = "web:1", **spec: Any) -> Obj:
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "serviceName": name,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": dict(LABELS)},
            "template": template(image),
            **spec,
        },
    }


def deployment(name: str = "web", replicas: int = 3, image: str = "web:1", **spec: Any) -> Obj:
    body = {"replicas": replicas, "selector": {"matchLabels": dict(LABELS)}, "template": template(image), **spec}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": body}


def pod(name: str = "one", **metadata: Any) -> Obj:
    metadata = {"name": name, "labels": dict(LABELS), **metadata}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template()["spec"]}


def service(name: str = "web", **spec: Any) -> Obj:
    body = {"clusterIP": "None", "selector": dict(LABELS), **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": body}


def config_map(name: str = "settings", data: Obj | None = None, **metadata: Any) -> Obj:
    metadata = {"name": name, **metadata}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data or {}}


def crd(**changes: Any) -> Obj:
    """Kind Toy of toys.example.com: with a status, a scale, defaults, and lists of all types."""
    spec_schema = {
        "type": "object",
        "required": ["size"],
        "properties": {
            "size": {"type": "integer", "minimum": 0, "maximum": 9, "format": "int32"},
            "color": {"type": "string", "enum": ["red", "blue"], "default": "red"},
            "code": {"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 4},
            "step": {"x-kubernetes-int-or-string": True},
            "parts": {
                "type": "array",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string"},
                        "count": {"type": "integer", "default": 1},
                        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                    },
                },
            },
            "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "words": {"type": "array", "items": {"type": "string"}},
            "limits": {"type": "object", "additionalProperties": {"type": "integer"}},
            "whole": {
                "type": "object",
                "x-kubernetes-map-type": "atomic",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            },
        },
    }
    status = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec_schema, "status": status}}},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.size",
                "statusReplicasPath": ".status.size",
                "labelSelectorPath": ".status.selector",
            },
        },
    }
    spec = {
        "group": "example.com",
        "scope": "Namespaced",
        "names": {"kind": "Toy", "plural": "toys", "shortNames": ["ty"]},
        "versions": [version],
        **changes,
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "toys.example.com"},
        "spec": spec,
    }


def toy(name: str = "bear", **spec: Any) -> Obj:
    return {"apiVersion": "example.com/v1", "kind": "Toy", "metadata": {"name": name}, "spec": spec}
