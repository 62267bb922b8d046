"""The objects of a group, as they are applied: exactly the fields that are ours. Pure.

Every object has the group as its controller, so that deleting the group deletes all, and the group's labels, so that
the objects of a role that was removed can be found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diptych.group import names
from diptych.group.actions import Kind as WorkloadKind
from diptych.group.actions import Target
from diptych.group.operator.resources import GROUP, POD_GROUP, VOLCANO_POD_GROUP, Json, Kind

# A merge patch; a StatefulSet with OnDelete must not have a rollingUpdate.
ON_DELETE: Json = {"spec": {"updateStrategy": {"type": "OnDelete", "rollingUpdate": None}}}
ROLE_SIZE = f"{names.PREFIX}/role-size"
DEFAULT_SCHEDULE_TIMEOUT_S = 60


def owner(group: Json) -> Json:
    metadata = group["metadata"]
    return {
        "apiVersion": GROUP.api_version,
        "kind": GROUP.kind,
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def labels_of(group: Json, role: str) -> dict[str, str]:
    return names.role_labels(group["metadata"]["namespace"], group["metadata"]["name"], role)


def object_name(group: Json, role: str) -> str:
    """What the workload, the headless Service, the disruption budget and the adapter of a role are called."""
    return f"{group['metadata']['name']}-{role}"


def metadata(group: Json, role: str, name: str, **more: Any) -> Json:
    """Of an object of `role`; with an empty role, of the group as a whole."""
    labels = labels_of(group, role)
    if not role:
        del labels[f"{names.PREFIX}/role"]
    own = more.pop("labels", None) or {}
    return {
        "namespace": group["metadata"]["namespace"],
        "name": name,
        "labels": {**own, **labels},
        "ownerReferences": [owner(group)],
        **more,
    }


def _workload_metadata(group: Json, role: Json, replicas: int) -> Json:
    annotations = {**(role.get("annotations") or {}), ROLE_SIZE: str(replicas)}
    name = object_name(group, role["name"])
    return metadata(group, role["name"], name, labels=role.get("labels"), annotations=annotations)


def stateful_set(group: Json, role: Json, template: Json, target: Target) -> Json:
    service = names.role_services(group["metadata"]["name"], role["name"])[0]
    spec = {
        **_stateful_target(target),
        "serviceName": service,
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": labels_of(group, role["name"])},
        "template": template,
    }
    if role.get("minReadySeconds"):
        spec["minReadySeconds"] = role["minReadySeconds"]
    return {"metadata": _workload_metadata(group, role, target.replicas), "spec": spec}


def deployment(group: Json, role: Json, template: Json, target: Target) -> Json:
    spec: Json = {
        **_deployment_target(target),
        "selector": {"matchLabels": labels_of(group, role["name"])},
        "template": template,
    }
    rolling = _rolling(role)
    limits = {field: rolling[field] for field in ("maxUnavailable", "maxSurge") if field in rolling}
    if limits:
        spec["strategy"] = {"type": "RollingUpdate", "rollingUpdate": limits}
    if role.get("minReadySeconds"):
        spec["minReadySeconds"] = role["minReadySeconds"]
    return {"metadata": _workload_metadata(group, role, target.replicas), "spec": spec}


def leader_worker_set(group: Json, role: Json, leader: Json, worker: Json, target: Target) -> Json:
    """`leader` and `worker` are pod templates with their patches applied."""
    spec: Json = {
        "replicas": target.replicas,
        "leaderWorkerTemplate": {
            "size": (role.get("leaderWorkerSet") or {}).get("size", 1),
            "restartPolicy": "None" if role.get("restartPolicy") == "None" else "RecreateGroupOnPodRestart",
            "leaderTemplate": leader,
            "workerTemplate": worker,
        },
    }
    rolling = _rolling(role)
    limits: Json = {field: rolling[field] for field in ("maxUnavailable", "maxSurge") if field in rolling}
    config = {"partition": target.partition, **limits}
    spec["rolloutStrategy"] = {"type": "RollingUpdate", "rollingUpdateConfiguration": config}
    return {"metadata": _workload_metadata(group, role, target.replicas), "spec": spec}


def retarget(kind: WorkloadKind, target: Target, annotations: Mapping[str, str]) -> Json:
    """A merge patch that changes what the plan decides and leaves the pod template alone."""
    spec: Json
    if kind == "StatefulSet":
        spec = _stateful_target(target) | (ON_DELETE["spec"] if target.on_delete else {})
    elif kind == "Deployment":
        spec = _deployment_target(target)
    else:
        config = {"rollingUpdateConfiguration": {"partition": target.partition}}
        spec = {"replicas": target.replicas, "rolloutStrategy": config}
    return {"metadata": {"annotations": {ROLE_SIZE: str(target.replicas), **annotations}}, "spec": spec}


def has_rolling_update(workload: Json) -> bool:
    return bool((workload["spec"].get("updateStrategy") or {}).get("rollingUpdate"))


def _stateful_target(target: Target) -> Json:
    if target.on_delete:
        return {"replicas": target.replicas, "updateStrategy": {"type": "OnDelete"}}
    rolling = {"partition": target.partition}
    return {"replicas": target.replicas, "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": rolling}}


def _deployment_target(target: Target) -> Json:
    return {"replicas": target.replicas, "paused": target.partition > 0}


def _rolling(role: Json) -> Json:
    rolling: Json = (role.get("rolloutStrategy") or {}).get("rollingUpdate") or {}
    return rolling


def headless_service(group: Json, role: Json) -> Json:
    """Gives each pod a name before it is ready: servers of a group find one another while they start."""
    name = names.role_services(group["metadata"]["name"], role["name"])[0]
    labels = labels_of(group, role["name"])
    selector = {key: labels[key] for key in (f"{names.PREFIX}/name", f"{names.PREFIX}/role")}
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector}
    return {"metadata": metadata(group, role["name"], name), "spec": spec}


def config_map(group: Json, name: str, text: str) -> Json:
    """The discovery file of all roles. (v0.4 writes the same text once a role.)"""
    return {"metadata": metadata(group, "", name), "data": {"config.yaml": text}}


def disruption_budget(group: Json, role: Json) -> Json | None:
    """None if the role has none."""
    budget = role.get("podDisruptionBudget")
    if not budget:
        return None
    limits = {field: budget[field] for field in ("minAvailable", "maxUnavailable") if field in budget}
    spec = {"selector": {"matchLabels": labels_of(group, role["name"])}, **limits}
    return {"metadata": metadata(group, role["name"], object_name(group, role["name"])), "spec": spec}


def scaled(group: Json) -> list[str]:
    """The roles and scaling groups that have an adapter."""
    spec = group["spec"]
    each = [*spec["roles"], *(spec.get("scalingGroups") or [])]
    return [one["name"] for one in each if (one.get("scalingAdapter") or {}).get("enable")]


def adapter(group: Json, role: str) -> Json:
    """The scaling adapter of a role or scaling group, without replicas: those belong to whoever scales it."""
    target = {"name": group["metadata"]["name"], "role": role}
    return {"metadata": metadata(group, role, object_name(group, role)), "spec": {"scaleTargetRef": target}}


def gang_of(group: Json) -> str:
    """Which scheduler's PodGroup the group wants: "scheduler-plugins", "volcano", or ""."""
    policy = group["spec"].get("podGroupPolicy") or {}
    if policy.get("kubeScheduling") is not None:
        return "scheduler-plugins"
    return "volcano" if policy.get("volcanoScheduling") is not None else ""


def pod_group(group: Json, min_member: int) -> tuple[Kind, Json] | None:
    """The PodGroup that lets `min_member` pods start together; None if the group wants none."""
    policy = group["spec"].get("podGroupPolicy") or {}
    data = metadata(group, "", group["metadata"]["name"])
    if gang_of(group) == "scheduler-plugins":
        timeout = policy["kubeScheduling"].get("scheduleTimeoutSeconds", DEFAULT_SCHEDULE_TIMEOUT_S)
        return POD_GROUP, {"metadata": data, "spec": {"minMember": min_member, "scheduleTimeoutSeconds": timeout}}
    if gang_of(group) == "volcano":
        settings = policy["volcanoScheduling"]
        more = {field: settings[field] for field in ("queue", "priorityClassName") if settings.get(field)}
        return VOLCANO_POD_GROUP, {"metadata": data, "spec": {"minMember": min_member, **more}}
    return None
