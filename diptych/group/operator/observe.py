"""What there is of a group, in the words of the plan. Pure: from objects as the API server gives them.

What the plan asks to keep lies in annotations: of a role's rollout on its workload, of restarts on the group. So a new
operator knows what the old one knew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

import msgspec

from diptych.group import names
from diptych.group.actions import Failures, Kind, Observed, ObservedRole, Phase, PodState, Rollout, Target
from diptych.group.operator.cache import controller_of
from diptych.group.operator.resources import Json
from diptych.group.operator.takeover import live_templates

ROLE_LABEL = f"{names.PREFIX}/role"
REVISION = f"{names.PREFIX}/role-revision-hash"  # label of pods and annotation of workloads
ROLLOUT = f"{names.PREFIX}/rollout"  # annotation of workloads
DEPENDENCIES = f"{names.PREFIX}/dependencies"  # annotation of workloads
FAILURES = f"{names.PREFIX}/restarts"  # annotation of groups
MAX_FAILURES = 1000  # in it: 110 bytes each and the name, and an object may have 256 KiB of annotations
POD_INDEX = "apps.kubernetes.io/pod-index"
CONTROLLER_REVISION = "controller-revision-hash"  # label of a StatefulSet's pods
SIDECARS = frozenset({"patio-runtime"})  # whose restarts concern nobody else, as in v0.4


def observe(group: Json, workloads: Mapping[str, tuple[Kind, Json]], pods: Sequence[Json]) -> Observed:
    """`workloads`: those the group controls, by role. `pods`: all that carry its labels; those that none of its
    workloads made are somebody else's, whatever their labels say."""
    by_role: dict[str, list[Json]] = {}
    whole_at = _reported_whole_at(group)
    for pod in pods:
        role = pod["metadata"]["labels"].get(ROLE_LABEL, "")
        if role and _is_made_for(pod, names.workload_name(group["metadata"]["name"], role)):
            by_role.setdefault(role, []).append(pod)
    roles = [_role(name, *found, by_role.get(name, []), whole_at) for name, found in workloads.items()]
    for name in by_role.keys() - workloads.keys():  # the workload is gone, its pods are ending
        states = tuple(_pod(pod, whole_at) for pod in by_role[name])
        roles.append(ObservedRole(name=name, target=Target(0, 0, ""), pods=states, deleting=True))
    return Observed(roles=tuple(sorted(roles, key=lambda role: role.name)), failures=_failures(group))


def _is_made_for(pod: Json, workload: str) -> bool:
    """Whether a workload of this name, today's or an earlier one, made the pod: itself, or through a ReplicaSet
    <workload>-<hash> or a StatefulSet of workers <workload>-<index>."""
    owner = controller_of(pod)
    name = owner.get("name", "")
    if owner.get("kind") == "StatefulSet" and name == workload:
        return True
    made, _, suffix = name.rpartition("-")
    return made == workload and (owner["kind"] == "ReplicaSet" or (owner["kind"] == "StatefulSet" and suffix.isdigit()))


def _role(name: str, kind: Kind, workload: Json, pods: Sequence[Json], whole_at: float) -> ObservedRole:
    metadata, spec = workload["metadata"], workload["spec"]
    annotations = metadata.get("annotations") or {}
    if not is_marked(workload):
        pods = [_marked(pod, workload) for pod in pods]
    if kind == "LeaderWorkerSet":
        size = spec["leaderWorkerTemplate"].get("size") or 1
        states = _replicas_of_leaders(metadata["name"], size, pods, whole_at)
    else:
        states = [_pod(pod, whole_at) for pod in pods]
    if kind == "StatefulSet":  # pods of an earlier one of the same name end before there can be new ones
        old = {pod["metadata"]["uid"] for pod in pods if controller_of(pod)["uid"] != metadata["uid"]}
        states = [msgspec.structs.replace(each, phase="stopping") if each.uid in old else each for each in states]
    return ObservedRole(
        name=name,
        target=_target(kind, spec, annotations.get(REVISION, "")),
        pods=tuple(sorted(states, key=lambda pod: (pod.index, pod.name))),
        kind=kind,
        settled=_is_settled(kind, workload),
        deleting="deletionTimestamp" in metadata,
        dependencies=tuple(filter(None, annotations.get(DEPENDENCIES, "").split(","))),
        rollout=_decode(annotations.get(ROLLOUT), Rollout),
    )


