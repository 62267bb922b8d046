"""What to do next: a pure function of what is desired, what is observed, and the time.

`plan` decides about workloads: which exist, how many replicas each has, which ordinals may have the new revision, which
single pods have to go. What a workload's controller makes of that is its own affair: on Kubernetes the StatefulSet
controller's, for local processes `pods.control`. Nothing is remembered between two calls but what the actions ask to
record, so a runner may be killed at any point and go on from what it sees.

Rules, in the order they are applied:
* Deleting the group ends dependents before what they need; so do the end of roles that are gone from the spec, and a
  restart of the whole group, which scales everything to 0 and then starts as if it were new.
* A role is created, or started from 0, when every role it depends on is ready. Afterwards dependencies do not matter to
  it: a flapping dependency neither stops it nor holds up its scaling or its rollout.
* Scaling goes straight to the number asked for, or keeps step with the roles it is coordinated with.
* A role is updated once the updates of the roles it depends on are complete; roles coordinated with it go in step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from diptych.group import coordinate, restart
from diptych.group.actions import (
    Action,
    ApplyRole,
    CoordinatedScaling,
    DeletePod,
    DeleteRole,
    Desired,
    DesiredRole,
    Observed,
    ObservedRole,
    RecordFailures,
    RecordRollout,
    Rollback,
    Target,
    Wait,
)
from diptych.group.coordinate import Share
from diptych.group.order import start_order
from diptych.group.rollout import View, deadline, next_step, progress


def plan(desired: Desired, observed: Observed, now: float) -> list[Action]:
    """The actions that are due, to be carried out in this order. Empty: nothing to do until something changes."""
    present = {role.name for role in observed.roles}
    if desired.deleted:
        return list(_delete(present, desired, observed))
    actions: list[Action] = list(restart.forgotten(desired, observed))
    failures = restart.group_failures(desired, observed, now)
    if failures != observed.failures.get(desired.group):
        actions.append(RecordFailures(desired.group, failures))
    if failures is not None and failures.pending:
        due = restart.restart_at(failures, desired.backoff)
        if now >= due:
            return [*actions, *restart.ended_pods(observed, desired.roles, emptying=True), *_empty(desired, observed)]
        actions.append(Wait(due, f"a pod of {desired.group} failed; the whole group is restarted after a pause"))
    actions += restart.pod_restarts(desired, observed, now)
    actions += restart.ended_pods(observed, desired.roles)
    actions += _role_actions(desired, observed, now, {each.uid for each in actions if isinstance(each, DeletePod)})
    names = {role.name for role in desired.roles}
    actions += [DeleteRole(role.name) for role in observed.roles if role.name in names and _is_replaced(role, desired)]
    return [*actions, *_delete(present - names, desired, observed)]


def role_ready(role: DesiredRole, observed: Observed) -> bool:
    """Every desired replica runs and is ready; a role of no replicas is ready."""
    seen = observed.role(role.name)
    pods = () if seen is None or seen.deleting else seen.pods
    return sum(pod.phase == "running" and pod.ready and pod.index < role.replicas for pod in pods) >= role.replicas


def group_ready(desired: Desired, observed: Observed) -> bool:
    """Every role is ready and nothing is left over."""
    return all(role_ready(role, observed) for role in desired.roles) and sum(
        len(role.pods) for role in observed.roles
    ) == sum(role.replicas for role in desired.roles)


def updating(desired: Desired, observed: Observed) -> list[str]:
    """Roles whose rollout is under way and goes on."""
    seen = {role.name: role for role in observed.roles if not role.deleting}
    return [
        role.name
        for role in desired.roles
        if role.name in seen
        and view_of(role, seen[role.name], desired, role.replicas, 0.0).under_way
        and not held_by(role, desired, observed)
    ]


def waiting_for(role: DesiredRole, desired: Desired, observed: Observed) -> list[str]:
    """Dependencies that keep this role from being created or started; empty once it is."""
    seen = observed.role(role.name)
    if desired.deleted or (seen is not None and (seen.pods or seen.target.replicas or not role.replicas)):
        return []
    roles = {each.name: each for each in desired.roles}
    return [name for name in role.dependencies if not role_ready(roles[name], observed)]


def replicas_now(desired: Desired, observed: Observed) -> dict[str, int]:
    """How many replicas each role shall have at this moment, surge aside; roles not to be created yet are left out."""
    result = {role.name: role.replicas for role in desired.roles}
    free: dict[str, int] = {}  # roles that need not wait, and their replicas until now
    for role in desired.roles:
        seen = observed.role(role.name)
        if not waiting_for(role, desired, observed):
            free[role.name] = _current(role, seen)
        elif seen is None:
            del result[role.name]
        else:
            result[role.name] = 0
    for each in desired.coordinations:
        if each.scaling is not None:
            names = [name for name in each.roles if name in free and result[name] > 0]
            _keep_step(names, each.scaling, free, result, observed)
    return result


def _keep_step(
    names: list[str],
    scaling: CoordinatedScaling,
    current: Mapping[str, int],
    result: dict[str, int],
    observed: Observed,
) -> None:
    """Moves `result` of these roles back towards `current` where they would get too far ahead of one another."""
    goals = {name: result[name] for name in names}
    seen = {name: observed.role(name) for name in names}
    up = {
        name: Share(_arrived(seen[name], goals[name], scaling), goals[name])
        for name in names
        if current[name] <= goals[name]
    }
    for name, limit in coordinate.upper_limits(up, scaling.max_skew).items():
        result[name] = min(goals[name], max(current[name], limit))
    down = {name: Share(_num_pods(seen[name]), goals[name]) for name in names if current[name] > goals[name]}
    for name, limit in coordinate.lower_limits(down, scaling.max_skew).items():
        result[name] = max(goals[name], min(current[name], limit))


def view_of(role: DesiredRole, seen: ObservedRole, desired: Desired, replicas: int, now: float) -> View:
    """The role as its rollout sees it, with what its coordinations say of it."""
    return View(_with_coordination(role, desired), seen, replicas, now)


def held_by(role: DesiredRole, desired: Desired, observed: Observed) -> str:
    """Why the role's rollout does not go on, as a sentence; empty if it does."""
    if desired.paused:
        return "the group is paused"
    if role.update.paused:
        return "its rollout is paused"
    roles = {each.name: each for each in desired.roles}
    together = {
        name for each in desired.coordinations if each.update and role.name in each.roles for name in each.roles
    }
    ahead, found = list(role.dependencies), set[str]()
    while ahead:
        name = ahead.pop()
        if name in found:
            continue
        found.add(name)
        ahead += roles[name].dependencies
        seen = observed.role(name)
        if seen is None or seen.deleting or name in together:
            continue
        if view_of(roles[name], seen, desired, roles[name].replicas, 0.0).under_way:
            return f"the update of {name}, which it depends on, comes first"
    return ""


