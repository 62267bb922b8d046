"""What every write passes before it is stored: defaults, pruning, validation, and the server's own metadata."""

from __future__ import annotations

import uuid
from typing import Any

from diptych.testing.kube import crds, defaults, rules, schema, validations
from diptych.testing.kube.kinds import Kind
from diptych.testing.kube.status import ApiError, Obj, bad_request, invalid
from diptych.testing.kube.store import copy

_KEPT = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "generateName")


def check_type(kind: Kind, body: Any) -> Obj:
    """The body of a write as an object of `kind`. Raises 400."""
    if not isinstance(body, dict):
        raise bad_request("the body of the request must be an object")
    got = body.get("apiVersion", kind.api_version), body.get("kind", kind.name)
    if got != (kind.api_version, kind.name):
        raise bad_request(
            f"the object provided is {got[0]} {got[1]}, the endpoint is of {kind.api_version} {kind.name}"
        )
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise bad_request("metadata must be an object")
    return {**body, "apiVersion": kind.api_version, "kind": kind.name, "metadata": dict(metadata)}


def refuse_unknown(kind: Kind, config: Obj) -> None:
    """Server-side apply refuses fields that a custom kind's schema does not know. Raises 500, as the real one."""
    if kind.schema is None:
        return
    unknown = schema.prune(copy(config), kind.schema)
    if unknown:
        lines = ", ".join(f".{path}: field not declared in schema" for path in unknown)
        what = f"{config['metadata'].get('namespace', '')}/{config['metadata']['name']}"
        what += f"; {kind.api_version}, Kind={kind.name}"
        raise ApiError(500, "InternalError", f"failed to create typed patch object ({what}): {lines}")


def refuse_strictly(kind: Kind, body: Obj) -> None:
    """fieldValidation=Strict, for custom kinds. Raises 400."""
    unknown = schema.prune(copy(body), kind.schema) if kind.schema is not None else []
    if unknown:
        lines = ", ".join(f'unknown field "{path}"' for path in unknown)
        raise bad_request(f"strict decoding error: {lines}")


def new_metadata(kind: Kind, obj: Obj, now: str) -> Obj:
    """Of an object that comes into being."""
    metadata = {
        key: value
        for key, value in obj["metadata"].items()
        if key not in (*_KEPT[:5], "resourceVersion", "managedFields", "selfLink")
    }
    metadata.update(uid=str(uuid.uuid4()), creationTimestamp=now)
    if kind.generation:
        metadata["generation"] = 1
    return metadata


def kept_metadata(live: Obj, new: Obj) -> Obj:
    """Of an object that is updated: what clients cannot change stays. They may say who owns which fields."""
    metadata = {
        key: value for key, value in new["metadata"].items() if key not in (*_KEPT, "managedFields", "selfLink")
    }
    old = live["metadata"]
    metadata.update({key: old[key] for key in (*_KEPT, "name", "namespace", "resourceVersion") if key in old})
    owners = new["metadata"].get("managedFields") or old.get("managedFields")
    if owners:
        metadata["managedFields"] = owners
    return metadata


def admit(kind: Kind, new: Obj, live: Obj | None, gates: frozenset[str], now: str) -> Obj:
    """`new` with defaults, pruned and valid, as a copy of its own. Raises 422."""
    obj = copy(new)
    for field in ("labels", "annotations", "finalizers", "ownerReferences"):
        if not obj["metadata"].get(field, True):
            del obj["metadata"][field]
    if kind.schema is not None:
        schema.prune(obj, kind.schema)
        schema.set_defaults(obj, kind.schema)
    else:
        try:
            defaults.set_defaults(kind, obj, gates)
        except (AttributeError, TypeError, KeyError) as error:
            raise bad_request(f"{kind.name} cannot be handled: a field has the wrong type ({error})") from None
    found = list(rules.metadata_causes(kind, obj))
    if kind.schema is not None:
        found += schema.causes(obj, kind.schema)  # of metadata it can restrict the name
        found += validations.rule_causes(obj, kind.schema, found)
    else:
        found += rules.built_in_causes(kind, obj)
        found += rules.change_causes(kind, live, obj) if live else []
    if kind.name == "CustomResourceDefinition" and kind.group == "apiextensions.k8s.io":
        found += crds.crd_causes(obj)
        obj.setdefault("status", crds.established(obj, now))
    if live and live["metadata"].get("deletionTimestamp"):
        added = set(obj["metadata"].get("finalizers", [])) - set(live["metadata"].get("finalizers", []))
        if added:
            found.append(
                ("metadata.finalizers", "Forbidden: no new finalizers can be added if the object is being deleted")
            )
    if found:
        raise invalid(kind.name, kind.group, obj["metadata"]["name"], found)
    return obj


def spec_changed(kind: Kind, live: Obj, new: Obj) -> bool:
    """Whether the generation moves: all but metadata counts, and the status where it is no subresource."""
    ignored = {"metadata", "status"} if kind.status else {"metadata"}
    return any(live.get(name) != new.get(name) for name in {**live, **new} if name not in ignored)