def is_marked(workload: Json) -> bool:
    """Whether the workload's pods get the label of their revision; those of the upstream controller's do not."""
    return all(REVISION in ((each.get("metadata") or {}).get("labels") or {}) for each in live_templates(workload))


def _marked(pod: Json, workload: Json) -> Json:
    """A pod whose workload's template has no such label, with the one it would have: the workload's revision, if it was
    made from this template."""
    labels = pod["metadata"].get("labels") or {}
    newest = (workload.get("status") or {}).get("updateRevision")
    if REVISION in labels or (newest and labels.get(CONTROLLER_REVISION, newest) != newest):
        return pod
    revision = (workload["metadata"].get("annotations") or {}).get(REVISION, "")
    return {**pod, "metadata": {**pod["metadata"], "labels": {**labels, REVISION: revision}}}


def _is_settled(kind: Kind, workload: Json) -> bool:
    """Whether its controller has seen the spec. A LeaderWorkerSet does not tell before v0.8: its word is taken then."""
    status = workload.get("status") or {}
    if kind == "LeaderWorkerSet" and "observedGeneration" not in status:
        return bool(status)
    seen: int = status.get("observedGeneration", 0)
    return seen >= int(workload["metadata"]["generation"])


def _target(kind: Kind, spec: Json, revision: str) -> Target:
    replicas = spec.get("replicas", 1)
    if kind == "StatefulSet":
        strategy = spec.get("updateStrategy") or {}
        partition = (strategy.get("rollingUpdate") or {}).get("partition") or 0
        return Target(replicas, partition, revision, on_delete=strategy.get("type") == "OnDelete")
    if kind == "Deployment":
        return Target(replicas, replicas if spec.get("paused") else 0, revision)
    rolling = (spec.get("rolloutStrategy") or {}).get("rollingUpdateConfiguration") or {}
    return Target(replicas, rolling.get("partition") or 0, revision)


def _pod(pod: Json, whole_at: float) -> PodState:
    metadata, status = pod["metadata"], pod.get("status") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or []}
    ready: Json = conditions.get("Ready", {})
    labels = metadata.get("labels") or {}
    return PodState(
        name=metadata["name"],
        index=_index(metadata["name"], labels),
        uid=metadata["uid"],
        revision=labels.get(REVISION, ""),
        phase=_phase(pod),
        scheduled=bool((pod.get("spec") or {}).get("nodeName")),
        unplaced=conditions.get("PodScheduled", {}).get("reason") == "Unschedulable",
        ready=ready.get("status") == "True",
        ready_since=unix_time(ready.get("lastTransitionTime")),
        restarted=_is_restarted(pod, ready, whole_at),
        unproven=_is_unproven(status, conditions, metadata),
        cut_off=ready.get("status") == "False" and _could_be_ready(pod, conditions),
    )


def _could_be_ready(pod: Json, conditions: Mapping[str, Json]) -> bool:
    """Whether its kubelet says all that makes a pod ready: its containers are, and its readiness gates are passed."""
    gates = [each["conditionType"] for each in (pod.get("spec") or {}).get("readinessGates") or []]
    return all(conditions.get(each, {}).get("status") == "True" for each in ("ContainersReady", *gates))


def _is_unproven(status: Json, conditions: Mapping[str, Json], metadata: Json) -> bool:
    """Whether the pod has not been ready yet: its kubelet first writes Ready, False, when the pod begins; one that it
    turns away (no room, no GPU yet) it writes Failed, without a container."""
    ready, began = conditions.get("Ready"), conditions.get("Initialized", {}).get("lastTransitionTime")
    if ready is None:
        return status.get("phase") == "Failed" and not status.get("containerStatuses")
    if ready.get("status") == "True":
        return False
    return unix_time(ready.get("lastTransitionTime")) <= unix_time(began or metadata.get("creationTimestamp"))


