"""What a group's status says: conditions with what a person can do about them, and numbers by role. Pure."""

from __future__ import annotations

import msgspec

from diptych.group.actions import Condition, Desired, DesiredRole, Failures, GroupStatus, Observed, RoleStatus
from diptych.group.plan import held_by, replicas_now, role_ready, view_of, waiting_for
from diptych.group.restart import failed_pods
from diptych.group.rollout import View

GROUP_RESTART = "RBGRestart"  # reason of the condition, and of the event


def group_status(desired: Desired, observed: Observed, generation: int, now: float) -> GroupStatus:
    """`generation`: of the spec that `desired` was made from."""
    conditions = (
        _ready(desired, observed),
        _progressing(desired, observed, now),
        _updating(desired, observed, now),
        _restarting(desired, observed),
    )
    return GroupStatus(generation, conditions, tuple(_role_status(role, observed) for role in desired.roles))


def not_carried_out(status: GroupStatus, why: str) -> GroupStatus:
    """The status while something refuses what the plan wants."""
    conditions = [each for each in status.conditions if each.type != "Progressing"]
    conditions.insert(1, Condition("Progressing", False, "FailedReconcile", why))
    return msgspec.structs.replace(status, conditions=tuple(conditions))


def _role_status(role: DesiredRole, observed: Observed) -> RoleStatus:
    seen = observed.role(role.name)
    pods = [pod for pod in (seen.pods if seen else ()) if pod.phase == "running"]
    return RoleStatus(
        name=role.name,
        replicas=len(pods),
        ready=sum(pod.ready for pod in pods),
        updated=sum(pod.revision == role.revision for pod in pods),
    )


def _ready(desired: Desired, observed: Observed) -> Condition:
    unready = [role for role in desired.roles if not role_ready(role, observed)]
    if not unready:
        return Condition("Ready", True, "AllRolesReady", "every replica of every role is ready")
    what = "; ".join(_why_unready(role, desired, observed) for role in unready)
    return Condition("Ready", False, "RoleNotReady", what)


def _why_unready(role: DesiredRole, desired: Desired, observed: Observed) -> str:
    waits = waiting_for(role, desired, observed)
    if waits:
        return f"{role.name} waits until {', '.join(waits)} is ready"
    seen = observed.role(role.name)
    pods = seen.pods if seen else ()
    ready = sum(pod.phase == "running" and pod.ready for pod in pods)
    text = f"{role.name} has {ready} of {role.replicas} replicas ready"
    unplaced = [pod.name for pod in pods if pod.phase == "running" and pod.unplaced]
    if unplaced:
        return f"{text}, no node has room for {_some(unplaced)}"
    unready = [pod.name for pod in pods if pod.phase != "stopping" and not pod.ready]
    return f"{text}; see the events and logs of {_some(unready)}" if unready else text


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _views(desired: Desired, observed: Observed, now: float) -> list[View]:
    """Roles that have a workload, as their rollouts see them."""
    replicas = replicas_now(desired, observed)
    return [
        view_of(role, seen, desired, replicas[role.name], now)
        for role in desired.roles
        if (seen := observed.role(role.name)) is not None and not seen.deleting and role.name in replicas
    ]


def _progressing(desired: Desired, observed: Observed, now: float) -> Condition:
    views = _views(desired, observed, now)
    failed = [view for view in views if _state(view) == "failed"]
    if failed:
        role, record = failed[0].role, failed[0].seen.rollout
        after = f"after {role.update.progress_deadline_s or 0:g} s without progress"
        if role.update.rollback and record is not None and record.good != record.revision:
            message = f"the update of {role.name} failed {after}; the group returns to the revision before"
        else:
            message = f"the update of {role.name} failed {after}; correct its template or undo the update"
        return Condition("Progressing", False, "ProgressDeadlineExceeded", message)
    updating = [view for view in views if view.under_way]
    held = {view.role.name: held_by(view.role, desired, observed) for view in updating}
    if updating and all(held.values()):
        name, why = next(iter(held.items()))
        return Condition("Progressing", False, "RolloutHeld", f"the update of {name} does not go on: {why}")
    waiting = [role.name for role in desired.roles if not role_ready(role, observed)]
    if updating or waiting or _extra(desired, observed):
        names = [view.role.name for view in updating] or waiting or _extra(desired, observed)
        return Condition("Progressing", True, "Reconciling", f"still at work on {', '.join(names)}")
    return Condition("Progressing", True, "Complete", "the group is as its spec wants it")


def _extra(desired: Desired, observed: Observed) -> list[str]:
    """Roles with pods that are to end."""
    wanted = {role.name: role.replicas for role in desired.roles}
    return [role.name for role in observed.roles if len(role.pods) > wanted.get(role.name, 0)]


def _updating(desired: Desired, observed: Observed, now: float) -> Condition:
    parts = []
    for view in _views(desired, observed, now):
        if view.under_way:
            why = held_by(view.role, desired, observed)
            total = view.replicas - view.floor
            done = sum(view.is_done(i) for i in range(view.floor, view.replicas))
            text = f"{view.role.name}: {done} of {total} updated and available"
            parts.append(f"{text}; held, because {why}" if why else text)
    if parts:
        return Condition("RollingUpdateInProgress", True, "RollingUpdate", "; ".join(parts))
    return Condition("RollingUpdateInProgress", False, "NoRollingUpdate", "every pod has the revision it should have")


def _restarting(desired: Desired, observed: Observed) -> Condition:
    record = observed.failures.get(desired.group)
    if record is not None and (record.pending or any(_emptied(role, observed) for role in desired.roles)):
        return Condition("RestartInProgress", True, GROUP_RESTART, group_restart(desired, record))
    failed = [
        pod.name
        for role in desired.roles
        if role.restart_policy == "RecreateRoleInstanceOnPodRestart"
        for pod in failed_pods(role, observed)
    ]
    if failed:
        message = f"{_some(failed)} failed and is made anew; see its logs"
        return Condition("RestartInProgress", True, "RoleInstanceRestart", message)
    reason = "RBGRestartCompleted" if record is not None else "NoRestart"
    return Condition("RestartInProgress", False, reason, "nothing is being made anew")


def group_restart(desired: Desired, record: Failures) -> str:
    """What is done about a failure that concerns the whole group."""
    pause_s = desired.backoff.delay_s(record.count)
    pause = f" after a pause of {pause_s:g} s" if pause_s else ""
    return f"failure {record.count} in a row: the whole group is made anew{pause}; see the logs of its pods"


def _emptied(role: DesiredRole, observed: Observed) -> bool:
    seen = observed.role(role.name)
    return seen is not None and role.replicas > 0 and seen.target.replicas == 0


def _state(view: View) -> str:
    record = view.seen.rollout
    return record.state if record is not None and record.revision == view.role.revision else ""
