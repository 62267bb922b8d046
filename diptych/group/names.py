"""What things are called: pods, services, labels and DNS names, as RoleBasedGroup v0.4 has them. Pure."""

from __future__ import annotations

import hashlib

PREFIX = "rolebasedgroup.workloads.x-k8s.io"
CLUSTER_DOMAIN = "cluster.local"


def pod_name(group: str, role: str, index: int) -> str:
    return f"{group}-{role}-{index}"


def workload_name(group: str, role: str) -> str:
    """The workload object of a role, and with it its Service, its discovery file and its scaling adapter."""
    return f"{group}-{role}"


def child_name(group_set: str, index: int) -> str:
    """One of the groups of a RoleBasedGroupSet."""
    return f"{group_set}-{index}"


def role_services(group: str, role: str) -> tuple[str, str]:
    """The headless Service of a role: its name in v0.3 and v0.4, and in v0.5 and later."""
    return f"{group}-{role}", f"s-{group}-{role}"


def role_labels(namespace: str, group: str, role: str) -> dict[str, str]:
    """Labels that every pod of the role carries; user Services select by the first two."""
    key = hashlib.sha1(f"{namespace}/{group}".encode(), usedforsecurity=False).hexdigest()
    return {f"{PREFIX}/name": group, f"{PREFIX}/role": role, f"{PREFIX}/group-unique-key": key}


def pod_labels(group: str, role: str, index: int) -> dict[str, str]:
    """Labels a StatefulSet adds to one pod."""
    return {
        "apps.kubernetes.io/pod-index": str(index),
        "statefulset.kubernetes.io/pod-name": pod_name(group, role, index),
    }


def dns_names(host: str, namespace: str) -> list[str]:
    """The names a cluster's DNS gives `host` (`service`, or `pod.service`) for clients in the same namespace."""
    return [host, f"{host}.{namespace}", f"{host}.{namespace}.svc", f"{host}.{namespace}.svc.{CLUSTER_DOMAIN}"]
