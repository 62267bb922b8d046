"""Whether what a request says of its object fits the URL and the object that is there. Pure."""

from __future__ import annotations

from diptych.testing.kube import admission, apply
from diptych.testing.kube.kinds import Kind
from diptych.testing.kube.status import Obj, bad_request, conflict, modified
from diptych.testing.kube.store import copy


def declaration(kind: Kind, namespace: str, name: str, config: Obj) -> Obj:
    """What is applied, with its name and namespace. Raises ApiError unless they fit the URL."""
    if not isinstance(config, dict) or not config.get("apiVersion") or not config.get("kind"):
        raise bad_request("apiVersion and kind must be set in a server-side apply request")
    config = admission.check_type(kind, apply.without_nulls(copy(config)))
    if "managedFields" in config["metadata"]:
        raise bad_request("metadata.managedFields must be nil")
    for field, value in (("name", name), ("namespace", namespace)):
        if config["metadata"].get(field, value) != value:
            raise bad_request(f"the {field} of the object does not match the {field} on the URL ({value})")
    config["metadata"]["name"] = name
    if kind.namespaced:
        config["metadata"]["namespace"] = namespace
    admission.refuse_unknown(kind, config)
    return config


def check_identity(kind: Kind, live: Obj, obj: Obj) -> None:
    """Raises ApiError if a write is about another object than `live`, or about an earlier version of it."""
    got, have = obj["metadata"], live["metadata"]
    name = have["name"]
    for field in ("name", "namespace"):
        if got.get(field, have.get(field)) != have.get(field):
            raise bad_request(f"the {field} of the object ({got[field]}) does not match the URL ({have.get(field)})")
    if got.get("uid", have["uid"]) != have["uid"]:
        why = f"Precondition failed: UID in precondition: {got['uid']}, UID in object meta: {have['uid']}"
        raise conflict(kind.plural, kind.group, name, why)
    if got.get("resourceVersion") and got["resourceVersion"] != have["resourceVersion"]:
        raise modified(kind.plural, kind.group, name)
