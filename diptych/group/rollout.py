"""One role's rolling update: which of its pods are replaced next. Pure.

A StatefulSet's controller replaces pods one by one from the highest ordinal down to the partition, whatever else is
unavailable. So the partition only ever covers pods that may go now, and if several may go, they are deleted by name.

* At least `replicas - maxUnavailable` pods stay available; pods that are unavailable for any reason count.
* A pod that is unavailable goes first, since that costs nothing: a broken one cannot stall the rollout. Where it is not
  the next by ordinal, the workload is put on OnDelete meanwhile. OnDelete knows no partition: if the user holds
  ordinals back with one, only until the broken pod has been made anew, and only while all of those are well.
* A pod whose node is not heard of is unavailable and not broken: after an outage of the API server that is every pod.
* Nothing here is remembered. Each time the pods that may go are chosen anew, and the partition follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import msgspec

from diptych.group.actions import DesiredRole, ObservedRole, PodState, Rollout, Target
from diptych.group.coordinate import amount, budget


@dataclass(frozen=True)
class View:
    """A role as its rollout sees it. `replicas`: how many it shall have now, surge aside; `now`: the time."""

    role: DesiredRole
    seen: ObservedRole
    replicas: int
    now: float

    @property
    def floor(self) -> int:
        """The user's partition: ordinals below it are not updated. A percentage is rounded up."""
        if self.role.kind == "Deployment":
            return 0
        return min(amount(self.role.update.partition, self.replicas, round_up=True), self.replicas)

    @cached_property
    def pods(self) -> dict[int, PodState]:
        """Pods by ordinal, those that end left out; a Deployment's that run are numbered as they come, old last."""
        alive = [pod for pod in self.seen.pods if pod.phase != "stopping"]
        if self.role.kind == "Deployment":  # whose ended pods stay beside those made in their stead
            alive = [pod for pod in alive if pod.phase == "running"]
            alive.sort(key=lambda pod: (not self.is_updated(pod), not self.is_available(pod), pod.name))
            return dict(enumerate(alive))
        return {pod.index: pod for pod in alive}

    def is_updated(self, pod: PodState | None) -> bool:
        return pod is not None and pod.revision == self.role.revision

    def available_at(self, pod: PodState) -> float:
        """When a pod that is ready counts as available."""
        wait_s = self.role.update.min_ready_s
        return pod.ready_since + wait_s if wait_s else float("-inf")

    def is_ready(self, pod: PodState | None) -> bool:
        return pod is not None and pod.phase == "running" and pod.ready

    def may_serve(self, pod: PodState | None) -> bool:
        return self.is_ready(pod) or (pod is not None and pod.phase == "running" and pod.cut_off)

    def is_available(self, pod: PodState | None) -> bool:
        return pod is not None and self.is_ready(pod) and self.now >= self.available_at(pod)

    @cached_property
    def outdated(self) -> list[int]:
        """Ordinals of pods that the rollout still has to replace, highest first."""
        last = len(self.pods) if self.role.kind == "Deployment" else self.replicas
        return [
            i for i in reversed(range(self.floor, last)) if i in self.pods and not self.is_updated(self.pods.get(i))
        ]

    @property
    def may_skip(self) -> bool:
        """Whether pods may be replaced out of order: nothing is held back, or nothing that could come back updated."""
        return all(self.is_ready(self.pods.get(i)) for i in range(self.floor))

    @property
    def num_updated(self) -> int:
        """Pods of the new revision that are available."""
        return sum(i < self.replicas and self.is_done(i) for i in self.pods)

    def is_done(self, ordinal: int) -> bool:
        """Whether the pod of this ordinal has the new revision and is available."""
        pod = self.pods.get(ordinal)
        return self.is_updated(pod) and self.is_available(pod)

    @property
    def complete(self) -> bool:
        """Every pod that was to be updated is, and all are available."""
        if self.seen.target.revision != self.role.revision or not self.seen.settled or self.outdated:
            return False
        return all(self.is_available(self.pods.get(i)) for i in range(self.replicas))

    @property
    def under_way(self) -> bool:
        """A rollout to this revision has something left to do. A pod that fails once it is complete changes nothing."""
        record = self.seen.rollout
        return (
            self.seen.target.revision != self.role.revision
            or bool(self.outdated)
            or (record is not None and record.revision == self.role.revision and record.state != "complete")
        )


def next_step(view: View, limit: int | None, held: bool) -> tuple[Target, list[PodState]]:
    """The role's target, and the pods to delete once its controller has that target.

    `limit`: how many pods may be of the new revision, for the sake of other roles; None: all. `held`: none that is not.
    """
    role, replicas = view.role, view.replicas
    held = held and view.under_way
    if held:
        return _held(view), []
    if role.kind == "Deployment":  # its own controller does the rest
        return Target(replicas, 0, role.revision), []
    unfinished = sum(not view.is_done(i) for i in range(view.floor, replicas))
    surge = _surge(view, unfinished)
    chosen = _chosen(view, limit, surge)
    partition = _partition(view, chosen)
    if role.kind == "LeaderWorkerSet":  # minds maxUnavailable and maxSurge itself
        return Target(replicas, partition, role.revision), []
    on_delete = _needs_on_delete(view, chosen, partition)
    target = Target(replicas + surge, 0 if on_delete else partition, role.revision, on_delete)
    stale = {i for i, pod in view.pods.items() if replicas <= i < replicas + surge and not view.is_updated(pod)}
    return target, [view.pods[i] for i in sorted(chosen | stale, reverse=True) if i in view.pods]


