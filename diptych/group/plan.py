"""What to do next: a pure function of what is desired, what is observed, and the time.

Every runner of a group asks the same function and carries out its answer: the local runner with processes, an operator
with workload objects. Nothing is remembered between two calls, so a runner may be killed at any point and go on from
what it sees.

Rules, in the order they are applied:
* A Service's endpoints are the ready pods its selector matches.
* A role is created when every role it depends on is ready. Afterwards dependencies do not matter to it: a flapping
  dependency neither stops a role nor keeps one of its pods from restarting.
* Scaling down ends the highest index first. Deleting, and restarting a whole group, end dependents before what they
  need.
* A pod that ends by itself is restarted: at once after a stable run, then with exponential back-off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec

from diptych.group import names
from diptych.group.order import start_order
from diptych.group.spec import RestartPolicy

Phase = Literal["running", "stopping", "exited"]


class Backoff(msgspec.Struct, frozen=True):
    """When a pod that ended is started again: at once, then after `base_s`·2^k up to `cap_s`.

    A pod that ran for `stable_s` starts the count anew.
    """

    base_s: float = 10.0
    cap_s: float = 300.0
    stable_s: float = 600.0

    def delay_s(self, failures: int) -> float:
        """Seconds to wait after the `failures`-th end in a row."""
        if failures <= 1:
            return 0.0
        return min(self.cap_s, self.base_s * 2.0 ** min(failures - 2, 60))


class Failures(msgspec.Struct, frozen=True):
    """Ends in a row of one restart unit, and when the last one was."""

    count: int
    last_at: float


class DesiredRole(msgspec.Struct, frozen=True):
    name: str
    replicas: int
    dependencies: tuple[str, ...] = ()
    restart_policy: RestartPolicy = "None"
    labels: Mapping[str, str] = {}


class DesiredService(msgspec.Struct, frozen=True):
    name: str
    selector: Mapping[str, str]
    publish_not_ready: bool = False


class Desired(msgspec.Struct, frozen=True):
    """Role names are unique and their dependencies known and free of cycles (`spec.parse` checks that)."""

    group: str
    roles: tuple[DesiredRole, ...]
    services: tuple[DesiredService, ...] = ()
    deleted: bool = False


class PodState(msgspec.Struct, frozen=True):
    """One pod as seen. `exited`: it ended by itself and has not been restarted. `ready` only counts while running."""

    role: str
    index: int
    phase: Phase
    ready: bool = False


class Observed(msgspec.Struct, frozen=True):
    """Everything there is. `failures` by restart unit, `endpoints` by Service (pod names)."""

    pods: tuple[PodState, ...] = ()
    failures: Mapping[str, Failures] = {}
    endpoints: Mapping[str, tuple[str, ...]] = {}


class StartPod(msgspec.Struct, frozen=True):
    """Start a pod that is not there, or restart one that exited; `fresh`: as a new pod, with new volumes."""

    role: str
    index: int
    fresh: bool = True


class StopPod(msgspec.Struct, frozen=True):
    """End a pod and forget it; an exited one is only forgotten."""

    role: str
    index: int


class SetEndpoints(msgspec.Struct, frozen=True):
    """Send the Service's connections to these pods; none: expose nothing."""

    service: str
    pods: tuple[str, ...]


class Wait(msgspec.Struct, frozen=True):
    """Nothing to do for this restart unit before `until`."""

    unit: str
    until: float


Action = StartPod | StopPod | SetEndpoints | Wait


def plan(desired: Desired, observed: Observed, now: float, backoff: Backoff) -> list[Action]:
    """The actions that are due. Empty: nothing to do until something observed changes."""
    actions: list[Action] = list(_endpoint_actions(desired, observed))
    if desired.deleted:
        return [*actions, *_stop_in_order(desired, observed.pods)]
    if _group_restarts(desired, observed):
        return [*actions, *_restart_group(desired, observed, now, backoff)]
    roles = {role.name: role for role in desired.roles}
    for name in start_order({role.name: role.dependencies for role in desired.roles}):
        actions += _role_actions(roles[name], desired, observed, now, backoff)
    gone = [pod for pod in observed.pods if pod.role not in roles]
    return [*actions, *_stops(gone)]


def role_ready(role: DesiredRole, observed: Observed) -> bool:
    """Every desired replica runs and is ready; a role of no replicas is ready."""
    ready = {pod.index for pod in observed.pods if pod.role == role.name and pod.phase == "running" and pod.ready}
    return ready.issuperset(range(role.replicas))


def group_ready(desired: Desired, observed: Observed) -> bool:
    """Every role is ready and nothing is left over."""
    wanted = {(role.name, index) for role in desired.roles for index in range(role.replicas)}
    return {(pod.role, pod.index) for pod in observed.pods} == wanted and all(
        role_ready(role, observed) for role in desired.roles
    )


