"""A group as its snapshot shows it: its status, its roles, its pods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from diptych.group.actions import Desired, Failures, Observed
from diptych.group.local.process import LocalPod
from diptych.group.local.state import GroupStatus, PodStatus, PodView, RoleView
from diptych.group.plan import group_ready, updating, waiting_for
from diptych.group.restart import restart_at, unit


def group_status(desired: Desired, observed: Observed, been_ready: bool) -> GroupStatus:
    """`been_ready`: the group has been ready before."""
    if desired.deleted:
        return "stopping"
    if group_ready(desired, observed) and not updating(desired, observed):
        return "ready"
    return "not ready" if been_ready else "starting"


def role_views(desired: Desired, observed: Observed, pods: Iterable[LocalPod]) -> tuple[RoleView, ...]:
    ready = [pod.setup.facts.role for pod in pods if pod.ready]
    return tuple(
        RoleView(
            name=role.name,
            replicas=role.replicas,
            ready=ready.count(role.name),
            waiting_for=tuple(waiting_for(role, desired, observed)),
        )
        for role in desired.roles
    )


def pod_view(pod: LocalPod, desired: Desired, records: Mapping[str, Failures]) -> PodView:
    """`records`: `Observed.failures`."""
    facts = pod.setup.facts
    role = next((each for each in desired.roles if each.name == facts.role), None)
    failures = (records.get(pod.name) or records.get(unit(desired, role, facts.index))) if role else None
    reason = pod.reason
    if pod.phase == "exited":
        wait_s = restart_at(failures, desired.backoff) - pod.ended_at
        reason += f"; restarts after {wait_s:.0f} s" if wait_s > 0 else ""
    return PodView(
        name=pod.name,
        role=facts.role,
        index=facts.index,
        status=_pod_status(pod),
        ip=facts.ip,
        since=pod.since,
        restarts=pod.restarts,
        failures=failures.count if failures else 0,
        reason=reason,
        gpus=pod.gpus,
        pids=pod.pids,
    )


def _pod_status(pod: LocalPod) -> PodStatus:
    if pod.phase == "running":
        return "ready" if pod.ready else "not ready" if pod.been_ready else "starting"
    return "restarting" if pod.phase == "exited" else "stopping"
