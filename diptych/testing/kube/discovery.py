"""What a client asks before it knows the API: versions, groups, resources; and evictions of pods."""

from __future__ import annotations

from typing import Any

from diptych.testing.kube.api import Api
from diptych.testing.kube.deletion import Deleting
from diptych.testing.kube.disruption import evict
from diptych.testing.kube.kinds import Kinds
from diptych.testing.kube.record import Request
from diptych.testing.kube.routes import Target
from diptych.testing.kube.status import Obj, no_such_path

VERSION = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.0",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "2026-04-22T00:00:00Z",
    "goVersion": "",
    "compiler": "",
    "platform": "linux/amd64",
}


def document(kinds: Kinds, path: str) -> Obj | None:
    """The discovery document at `path`, or None if that is no place of one. Raises 404 for unknown groups."""
    parts = [part for part in path.split("/") if part]
    if parts in (["healthz"], ["readyz"], ["livez"]):
        return {"status": "ok"}
    if parts == ["version"]:
        return VERSION
    if parts == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    if parts == ["apis"]:
        groups = [_group(name, versions) for name, versions in kinds.groups().items()]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if parts == ["api", "v1"]:
        return _resources(kinds, "", "v1")
    if parts[:1] == ["apis"] and len(parts) == 2:
        versions = kinds.groups().get(parts[1])
        if versions is None:
            raise no_such_path()
        return {"kind": "APIGroup", "apiVersion": "v1", **_group(parts[1], versions)}
    if parts[:1] == ["apis"] and len(parts) == 3:
        return _resources(kinds, parts[1], parts[2])
    return None


def _group(name: str, versions: list[str]) -> Obj:
    entries = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": entries, "preferredVersion": entries[0]}


def _resources(kinds: Kinds, group: str, version: str) -> Obj:
    found: list[Obj] = []
    for kind in kinds.of(group, version):
        found += [kind.resource(), *kind.subresources()]
    name = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": found}


def extra(api: Api, target: Target, request: Request, body: Any) -> tuple[int, Obj]:
    """Subresources that only pods have: an eviction deletes. Raises 404 for all others."""
    if target.kind.key == ("", "pods") and target.subresource == "eviction" and request.verb == "create":
        options = (body or {}).get("deleteOptions") or {}
        evict(api, target.namespace or "", target.name, Deleting(grace_s=options.get("gracePeriodSeconds")))
        return 201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    raise no_such_path()
