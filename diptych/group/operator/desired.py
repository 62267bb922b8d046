"""What a group's spec asks for, in the words of the plan. Pure, on plain objects as the API server gives them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from diptych.group.actions import (
    CoordinatedScaling,
    CoordinatedUpdate,
    Coordination,
    Desired,
    DesiredRole,
    Kind,
    RestartPolicy,
    Update,
)
from diptych.group.operator.resources import Json


def template_revision(template: Json) -> str:
    """A short name for a pod template: pods with the same one need no update."""
    return hashlib.sha256(msgspec.json.encode(template, order="sorted")).hexdigest()[:10]


def desired_group(group: Json, spec: Json, revisions: Mapping[str, str]) -> Desired:
    """`spec`: the group's, resolved (`resolve.resolve_spec`). `revisions`: of each role's pod template, by role."""
    return Desired(
        group=group["metadata"]["name"],
        roles=tuple(_role(role, revisions[role["name"]]) for role in spec["roles"]),
        coordinations=tuple(map(_coordination, spec.get("coordination") or ())),
        paused=bool(spec.get("paused")),
        deleted=bool(group["metadata"].get("deletionTimestamp")),
    )


def _role(role: Json, revision: str) -> DesiredRole:
    kind = workload_kind(role)
    policy: RestartPolicy = "RecreateRoleInstanceOnPodRestart" if kind == "LeaderWorkerSet" else "None"
    return DesiredRole(
        name=role["name"],
        replicas=role["replicas"],
        dependencies=tuple(role.get("dependencies") or ()),
        revision=revision,
        kind=kind,
        size=(role.get("leaderWorkerSet") or {}).get("size", 1) if kind == "LeaderWorkerSet" else 1,
        restart_policy=role.get("restartPolicy") or policy,
        update=_update(role),
        gang_min=role.get("minAvailable"),
    )


def workload_kind(role: Json) -> Kind:
    kind: Kind = (role.get("workload") or {}).get("kind") or "StatefulSet"
    return kind


def _update(role: Json) -> Update:
    strategy = role.get("rolloutStrategy") or {}
    rolling = strategy.get("rollingUpdate") or {}
    return Update(
        partition=rolling.get("partition", 0),
        max_unavailable=rolling.get("maxUnavailable", 1),
        max_surge=rolling.get("maxSurge", 0),
        paused=bool(rolling.get("paused")),
        min_ready_s=float(role.get("minReadySeconds") or 0),
        progress_deadline_s=strategy.get("progressDeadlineSeconds"),
        rollback=bool(strategy.get("rollbackOnFailure")),
    )


def _coordination(policy: Json) -> Coordination:
    strategy = policy.get("strategy") or {}
    update, scaling = strategy.get("rollingUpdate"), strategy.get("scaling")
    return Coordination(
        roles=tuple(policy["roles"]),
        update=None
        if update is None
        else CoordinatedUpdate(
            max_skew=_percent(update.get("maxSkew"), 100),
            partition=_percent(update.get("partition"), None),
            max_unavailable=_percent(update.get("maxUnavailable"), None),
        ),
        scaling=None
        if scaling is None
        else CoordinatedScaling(
            max_skew=_percent(scaling.get("maxSkew"), 100),
            progression=scaling.get("progression") or "OrderScheduled",
        ),
    )


def _percent(text: str | None, default: Any) -> Any:
    return default if text is None else int(text.removesuffix("%"))
