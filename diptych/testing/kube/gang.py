"""Gang scheduling: a pod of a PodGroup is bound only when at least minMember of the group's pods exist."""

from __future__ import annotations

from diptych.testing.kube.status import Obj
from diptych.testing.kube.store import Store

PODS = ("", "pods")
SCHEDULER_PLUGINS = ("scheduling.x-k8s.io", "podgroups"), "pod-group.scheduling.sigs.k8s.io/name"
VOLCANO = ("scheduling.volcano.sh", "podgroups"), "scheduling.k8s.io/group-name"


def _group(pod: Obj) -> tuple[tuple[str, str], str] | None:
    """Resource and name of the pod's PodGroup. The label is scheduler-plugins', the annotation Volcano's."""
    metadata = pod["metadata"]
    resource, label = SCHEDULER_PLUGINS
    if name := metadata.get("labels", {}).get(label):
        return resource, name
    resource, annotation = VOLCANO
    if name := metadata.get("annotations", {}).get(annotation):
        return resource, name
    return None


def _members(store: Store, pod: Obj) -> list[Obj]:
    group = _group(pod)
    if group is None:
        return []
    return [other for other in store.all(PODS, pod["metadata"]["namespace"]) if _group(other) == group]


def waiting_with(store: Store, pod: Obj) -> list[Obj]:
    """Pods of the same gang that are not bound yet, the pod itself left out."""
    uid = pod["metadata"]["uid"]
    return [one for one in _members(store, pod) if "nodeName" not in one["spec"] and one["metadata"]["uid"] != uid]


def admitted(store: Store, pod: Obj) -> bool:
    """Whether the pod may be bound: it is in no gang, or its PodGroup exists and has its minimum of pods."""
    group = _group(pod)
    if group is None:
        return True
    found = store.get(group[0], pod["metadata"]["namespace"], group[1])
    if found is None:
        return False
    alive = [one for one in _members(store, pod) if one["status"].get("phase") not in ("Succeeded", "Failed")]
    return len(alive) >= int(found.get("spec", {}).get("minMember", 1))