def _role_actions(desired: Desired, observed: Observed, now: float, deleted: set[str]) -> Iterator[Action]:
    """Actions for the roles of the spec; `deleted`: uids of pods that are deleted already."""
    replicas = replicas_now(desired, observed)
    views: dict[str, View] = {}
    for role in desired.roles:
        seen = observed.role(role.name)
        if role.name in replicas and (seen is None or _is_wanted(seen, desired)):
            nothing = ObservedRole(name=role.name, target=Target(0, 0, role.revision), kind=role.kind)
            views[role.name] = view_of(role, seen or nothing, desired, replicas[role.name], now)
    limits = _update_limits(desired, views)
    for name in start_order({role.name: role.dependencies for role in desired.roles}):
        if name in views:
            held = bool(held_by(views[name].role, desired, observed))
            yield from _one_role(views[name], limits.get(name), held, observed.role(name) is None, deleted)


def _one_role(view: View, limit: int | None, held: bool, is_new: bool, deleted: set[str]) -> Iterator[Action]:
    role, seen, record = view.role, view.seen, progress(view, held)
    if record is not None and record != seen.rollout:
        yield RecordRollout(role.name, record)
    target, replaced = next_step(view, limit, held)
    if is_new or target != seen.target:
        yield ApplyRole(role.name, target)
    elif seen.settled:  # otherwise its controller might make the same pod again
        for pod in replaced:
            if pod.uid not in deleted:
                yield DeletePod(role.name, pod.name, pod.uid, "its revision is no longer wanted")
    if record is not None and record.state == "failed" and role.update.rollback and record.good != record.revision:
        why = f"{role.name} made no progress for {role.update.progress_deadline_s:g} s"
        yield Rollback(role.name, record.good, why)
    if record is not None and record.state == "progressing" and deadline(role, record) < float("inf"):
        yield Wait(deadline(role, record), f"the rollout of {role.name} has to progress until then")
    soon = [at for pod in view.pods.values() if pod.ready and (at := view.available_at(pod)) > view.now]
    if soon:
        yield Wait(min(soon), f"pods of {role.name} count as available then")


