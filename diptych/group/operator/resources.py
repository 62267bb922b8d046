"""The kinds of objects that the operator reads and writes, and where the API server has them."""

from __future__ import annotations

from typing import Any

import msgspec

Json = dict[str, Any]


class Kind(msgspec.Struct, frozen=True):
    """One resource of the Kubernetes API. `group` is empty for the core API."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The URL path; without a namespace all namespaces, without a name the whole collection."""
        parts = ["", "apis" if self.group else "api"]
        parts += [self.group, self.version] if self.group else [self.version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        return "/".join([*parts, self.plural, *filter(None, (name, subresource))])


WORKLOADS = "workloads.x-k8s.io"
GROUP = Kind(WORKLOADS, "v1alpha1", "RoleBasedGroup", "rolebasedgroups")
GROUP_SET = Kind(WORKLOADS, "v1alpha1", "RoleBasedGroupSet", "rolebasedgroupsets")
ADAPTER = Kind(WORKLOADS, "v1alpha1", "RoleBasedGroupScalingAdapter", "rolebasedgroupscalingadapters")
PROFILE = Kind(WORKLOADS, "v1alpha1", "ClusterEngineRuntimeProfile", "clusterengineruntimeprofiles", namespaced=False)
STATEFUL_SET = Kind("apps", "v1", "StatefulSet", "statefulsets")
DEPLOYMENT = Kind("apps", "v1", "Deployment", "deployments")
LEADER_WORKER_SET = Kind("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet", "leaderworkersets")
REVISION = Kind("apps", "v1", "ControllerRevision", "controllerrevisions")
POD = Kind("", "v1", "Pod", "pods")
SERVICE = Kind("", "v1", "Service", "services")
CONFIG_MAP = Kind("", "v1", "ConfigMap", "configmaps")
DISRUPTION_BUDGET = Kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets")
POD_GROUP = Kind("scheduling.x-k8s.io", "v1alpha1", "PodGroup", "podgroups")
VOLCANO_POD_GROUP = Kind("scheduling.volcano.sh", "v1beta1", "PodGroup", "podgroups")
EVENT = Kind("", "v1", "Event", "events")
LEASE = Kind("coordination.k8s.io", "v1", "Lease", "leases")


def key_of(obj: Json) -> tuple[str, str]:
    """(namespace, name); the namespace is empty for objects of the cluster."""
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]