def _index(name: str, labels: Mapping[str, str]) -> int:
    text = labels.get(POD_INDEX, "")
    if text.isdigit():
        return int(text)
    last = name.rpartition("-")[2]
    return int(last) if "pod-template-hash" not in labels and last.isdigit() else -1


def _phase(pod: Json) -> Phase:
    if "deletionTimestamp" in pod["metadata"]:
        return "stopping"
    return "exited" if (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded") else "running"


def _is_restarted(pod: Json, ready: Json, whole_at: float) -> bool:
    """Whether a container was restarted in the pod once it had been ready.

    Ready's last turn tells, if it came before the container's last start. If it came after, the pod may have been ready
    before, while nobody looked, or have had a bad start. It is taken for restarted if it was there when the group was
    last reported whole, and the container was started since.
    """
    status, created_at = pod.get("status") or {}, unix_time(pod["metadata"].get("creationTimestamp"))
    all_statuses = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    again = [each for each in all_statuses if each.get("restartCount") and each["name"] not in SIDECARS]
    if not again:
        return False
    started_at, turned_at = max(map(_started_at, again)), unix_time(ready.get("lastTransitionTime"))
    if turned_at < started_at or (turned_at == started_at and ready.get("status") == "False"):
        return True
    return created_at <= whole_at < started_at


def _started_at(container: Json) -> float:
    """When it was last started; of one that waits, when it was before. 0 if nothing tells."""
    states = [*(container.get("state") or {}).values(), *(container.get("lastState") or {}).values()]
    return next((unix_time(each["startedAt"]) for each in states if each.get("startedAt")), 0.0)


def _reported_whole_at(group: Json) -> float:
    """Since when the group's status says that it is ready and that no update goes on; minus infinity if it does not.

    Ready alone is no word about every pod: while an update goes on there may be one more than it needs.
    """
    conditions = {each["type"]: each for each in (group.get("status") or {}).get("conditions") or []}
    wanted = [conditions.get(name, {}) for name in ("Ready", "RollingUpdateInProgress")]
    if [each.get("status") for each in wanted] != ["True", "False"]:
        return float("-inf")
    return max(unix_time(each["lastTransitionTime"]) for each in wanted)


def _replicas_of_leaders(workload: str, size: int, pods: Sequence[Json], whole_at: float) -> list[PodState]:
    """One state a replica: its leader's, ready when all its `size` pods are. Each leader has a StatefulSet of its name,
    which makes the workers."""
    members: dict[str, list[PodState]] = {}
    leaders = []
    for pod in pods:
        is_leader = controller_of(pod)["name"] == workload
        leader = pod["metadata"]["name"] if is_leader else controller_of(pod)["name"]
        members.setdefault(leader, []).append(_pod(pod, whole_at))
        leaders += [_pod(pod, whole_at)] if is_leader else []
    return [_whole(leader, members[leader.name], size) for leader in leaders]


def _whole(leader: PodState, members: Sequence[PodState], size: int) -> PodState:
    return msgspec.structs.replace(
        leader,
        ready=len(members) >= size and all(each.ready for each in members),
        ready_since=max(each.ready_since for each in members),
        restarted=any(each.restarted for each in members),
        unplaced=any(each.unplaced for each in members),
        unproven=any(each.unproven for each in members),
    )


def _failures(group: Json) -> dict[str, Failures]:
    text = (group["metadata"].get("annotations") or {}).get(FAILURES)
    if not text:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Failures])
    except msgspec.DecodeError:
        return {}  # somebody edited it: begin to count anew


def failures_text(failures: Mapping[str, Failures]) -> str | None:
    """What is kept of `failures`: the newest. What else failed so long ago, or with so many others, that the next time
    is taken for its first, without a pause."""
    newest = sorted(failures.items(), key=lambda each: (not each[1].pending, -each[1].last_at, each[0]))[:MAX_FAILURES]
    return msgspec.json.encode(dict(newest), order="sorted").decode() if newest else None


def _decode(text: str | None, kind: type[Rollout]) -> Rollout | None:
    if not text:
        return None
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError:
        return None  # as above


def unix_time(text: str | None) -> float:
    """Of a time as the API writes it; 0 for none."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0
