"""From a group's spec to what `plan` is asked for. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from diptych.group import kinds
from diptych.group.actions import (
    Backoff,
    CoordinatedScaling,
    CoordinatedUpdate,
    Coordination,
    Desired,
    DesiredRole,
    Kind,
    Update,
)
from diptych.group.role import Role, RollingUpdate, RolloutStrategy


def template_revision(template: object) -> str:
    """A short name for a pod template: pods with the same one need no update."""
    return hashlib.sha256(msgspec.json.encode(template, order="sorted")).hexdigest()[:10]


def desired_group(group: kinds.RoleBasedGroup, revisions: Mapping[str, str], backoff: Backoff) -> Desired:
    """`group` is resolved: every role has its template and its replicas. `revisions`: of each role's pods, by role."""
    return Desired(
        group=group.name,
        roles=tuple(_role(role, revisions[role.name]) for role in group.spec.roles),
        coordinations=tuple(_coordination(each) for each in group.spec.coordination),
        backoff=backoff,
        paused=group.spec.paused,
    )


def _role(role: Role, revision: str) -> DesiredRole:
    kind: Kind = role.workload.kind  # type: ignore[assignment]  # checked by `checks.group_problems`
    return DesiredRole(
        name=role.name,
        replicas=role.replicas,
        dependencies=role.dependencies,
        revision=revision,
        kind=kind,
        size=role.leader_worker_set.size if role.leader_worker_set and kind == "LeaderWorkerSet" else 1,
        restart_policy=role.restart_policy,
        update=_update(role),
        gang_min=role.min_available,
    )


def _update(role: Role) -> Update:
    strategy = role.rollout_strategy or RolloutStrategy()
    rolling = strategy.rolling_update or RollingUpdate()
    return Update(
        partition=rolling.partition,
        max_unavailable=rolling.max_unavailable,
        max_surge=rolling.max_surge,
        paused=rolling.paused,
        min_ready_s=role.min_ready_seconds,
        progress_deadline_s=strategy.progress_deadline_seconds,
        rollback=strategy.rollback_on_failure,
    )


def _coordination(each: kinds.Coordination) -> Coordination:
    strategy = each.strategy or kinds.CoordinationStrategy()
    update, scaling = strategy.rolling_update, strategy.scaling
    return Coordination(
        roles=each.roles,
        update=None
        if update is None
        else CoordinatedUpdate(
            max_skew=_percent(update.max_skew or "100%"),
            partition=None if update.partition is None else _percent(update.partition),
            max_unavailable=None if update.max_unavailable is None else _percent(update.max_unavailable),
        ),
        scaling=None
        if scaling is None
        else CoordinatedScaling(max_skew=_percent(scaling.max_skew or "100%"), progression=scaling.progression),
    )


def _percent(text: str) -> int:
    return int(text.removesuffix("%"))