def waiting_for(role: DesiredRole, desired: Desired, observed: Observed) -> list[str]:
    """Dependencies that keep this role from being created; empty once it has a pod, and when the group is to end."""
    if desired.deleted or any(pod.role == role.name for pod in observed.pods):
        return []
    roles = {each.name: each for each in desired.roles}
    return [name for name in role.dependencies if not role_ready(roles[name], observed)]


def restart_unit(desired: Desired, role: str, index: int) -> str:
    """What restarts together when this pod ends: the group, or the pod. Key of `Observed.failures`."""
    policy = next((each.restart_policy for each in desired.roles if each.name == role), "None")
    if policy == "RecreateRBGOnPodRestart":
        return desired.group
    return names.pod_name(desired.group, role, index)


def count_failure(previous: Failures | None, ran_s: float, now: float, backoff: Backoff) -> Failures:
    """The record after a pod ended by itself, having run for `ran_s`."""
    if previous is None or ran_s >= backoff.stable_s:
        return Failures(1, now)
    return Failures(previous.count + 1, now)


def restart_at(failures: Failures | None, backoff: Backoff) -> float:
    """When the unit may start again."""
    return failures.last_at + backoff.delay_s(failures.count) if failures else float("-inf")


def _role_actions(
    role: DesiredRole, desired: Desired, observed: Observed, now: float, backoff: Backoff
) -> Iterator[Action]:
    pods = {pod.index: pod for pod in observed.pods if pod.role == role.name}
    yield from _stops([pod for pod in pods.values() if pod.index >= role.replicas])
    may_create = not waiting_for(role, desired, observed)
    for index in range(role.replicas):
        pod = pods.get(index)
        if pod is None:
            if may_create:
                yield StartPod(role.name, index)
        elif pod.phase == "exited":
            unit = restart_unit(desired, role.name, index)
            due = restart_at(observed.failures.get(unit), backoff)
            if now < due:
                yield Wait(unit, due)
            else:
                yield StartPod(role.name, index, fresh=role.restart_policy == "RecreateRoleInstanceOnPodRestart")


def _group_restarts(desired: Desired, observed: Observed) -> bool:
    """Whether a pod whose end restarts the whole group has ended."""
    restarting = {
        role.name: role.replicas for role in desired.roles if role.restart_policy == "RecreateRBGOnPodRestart"
    }
    return any(pod.phase == "exited" and pod.index < restarting.get(pod.role, 0) for pod in observed.pods)


def _restart_group(desired: Desired, observed: Observed, now: float, backoff: Backoff) -> Iterator[Action]:
    """End what still runs; when the back-off is over, forget the pods that ended: then the group is created anew."""
    alive = tuple(pod for pod in observed.pods if pod.phase != "exited")
    if alive:
        yield from _stop_in_order(desired, alive)
        return
    due = restart_at(observed.failures.get(desired.group), backoff)
    if now < due:
        yield Wait(desired.group, due)
    else:
        yield from _stops(list(observed.pods))


def _stop_in_order(desired: Desired, pods: tuple[PodState, ...]) -> Iterator[Action]:
    """Stops for those roles on which no role with pods left depends."""
    present = {pod.role for pod in pods}
    needed = {name for role in desired.roles if role.name in present for name in role.dependencies}
    yield from _stops([pod for pod in pods if pod.role not in needed])


def _stops(pods: list[PodState]) -> Iterator[Action]:
    for pod in sorted(pods, key=lambda pod: (pod.role, -pod.index)):
        if pod.phase != "stopping":
            yield StopPod(pod.role, pod.index)


def _endpoint_actions(desired: Desired, observed: Observed) -> Iterator[Action]:
    labels = {role.name: role.labels for role in desired.roles}
    wanted: dict[str, tuple[str, ...]] = dict.fromkeys(observed.endpoints, ())
    for service in () if desired.deleted else desired.services:
        wanted[service.name] = tuple(
            names.pod_name(desired.group, pod.role, pod.index)
            for pod in sorted(observed.pods, key=lambda pod: (pod.role, pod.index))
            if pod.phase == "running"
            and (pod.ready or service.publish_not_ready)
            and _selects(service.selector, desired.group, pod, labels.get(pod.role, {}))
        )
    for name, pods in wanted.items():
        if observed.endpoints.get(name, ()) != pods:
            yield SetEndpoints(name, pods)


def _selects(selector: Mapping[str, str], group: str, pod: PodState, role_labels: Mapping[str, str]) -> bool:
    """Whether a Service's selector matches the pod; an empty one matches nothing."""
    labels = {**role_labels, **names.pod_labels(group, pod.role, pod.index)}
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())
