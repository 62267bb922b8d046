"""From a group's spec as written to what each role is: its template, its number of replicas. Pure, on plain objects.

The operator hands pod templates on as they are, so this works on the parsed document, not on structs. The document has
been checked (`validate.object_problems`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diptych.errors import ConfigError
from diptych.group.merge import merge_pod_template

Raw = dict[str, Any]


def resolve_spec(spec: Mapping[str, Any]) -> Raw:
    """The spec with every role's template and replicas written out; neither templateRef nor scalingGroups is left.

    Raises ConfigError that names the role if its template is unknown or its patch is wrong. `spec` does not change.
    """
    templates = role_templates(spec)
    replicas = role_replicas(spec)
    roles = [
        {**resolve_role(role, templates, f"spec.roles[{i}]"), "replicas": replicas[role["name"]]}
        for i, role in enumerate(spec["roles"])
    ]
    return {name: value for name, value in spec.items() if name not in ("roleTemplates", "scalingGroups")} | {
        "roles": roles
    }


def role_templates(spec: Mapping[str, Any]) -> dict[str, Raw]:
    """The pod templates that roles share, by name."""
    return {each["name"]: each["template"] for each in spec.get("roleTemplates") or ()}


def resolve_role(role: Mapping[str, Any], templates: Mapping[str, Raw], path: str = "role") -> Raw:
    """The role with its template written out. Raises ConfigError that begins with `path`."""
    resolved = {
        name: value
        for name, value in role.items()
        if name not in ("templateRef", "templatePatch") and (name != "template" or value is not None)
    }
    reference = role.get("templateRef")
    if reference is None:
        return resolved
    base = templates.get(reference["name"])
    if base is None:
        known = ", ".join(templates) or "none"
        raise ConfigError(f"{path}.templateRef.name: there is no role template {reference['name']}; there is: {known}")
    return resolved | {"template": _patched(base, role.get("templatePatch"), f"{path}.templatePatch")}


def leader_worker_templates(role: Mapping[str, Any], path: str = "role") -> tuple[Raw, Raw]:
    """(leader's, worker's) pod template of a role with the workload LeaderWorkerSet, its template being written out."""
    patches = role.get("leaderWorkerSet") or {}
    where = f"{path}.leaderWorkerSet"
    return (
        _patched(role["template"], patches.get("patchLeaderTemplate"), f"{where}.patchLeaderTemplate"),
        _patched(role["template"], patches.get("patchWorkerTemplate"), f"{where}.patchWorkerTemplate"),
    )


def _patched(template: Mapping[str, Any], patch: Mapping[str, Any] | None, path: str) -> Raw:
    try:
        return merge_pod_template(template, patch or {})
    except ConfigError as error:
        raise ConfigError(f"{path}.{error.message}") from None


def role_replicas(spec: Mapping[str, Any]) -> dict[str, int]:
    """Replicas by role: a scaling group's units times the role's share of one, else the role's own (default 1)."""
    replicas = {role["name"]: _or_one(role.get("replicas")) for role in spec["roles"]}
    for group in spec.get("scalingGroups") or ():
        for role, share in group["roles"].items():
            replicas[role] = _or_one(group.get("replicas")) * share
    return replicas


def _or_one(value: int | None) -> int:
    return 1 if value is None else value