def _update_limits(desired: Desired, views: dict[str, View]) -> dict[str, int]:
    """How many pods of the new revision the coordinated roles may have; only those with something left to replace."""
    limits: dict[str, int] = {}
    for each in desired.coordinations:
        if each.update is None:
            continue
        shares = {
            name: Share(views[name].num_updated, views[name].replicas)
            for name in each.roles
            if name in views and views[name].outdated and views[name].role.kind != "Deployment"
        }
        for name, limit in coordinate.upper_limits(shares, each.update.max_skew).items():
            limits[name] = min(limit, limits.get(name, limit))
    return limits


def _with_coordination(role: DesiredRole, desired: Desired) -> DesiredRole:
    """The role with what its coordinations say of partition and maxUnavailable. With a partition there is no surge."""
    updates = [each.update for each in desired.coordinations if each.update and role.name in each.roles]
    partitions = [each.partition for each in updates if each.partition is not None]
    unavailable = [each.max_unavailable for each in updates if each.max_unavailable is not None]
    update = role.update
    if partitions:
        update = msgspec.structs.replace(update, partition=f"{max(partitions)}%", max_surge=0)
    if unavailable:
        update = msgspec.structs.replace(update, max_unavailable=f"{min(unavailable)}%")
    return msgspec.structs.replace(role, update=update)


def _current(role: DesiredRole, seen: ObservedRole | None) -> int:
    """Replicas the role has been asked for until now. In a rollout, pods beyond what it needs may be surge."""
    if seen is None:
        return 0
    record, current = seen.rollout, seen.target.replicas
    if current > role.replicas and record is not None and record.state != "complete":
        return max(role.replicas, current - coordinate.budget(role.update, role.replicas)[1])
    return current


def _num_pods(seen: ObservedRole | None) -> int:
    return len(seen.pods) if seen else 0


def _arrived(seen: ObservedRole | None, goal: int, scaling: CoordinatedScaling) -> int:
    pods = [pod for pod in (seen.pods if seen else ()) if pod.phase == "running" and pod.index < goal]
    arrived = sum(pod.ready if scaling.progression == "OrderReady" else pod.scheduled for pod in pods)
    return min(arrived, goal)


def _is_wanted(seen: ObservedRole, desired: Desired) -> bool:
    """Whether this workload belongs to a role of the spec: a role whose kind has changed is made anew."""
    kind = next((role.kind for role in desired.roles if role.name == seen.name), None)
    return kind == seen.kind and not seen.deleting


def _is_replaced(seen: ObservedRole, desired: Desired) -> bool:
    return not seen.deleting and not _is_wanted(seen, desired)


def _last_ones(names: set[str], desired: Desired, observed: Observed) -> list[str]:
    """Those of `names` on which nothing present depends, alphabetically."""
    roles = {role.name: role.dependencies for role in desired.roles}
    needed = {
        name
        for role in observed.roles
        if role.pods or role.target.replicas
        for name in roles.get(role.name, role.dependencies)
    }
    return sorted(names - needed)


def _delete(names: set[str], desired: Desired, observed: Observed) -> Iterator[Action]:
    deleting = {role.name for role in observed.roles if role.deleting}
    for name in _last_ones(names, desired, observed):
        if name not in deleting:
            yield DeleteRole(name)


def _empty(desired: Desired, observed: Observed) -> Iterator[Action]:
    """Ends the pods of the whole group, dependents first; the workloads stay."""
    for name in _last_ones({role.name for role in observed.roles}, desired, observed):
        seen = observed.role(name)
        if seen is None or seen.deleting:
            continue
        if not _is_wanted(seen, desired):
            yield DeleteRole(name)
        elif seen.target.replicas:
            yield ApplyRole(name, msgspec.structs.replace(seen.target, replicas=0))