def progress(view: View, held: bool) -> Rollout | None:
    """The record of the role's rollout as it is to be kept; None: there has been none since the role was created."""
    record, now = view.seen.rollout, view.now
    if record is None or record.revision != view.role.revision:
        return _begun(view, held) if view.under_way else record
    if record.state == "complete" and not view.outdated:
        return record
    if view.complete:
        return msgspec.structs.replace(record, state="complete", updated=view.num_updated)
    if held:
        return msgspec.structs.replace(record, state="held")
    if record.state == "complete":
        record = msgspec.structs.replace(record, started_at=now)
    if record.state in ("complete", "held") or record.updated < view.num_updated or record.updated > view.replicas:
        return msgspec.structs.replace(record, state="progressing", progressed_at=now, updated=view.num_updated)
    if record.state == "progressing" and now >= deadline(view.role, record):
        return msgspec.structs.replace(record, state="failed")
    return record


def deadline(role: DesiredRole, record: Rollout) -> float:
    """When the rollout has failed, if it makes no progress until then."""
    limit_s = role.update.progress_deadline_s
    return float("inf") if limit_s is None else record.progressed_at + limit_s


def _begun(view: View, held: bool) -> Rollout:
    record, now = view.seen.rollout, view.now
    if record is None:
        good = view.seen.target.revision
    else:
        good = record.revision if record.state == "complete" else record.good
    return Rollout(
        revision=view.role.revision,
        good=good,
        state="held" if held else "progressing",
        started_at=now,
        progressed_at=now,
        updated=view.num_updated,
    )


def _spare(view: View, surge: int) -> int:
    """How many more pods may become unavailable; below 0: too many are. Surge pods count once they are available."""
    available = sum(
        view.is_available(pod) and (i < view.replicas or view.is_updated(pod))
        for i, pod in view.pods.items()
        if i < view.replicas + surge
    )
    return available - view.replicas + budget(view.role.update, view.replicas)[0]


def _surge(view: View, unfinished: int) -> int:
    """Pods beyond `replicas`: one for each pod that is still to be replaced, as far as maxSurge goes.

    Those there are stay until the others suffice without them.
    """
    if not view.under_way:
        return 0
    most = budget(view.role.update, view.replicas)[1]
    surge = min(most, unfinished)
    while surge < min(most, view.seen.target.replicas - view.replicas) and _spare(view, surge) < 0:
        surge += 1
    return surge


def _chosen(view: View, limit: int | None, surge: int) -> set[int]:
    """Ordinals whose pods may be replaced now, or that have no pod and may get one of the new revision."""
    pods, left_to_controller = view.pods, view.role.kind == "LeaderWorkerSet"
    candidates = [i for i in reversed(range(view.floor, view.replicas)) if not view.is_updated(pods.get(i))]
    if view.may_skip and not left_to_controller:
        candidates.sort(key=lambda i: view.may_serve(pods.get(i)))
    if limit is None or not view.outdated:
        limit = view.replicas
    room = limit - sum(view.is_updated(pods.get(i)) for i in range(view.replicas))
    spare = view.replicas if left_to_controller else _spare(view, surge)
    chosen: set[int] = set()
    for i in candidates:
        cost = int(view.may_serve(pods.get(i)))  # ready, but not for long enough to count: wait for it
        if len(chosen) >= room or (cost and spare < cost):
            break
        chosen.add(i)
        spare -= cost
    return chosen


def _partition(view: View, chosen: set[int]) -> int:
    """The lowest ordinal from which on every pod is updated or may be."""
    partition = view.replicas
    while partition > view.floor and (partition - 1 in chosen or view.is_updated(view.pods.get(partition - 1))):
        partition -= 1
    return partition


def _needs_on_delete(view: View, chosen: set[int], partition: int) -> bool:
    """Whether pods below the partition are to be of the new revision while others there are not.

    With a partition of the user's those that have it already do not count: lost, they come back old and are next again.
    """
    new = any(i in chosen or (not view.floor and view.is_updated(view.pods.get(i))) for i in range(partition))
    return view.may_skip and new and any(i not in chosen for i in view.outdated)


def _held(view: View) -> Target:
    """Keeps everything as it is: a new template is not even written, and what has the last one comes back with it."""
    seen, replicas = view.seen.target, view.replicas
    others = [i for i, pod in view.pods.items() if i < replicas and pod.revision != seen.revision]
    if view.role.kind == "Deployment":
        return Target(replicas, replicas if others else 0, seen.revision)
    partition = seen.partition
    if others:
        begun = any(i >= partition and pod.revision == seen.revision for i, pod in view.pods.items())
        partition = min(replicas, max(partition, max(others) + 1)) if begun else replicas
    return Target(replicas + _surge(view, 0), partition, seen.revision)
