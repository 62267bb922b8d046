"""What the workload controllers share: pods from templates, who controls what, revisions, readiness."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from diptych.testing.kube.api import CONTROLLER, Api
from diptych.testing.kube.dns import is_ready
from diptych.testing.kube.status import Obj
from diptych.testing.kube.store import Change, ObjectKey, ResourceKey, Store

PODS = ("", "pods")
_LETTERS = "bcdfghjklmnpqrstvwxz2456789"


def template_hash(*parts: Any) -> str:
    """Ten letters that depend on the content alone."""
    digest = hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).digest()
    return "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest[:10])


def owner_reference(owner: Obj) -> Obj:
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def controller_of(obj: Obj) -> Obj | None:
    """The owner reference of the controller."""
    for owner in obj["metadata"].get("ownerReferences", []):
        if owner.get("controller"):
            found: Obj = owner
            return found
    return None


def controlled(store: Store, owner: Obj, resource: ResourceKey = PODS) -> list[Obj]:
    """Objects that `owner` controls, in the order of creation."""
    uid = owner["metadata"]["uid"]
    children = store.children(uid)
    return [obj for where, obj in children if where == resource and (controller_of(obj) or {}).get("uid") == uid]


def owner_key(change: Change, kind: str) -> ObjectKey | None:
    """The key of the controller of a changed object, if it is of `kind`."""
    owner = controller_of(change.obj)
    return (change.key[0], owner["name"]) if owner and owner["kind"] == kind else None


def pod_from(template: Obj, owner: Obj, name: str, labels: dict[str, str]) -> Obj:
    metadata = template.get("metadata", {})
    pod: Obj = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {**metadata.get("labels", {}), **labels},
            "ownerReferences": [owner_reference(owner)],
        },
        "spec": dict(template["spec"]),
    }
    for field in ("annotations", "finalizers"):
        if metadata.get(field):
            pod["metadata"][field] = metadata[field]
    return pod


def is_terminating(obj: Obj) -> bool:
    return "deletionTimestamp" in obj["metadata"]


def is_healthy(pod: Obj) -> bool:
    return pod["status"].get("phase") == "Running" and is_ready(pod) and not is_terminating(pod)


def has_ended(pod: Obj) -> bool:
    return pod["status"].get("phase") in ("Failed", "Succeeded")


def write_status(api: Api, obj: Obj, status: Obj) -> None:
    """Writes the status if it differs. `None` values are fields left out."""
    kept = {name: value for name, value in {**obj.get("status", {}), **status}.items() if value is not None}
    if kept == obj.get("status"):
        return
    kind = f"{obj['apiVersion']}/{obj['kind']}"
    namespace, name = obj["metadata"]["namespace"], obj["metadata"]["name"]
    api.update(kind, namespace, name, {**obj, "status": kept}, subresource="status", manager=CONTROLLER)


def whole(amount: Any, total: int, *, up: bool) -> int:
    """An int or a percentage of `total`, rounded up or down."""
    if isinstance(amount, str) and amount.endswith("%"):
        share = int(amount[:-1]) * total
        return -(-share // 100) if up else share // 100
    return int(amount)
