"""Restart policies: what is made anew when a pod fails, and when. Pure.

A pod has failed when it ended for good, or when one of its containers was restarted in place. Deleting a pod, whoever
does it, is no failure: a scale-down, a rollout or a drained node restarts nothing but that pod.

What fails before it was ever ready concerns only itself: nobody has worked with it yet, and an update to something that
cannot start must not take along what runs. Its kubelet starts it again, ever more slowly.

Each failure is recorded before anything is done about it, with the uid of the pod, so that it counts once. Until the
back-off is over, nothing is touched: the failed pods stay, with their logs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from diptych.group import names
from diptych.group.actions import (
    Action,
    Backoff,
    DeletePod,
    Desired,
    DesiredRole,
    Failures,
    Observed,
    PodState,
    RecordFailures,
    Wait,
)


def unit(desired: Desired, role: DesiredRole, index: int) -> str:
    """What is made anew as one when this pod fails: key of `Observed.failures`. A Deployment's pods share one."""
    if role.restart_policy == "RecreateRBGOnPodRestart":
        return desired.group
    if role.kind == "Deployment":
        return f"{desired.group}-{role.name}"
    return names.pod_name(desired.group, role.name, index)


def count_failure(previous: Failures | None, now: float, backoff: Backoff, uid: str = "") -> Failures:
    """The record after a failure."""
    if previous is None or now >= restart_at(previous, backoff) + backoff.stable_s:
        return Failures(1, now, uid)
    return Failures(previous.count + 1, now, uid)


def restart_at(failures: Failures | None, backoff: Backoff) -> float:
    """When the unit may start again."""
    return failures.last_at + backoff.delay_s(failures.count) if failures else float("-inf")


def failed_pods(role: DesiredRole, observed: Observed) -> list[PodState]:
    """Pods of the role that have failed since they were ready, those that are to end anyway left out."""
    return [pod for pod in _wanted_pods(role, observed) if _has_failed(pod, observed.failures.get(pod.name))]


def _has_failed(pod: PodState, record: Failures | None) -> bool:
    """Once that is recorded, it stays so: ready again, the pod may look as if nothing had been."""
    if pod.phase == "running" and record is not None and record.uid == pod.uid:
        return True
    return not pod.unproven and (pod.phase == "exited" or (pod.phase == "running" and pod.restarted))


def _wanted_pods(role: DesiredRole, observed: Observed) -> list[PodState]:
    seen = observed.role(role.name)
    return [pod for pod in (seen.pods if seen else ()) if pod.index < role.replicas]


def group_failures(desired: Desired, observed: Observed, now: float) -> Failures | None:
    """The group's record: with a failure that has just been seen, and no longer pending once the group is empty."""
    record = observed.failures.get(desired.group)
    restarting = [role for role in desired.roles if role.restart_policy == "RecreateRBGOnPodRestart"]
    if not restarting:
        return None
    if record is not None and record.pending:
        return msgspec.structs.replace(record, pending=False) if _empty(observed) else record
    failed = [pod for role in restarting for pod in failed_pods(role, observed)]
    if not failed:
        return record
    return msgspec.structs.replace(count_failure(record, now, desired.backoff, failed[0].uid), pending=True)


def pod_restarts(desired: Desired, observed: Observed, now: float) -> Iterator[Action]:
    """Records, waits and deletions for the pods of roles that are restarted by instance.

    A LeaderWorkerSet's controller does that itself. Pods of a Deployment that failed together are one failure.
    """
    records = dict(observed.failures)
    for role in desired.roles:
        if role.restart_policy != "RecreateRoleInstanceOnPodRestart" or role.kind == "LeaderWorkerSet":
            continue
        failed = failed_pods(role, observed)
        uids = {pod.uid for pod in failed}
        for pod in failed:
            key = unit(desired, role, pod.index)
            record = records.get(key)
            if record is None or record.uid not in uids:
                record = records[key] = count_failure(record, now, desired.backoff, pod.uid)
                yield RecordFailures(key, record)
            if pod.name not in records:  # of a Deployment
                yield RecordFailures(pod.name, msgspec.structs.replace(record, uid=pod.uid))
            due = restart_at(record, desired.backoff)
            if now < due:
                yield Wait(due, f"{pod.name} failed {record.count} times in a row; it is made anew after a pause")
            else:
                yield DeletePod(role.name, pod.name, pod.uid, "it failed, and its role is restarted by instance")


def ended_pods(observed: Observed, roles: Iterable[DesiredRole], emptying: bool = False) -> Iterator[DeletePod]:
    """Deletions of Deployments' pods that ended for good: their ReplicaSets have made others, and forget them.

    Left alone they would count as old pods, or as pods of a group that is to be empty (`emptying`), for ever. Those
    that a restart policy minds are left to it.
    """
    for role in roles:
        seen = observed.role(role.name)
        for pod in seen.pods if seen is not None and seen.kind == "Deployment" else ():
            if pod.phase == "exited" and (emptying or pod.unproven or role.restart_policy == "None"):
                yield DeletePod(role.name, pod.name, pod.uid, "it ended, and its ReplicaSet has made another")


def forgotten(desired: Desired, observed: Observed) -> Iterator[Action]:
    """Records of what there no longer is."""
    known = {desired.group}
    for role in desired.roles:
        known |= {unit(desired, role, index) for index in range(max(role.replicas, 1))}
        known |= {pod.name for pod in _wanted_pods(role, observed)}
    for key in observed.failures:
        if key not in known:
            yield RecordFailures(key, None)


def _empty(observed: Observed) -> bool:
    return all(not role.pods and (role.deleting or role.target.replicas == 0) for role in observed.roles)
