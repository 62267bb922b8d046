"""What a StatefulSet's controller, and the kubelet behind it, do with a target: which pods start and stop. Pure.

The local runner has no cluster to do this for it. Pods are started and stopped all at once (podManagementPolicy
Parallel); only a rolling update goes one by one, from the highest ordinal, each pod healthy before the next goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from diptych.group.actions import Backoff, Failures, PodState, RestartPolicy, Target, Wait
from diptych.group.restart import restart_at


class StartPod(msgspec.Struct, frozen=True):
    """Make a new pod of this revision."""

    index: int
    revision: str


class RestartPod(msgspec.Struct, frozen=True):
    """Start a pod that ended by itself again, in place: it keeps its volumes."""

    index: int


class StopPod(msgspec.Struct, frozen=True):
    """End a pod and forget it; one that has ended is only forgotten."""

    index: int


PodAction = StartPod | RestartPod | StopPod | Wait


def control(
    target: Target,
    kept: str,
    pods: Sequence[PodState],
    now: float,
    backoff: Backoff,
    failures: Mapping[str, Failures],
    policy: RestartPolicy = "None",
) -> Iterator[PodAction]:
    """The actions that are due for one role's pods.

    `kept`: the revision of ordinals below the partition (`kept_revision`). `failures` by pod name, for pods that are
    restarted in place. With a `policy` those are only the unproven; the others that ended stay, for it to deal with.
    """
    by_index = {pod.index: pod for pod in pods}
    for index in sorted(by_index, reverse=True):
        if index >= target.replicas and by_index[index].phase != "stopping":
            yield StopPod(index)
    for index in range(target.replicas):
        pod = by_index.get(index)
        if pod is None:
            yield StartPod(index, target.revision if target.on_delete or index >= target.partition else kept)
        elif pod.phase == "exited" and (policy == "None" or pod.unproven):
            due = restart_at(failures.get(pod.name), backoff)
            yield RestartPod(index) if now >= due else Wait(due, f"{pod.name} restarts after a pause")
    yield from _roll(target, by_index)


def kept_revision(target: Target, kept: str, pods: Sequence[PodState]) -> str:
    """The revision that is safe to go back to: the target's, once all its pods have it and are ready."""
    ready = {pod.index for pod in pods if pod.phase == "running" and pod.ready and pod.revision == target.revision}
    return target.revision if not target.on_delete and ready >= set(range(target.replicas)) else kept


def _roll(target: Target, pods: Mapping[int, PodState]) -> Iterator[StopPod]:
    if target.on_delete:
        return
    for index in reversed(range(target.partition, target.replicas)):
        pod = pods.get(index)
        if pod is not None and pod.revision != target.revision and pod.phase != "stopping":
            yield StopPod(index)
            return
        if pod is None or pod.phase != "running" or not pod.ready:
            return
