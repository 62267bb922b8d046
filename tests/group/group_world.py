"""A world for the plan: workloads, their controllers, pods, and what may happen to them. No clock but its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from msgspec.structs import replace

from diptych.group import names
from diptych.group.actions import (
    Action,
    ApplyRole,
    DeletePod,
    DeleteRole,
    Desired,
    DesiredRole,
    Failures,
    Observed,
    ObservedRole,
    PodState,
    RecordFailures,
    RecordRollout,
    Rollback,
    Rollout,
    Target,
    Wait,
)
from diptych.group.pods import RestartPod, StartPod, StopPod, control, kept_revision
from diptych.group.restart import count_failure


@dataclass
class Workload:
    """`target` is what was written, `heard` what its controller has seen."""

    target: Target
    heard: Target
    kept: str
    dependencies: tuple[str, ...] = ()
    rollout: Rollout | None = None
    deleting: bool = False
    pods: dict[int, PodState] = field(default_factory=dict)


@dataclass
class World:
    """`naive`: controllers do one thing at a time, as a StatefulSet's may, and a kubelet restarts what ended in place.

    Otherwise they are `pods.control`, and a pod that ended stays so until it is dealt with.
    """

    desired: Desired
    naive: bool
    now: float = 1000.0
    workloads: dict[str, Workload] = field(default_factory=dict)
    failures: dict[str, Failures] = field(default_factory=dict)
    in_place: dict[str, Failures] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)  # revisions whose pods never become ready
    taken_out: dict[str, DesiredRole] = field(default_factory=dict)  # roles that the spec no longer has
    rolled_back: list[Rollback] = field(default_factory=list)
    uids: count[int] = field(default_factory=count)

    def observe(self) -> Observed:
        roles = tuple(
            ObservedRole(
                name=name,
                target=each.target,
                pods=tuple(each.pods.values()),
                settled=each.heard == each.target,
                deleting=each.deleting,
                dependencies=each.dependencies,
                rollout=each.rollout,
            )
            for name, each in self.workloads.items()
        )
        return Observed(roles=roles, failures=dict(self.failures))

    def carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case ApplyRole(role, target):
                    dependencies = next(each.dependencies for each in self.desired.roles if each.name == role)
                    if role not in self.workloads:
                        self.workloads[role] = Workload(target, Target(0, 0, ""), target.revision)
                    self.workloads[role].target = target
                    self.workloads[role].dependencies = dependencies
                case DeleteRole(role):
                    self.workloads[role].deleting = True
                case DeletePod(role, name, uid):
                    pod = next(each for each in self.workloads[role].pods.values() if each.uid == uid)
                    assert pod.name == name and pod.phase != "stopping"
                    self._stop(role, pod.index)
                case RecordRollout(role, rollout):
                    self.workloads[role].rollout = rollout
                case RecordFailures(unit, failures):
                    if failures is None:
                        del self.failures[unit]
                    else:
                        self.failures[unit] = failures
                case Rollback():
                    self.rolled_back.append(action)
                case Wait(until):
                    assert until > self.now

    def sync(self, role: str) -> bool:
        """The role's controller has its turn; returns whether it did anything."""
        workload = self.workloads[role]
        if workload.deleting:
            return self._garbage(role)
        before = workload.heard, workload.kept, dict(workload.pods)
        workload.heard = target = workload.target
        workload.kept = kept_revision(target, workload.kept, tuple(workload.pods.values()))
        if self.naive:
            self._one_thing(role)
        else:
            self._all_things(role)
        return before != (workload.heard, workload.kept, workload.pods)

    def _all_things(self, role: str) -> None:
        workload = self.workloads[role]
        policy = next((each.restart_policy for each in self.desired.roles if each.name == role), "None")
        pods = tuple(workload.pods.values())
        for step in control(workload.heard, workload.kept, pods, self.now, self.desired.backoff, self.in_place, policy):
            match step:
                case StartPod(index, revision):
                    self._start(role, index, revision)
                case RestartPod(index):
                    workload.pods[index] = replace(workload.pods[index], phase="running")
                case StopPod(index):
                    self._stop(role, index)

    def _one_thing(self, role: str) -> None:
        """The first of: create a missing pod, end one too many, roll the highest that is due if all above are well."""
        workload = self.workloads[role]
        target, pods = workload.heard, workload.pods
        for index in range(target.replicas):
            if index not in pods:
                new = target.on_delete or index >= target.partition
                self._start(role, index, target.revision if new else workload.kept)
                return
        extra = [index for index in pods if index >= target.replicas]
        if extra:
            if pods[max(extra)].phase != "stopping":
                self._stop(role, max(extra))
            return
        for index in () if target.on_delete else range(target.replicas - 1, target.partition - 1, -1):
            if pods[index].revision != target.revision and pods[index].phase != "stopping":
                self._stop(role, index)
                return
            if not pods[index].ready:
                return

    def _garbage(self, role: str) -> bool:
        pods = self.workloads[role].pods
        for index in list(pods):
            self._stop(role, index)
        if not pods:
            del self.workloads[role]
        return True

    def _start(self, role: str, index: int, revision: str) -> None:
        name = names.pod_name(self.desired.group, role, index)
        pod = PodState(
            name=name, index=index, uid=f"uid{next(self.uids)}", revision=revision, scheduled=False, unproven=True
        )
        self.workloads[role].pods[index] = pod

    def _stop(self, role: str, index: int) -> None:
        pods = self.workloads[role].pods
        if pods[index].phase == "exited":
            del pods[index]
        else:
            pods[index] = replace(pods[index], phase="stopping", ready=False)

    # ---- what may happen ----

    def change(self, role: str, pod: PodState, what: str) -> None:
        pods = self.workloads[role].pods
        if what == "lost" or (what == "gone" and pod.phase == "stopping"):
            del pods[pod.index]
        elif pod.phase != "running":
            return
        elif what == "scheduled":
            pods[pod.index] = replace(pod, scheduled=True)
        elif what == "ready" and pod.revision not in self.broken:
            since = pod.ready_since if pod.ready else self.now
            pods[pod.index] = replace(pod, scheduled=True, ready=True, ready_since=since, unproven=False)
        elif what == "unready":
            pods[pod.index] = replace(pod, ready=False)
        elif what == "crash" and self.naive:
            pods[pod.index] = replace(pod, ready=False, restarted=pod.restarted or not pod.unproven)
        elif what == "crash":
            pods[pod.index] = replace(pod, ready=False, phase="exited")
            self.in_place[pod.name] = count_failure(self.in_place.get(pod.name), self.now, self.desired.backoff)

    def all_pods(self) -> list[tuple[str, PodState]]:
        return [(role, pod) for role, each in self.workloads.items() for pod in each.pods.values()]
