"""RoleBasedGroupSets: `replicas` groups of one spec, called <set>-<index>."""

from __future__ import annotations

import copy
from datetime import UTC, datetime

from diptych.group.operator.cluster import Cluster
from diptych.group.operator.resources import GROUP, GROUP_SET, Json
from diptych.group.operator.template import EXCLUSIVE_TOPOLOGY

PREFIX = "rolebasedgroupset.workloads.x-k8s.io"
SET_LABEL, INDEX_LABEL = f"{PREFIX}/name", f"{PREFIX}/rbg-index"


class SetReconciler:
    """See Reconciler."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def reconcile(self, namespace: str, name: str) -> float | None:
        owner = self._cluster.get(GROUP_SET, namespace, name)
        if owner is None or owner["metadata"].get("deletionTimestamp"):
            return None
        groups = {group["metadata"]["name"]: group for group in self._cluster.owned(GROUP, owner["metadata"]["uid"])}
        wanted = {f"{name}-{index}": index for index in range(owner["spec"].get("replicas", 1))}
        for child, index in wanted.items():
            self._cluster.apply(GROUP, child_group(owner, child, index, groups.get(child)))
        for child in sorted(set(groups) - set(wanted), key=_index, reverse=True):
            self._cluster.delete(GROUP, groups[child], "Foreground")
        self._cluster.apply(GROUP_SET, set_status(owner, list(groups.values())), "status")
        return None


def child_group(owner: Json, name: str, index: int, live: Json | None) -> Json:
    """The group `name` of a set. Roles that an adapter scales keep the replicas they have."""
    metadata = owner["metadata"]
    spec = copy.deepcopy(owner["spec"]["template"])
    for field in ("roles", "scalingGroups"):
        current = {each["name"]: each.get("replicas") for each in ((live or {}).get("spec") or {}).get(field) or []}
        for each in spec.get(field) or []:
            if (each.get("scalingAdapter") or {}).get("enable") and current.get(each["name"]) is not None:
                each["replicas"] = current[each["name"]]
    topology = (metadata.get("annotations") or {}).get(EXCLUSIVE_TOPOLOGY)
    owner_reference = {
        "apiVersion": GROUP_SET.api_version,
        "kind": GROUP_SET.kind,
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "metadata": {
            "namespace": metadata["namespace"],
            "name": name,
            "labels": {SET_LABEL: metadata["name"], INDEX_LABEL: str(index)},
            "annotations": {EXCLUSIVE_TOPOLOGY: topology} if topology else {},
            "ownerReferences": [owner_reference],
        },
        "spec": spec,
    }


def set_status(owner: Json, groups: list[Json]) -> Json:
    """The set with its status; the condition's time is kept while it does not change."""
    wanted = owner["spec"].get("replicas", 1)
    ready = sum(is_ready(group) for group in groups)
    good = ready >= wanted and len(groups) == wanted
    old = {each["type"]: each for each in (owner.get("status") or {}).get("conditions") or []}.get("Ready", {})
    state = "True" if good else "False"
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    condition = {
        "type": "Ready",
        "status": state,
        "reason": "AllReplicasReady" if good else "ReplicasNotReady",
        "message": f"{ready} of {wanted} groups are ready",
        "lastTransitionTime": old.get("lastTransitionTime", now) if old.get("status") == state else now,
    }
    metadata = owner["metadata"]
    return {
        "metadata": {"namespace": metadata["namespace"], "name": metadata["name"]},
        "status": {
            "observedGeneration": metadata["generation"],
            "replicas": len(groups),
            "readyReplicas": ready,
            "conditions": [condition],
        },
    }


def is_ready(group: Json) -> bool:
    """Whether the group says so about the spec it has now."""
    status = group.get("status") or {}
    conditions = {each["type"]: each["status"] for each in status.get("conditions") or []}
    return conditions.get("Ready") == "True" and status.get("observedGeneration") == group["metadata"]["generation"]


def _index(name: str) -> int:
    return int(name.rpartition("-")[2])
