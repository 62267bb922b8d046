"""The scale subresource: replicas of any kind that has them, as an autoscaling/v1 Scale."""

from __future__ import annotations

from typing import Any

from diptych.testing.kube.api import Api
from diptych.testing.kube.patch import json_patch, merge_patch
from diptych.testing.kube.record import Request
from diptych.testing.kube.routes import Target
from diptych.testing.kube.selectors import selector_text
from diptych.testing.kube.status import ApiError, Obj, bad_request, method_not_allowed
from diptych.testing.kube.store import copy


def _at(obj: Obj, path: str) -> Any:
    value: Any = obj
    for name in path.strip(".").split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def scale_of(obj: Obj, paths: dict[str, str]) -> Obj:
    selector = _at(obj, paths["labelSelectorPath"]) if "labelSelectorPath" in paths else _at(obj, ".spec.selector")
    text = selector_text(selector) if isinstance(selector, dict) else selector
    metadata = obj["metadata"]
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    status: Obj = {"replicas": _at(obj, paths["statusReplicasPath"]) or 0}
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {name: metadata[name] for name in kept if name in metadata},
        "spec": {"replicas": _at(obj, paths["specReplicasPath"]) or 0},
        "status": {**status, "selector": text} if text else status,
    }


def call(api: Api, target: Target, request: Request, body: Any, how: str) -> tuple[int, Obj]:
    """get, update, patch and apply. Writes pass on spec.replicas alone."""
    paths = target.kind.scale or {}
    namespace = target.namespace or ""
    obj = api.get(target.kind, namespace, target.name)
    scale = scale_of(obj, paths)
    if request.verb == "get":
        where = paths["specReplicasPath"]
        if target.kind.custom and _at(obj, where) is None:
            text = f'Internal error occurred: the spec replicas field "{where}" does not exist'
            raise ApiError(500, "InternalError", text)
        return 200, scale
    if request.verb == "update":
        wanted = body
    elif request.verb == "patch":
        wanted = json_patch(copy(scale), body) if how == "json" else merge_patch(scale, body)
    elif request.verb == "apply":
        wanted = merge_patch(scale, body)
    else:
        raise method_not_allowed()
    replicas = wanted.get("spec", {}).get("replicas", 0)
    if not isinstance(replicas, int) or replicas < 0:
        raise bad_request("spec.replicas must be a whole number that is not negative")
    change: Any = replicas
    for name in reversed(paths["specReplicasPath"].strip(".").split(".")):
        change = {name: change}
    revision = wanted.get("metadata", {}).get("resourceVersion")
    if revision:
        change["metadata"] = {"resourceVersion": revision}
    options: dict[str, Any] = {"manager": request.manager, "dry_run": request.dry_run, "subresource": "scale"}
    return 200, scale_of(api.patch(target.kind, namespace, target.name, change, **options), paths)
