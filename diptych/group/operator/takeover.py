"""Groups that RoleBasedGroup's own controller (v0.4 to v0.6) has made are taken over as they run. Pure.

Its pods have none of our marks, and its templates differ from ours in what either operator adds. So a workload whose
template runs what the manifest asks for keeps it, with its pods, until its role changes.

Fields are owned by who applied them, and what another manager owns stays when we no longer apply it. So before our
first apply of one of its objects, what it owned becomes ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diptych.group import names
from diptych.group.defaults import without_defaults
from diptych.group.operator.api import FIELD_MANAGER
from diptych.group.operator.resources import Json
from diptych.group.operator.template import CONFIG_PATH, CONFIG_VOLUME

UPSTREAM = "rbg"  # its field manager
_VARIABLES = {"GROUP_NAME", "ROLE_NAME", "ROLE_INDEX", "INSTANCE_NAME", "COMPONENT_NAME", "COMPONENT_INDEX"}


def is_upstreams(managed_fields: Sequence[Json] | None) -> bool:
    """Whether the upstream controller owns fields of an object, given its managedFields."""
    return any(_is_its(entry) for entry in managed_fields or [])


def taken_over(managed_fields: Sequence[Json]) -> list[Json]:
    """The managedFields with its entries as ours, or joined with ours."""
    entries: dict[tuple[str, str, str], Json] = {}
    for entry in managed_fields:
        ours = {**entry, "manager": FIELD_MANAGER} if _is_its(entry) else entry
        key = ours["manager"], ours["operation"], ours.get("subresource", "")
        if key in entries:
            ours = {**ours, "fieldsV1": _union(entries[key]["fieldsV1"], ours["fieldsV1"])}
        entries[key] = ours
    return list(entries.values())


def runs_the_same(one: Sequence[Json], other: Sequence[Json]) -> bool:
    """Whether pod templates differ in nothing but what operators add, and in how a thing is written."""
    return [_program(each) for each in one] == [_program(each) for each in other]


def live_templates(workload: Json) -> list[Json]:
    """The pod template of a workload; of a LeaderWorkerSet the leader's and the workers'."""
    both = workload["spec"].get("leaderWorkerTemplate")
    if both is None:
        return [workload["spec"].get("template") or {}]
    worker = both.get("workerTemplate") or {}
    return [both.get("leaderTemplate") or worker, worker]


def _is_its(entry: Json) -> bool:
    return bool(entry["manager"] == UPSTREAM and entry["operation"] == "Apply")


def _union(one: Json, other: Json) -> Json:
    joined = {name: _union(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **joined}


def _program(template: Json) -> Json:
    metadata, spec = template.get("metadata") or {}, template.get("spec") or {}
    labels = {key: value for key, value in (metadata.get("labels") or {}).items() if not key.startswith(names.PREFIX)}
    containers = {
        field: [_container(each) for each in spec.get(field) or []] for field in ("containers", "initContainers")
    }
    volumes = [each for each in spec.get("volumes") or [] if each["name"] != CONFIG_VOLUME]
    return without_defaults(
        {"metadata": {**metadata, "labels": labels}, "spec": {**spec, **containers, "volumes": volumes}}
    )


def _container(container: Json) -> Json:
    """v0.4 sorts variables by name."""
    env: list[Any] = [each for each in container.get("env") or [] if each["name"] not in _VARIABLES]
    mounts = [each for each in container.get("volumeMounts") or [] if each["mountPath"] != CONFIG_PATH]
    return {**container, "env": sorted(env, key=lambda each: str(each["name"])), "volumeMounts": mounts}
