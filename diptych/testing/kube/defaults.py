"""Defaults of built-in kinds, as kube-apiserver sets them on every write. `obj` is changed in place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from diptych.testing.kube.kinds import Kind
from diptych.testing.kube.status import Obj


def _set(obj: Obj, **values: Any) -> None:
    for name, value in values.items():
        obj.setdefault(name, value)


def _omit_empty(obj: Obj, names: str) -> None:
    """Drops fields that are not stored when they are empty."""
    for name in names.split():
        if name in obj and not obj[name]:
            del obj[name]


def _probe(probe: Obj) -> None:
    _set(probe, timeoutSeconds=1, periodSeconds=10, successThreshold=1, failureThreshold=3)
    if "httpGet" in probe:
        _set(probe["httpGet"], path="/", scheme="HTTP")


def _container(container: Obj) -> None:
    _omit_empty(container, "args command env envFrom ports stdin stdinOnce tty volumeMounts workingDir")
    image = container.get("image", "")
    latest = ":" not in image.rpartition("/")[2] or image.endswith(":latest")
    _set(
        container,
        resources={},
        terminationMessagePath="/dev/termination-log",
        terminationMessagePolicy="File",
        imagePullPolicy="Always" if latest else "IfNotPresent",
    )
    for port in container.get("ports", []):
        _set(port, protocol="TCP")
    for env in container.get("env", []):
        reference = (env.get("valueFrom") or {}).get("fieldRef")
        if reference is not None:
            _set(reference, apiVersion="v1")
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if name in container:
            _probe(container[name])
    for hook in container.get("lifecycle", {}).values():
        if "httpGet" in hook:
            _set(hook["httpGet"], path="/", scheme="HTTP")


def pod_spec(spec: Obj) -> None:
    _omit_empty(spec, "hostIPC hostNetwork hostPID imagePullSecrets initContainers nodeSelector tolerations volumes")
    _set(
        spec,
        restartPolicy="Always",
        dnsPolicy="ClusterFirst",
        schedulerName="default-scheduler",
        terminationGracePeriodSeconds=30,
        securityContext={},
    )
    for container in [*spec.get("containers", []), *spec.get("initContainers", [])]:
        _container(container)
    for volume in spec.get("volumes", []):
        for source in ("configMap", "secret", "downwardAPI", "projected"):
            if source in volume:
                _set(volume[source], defaultMode=420)
        if len(volume) == 1:
            volume["emptyDir"] = {}


def _pod(obj: Obj) -> None:
    spec = obj["spec"]
    pod_spec(spec)
    for container in [*spec.get("containers", []), *spec.get("initContainers", [])]:  # not in templates
        resources = container["resources"]
        for name, value in resources.get("limits", {}).items():
            resources.setdefault("requests", {}).setdefault(name, value)
    _set(
        spec,
        enableServiceLinks=True,
        serviceAccountName="default",
        serviceAccount="default",
        preemptionPolicy="PreemptLowerPriority",
    )
    _set(spec, priority=0)


def _template(spec: Obj) -> None:
    template = spec.setdefault("template", {})
    template.setdefault("metadata", {})
    pod_spec(template.setdefault("spec", {}))


def _stateful_set(obj: Obj) -> None:
    spec = obj["spec"]
    _template(spec)
    _set(spec, replicas=1, podManagementPolicy="OrderedReady", revisionHistoryLimit=10, updateStrategy={})
    _set(spec["updateStrategy"], type="RollingUpdate")
    if spec["updateStrategy"]["type"] == "RollingUpdate":
        _set(spec["updateStrategy"], rollingUpdate={})
        _set(spec["updateStrategy"]["rollingUpdate"], partition=0)
    _set(spec, persistentVolumeClaimRetentionPolicy={"whenDeleted": "Retain", "whenScaled": "Retain"})


def _deployment(obj: Obj) -> None:
    spec = obj["spec"]
    _template(spec)
    _set(spec, replicas=1, revisionHistoryLimit=10, progressDeadlineSeconds=600, strategy={})
    _set(spec["strategy"], type="RollingUpdate")
    if spec["strategy"]["type"] == "RollingUpdate":
        _set(spec["strategy"], rollingUpdate={})
        _set(spec["strategy"]["rollingUpdate"], maxUnavailable="25%", maxSurge="25%")


def _replica_set(obj: Obj) -> None:
    _template(obj["spec"])
    _set(obj["spec"], replicas=1)


def _service(obj: Obj) -> None:
    spec = obj["spec"]
    _set(spec, type="ClusterIP", sessionAffinity="None", internalTrafficPolicy="Cluster")
    if spec["type"] != "ExternalName":
        if "clusterIP" not in spec:
            spec["clusterIP"] = service_address(obj)
        _set(spec, clusterIPs=[spec["clusterIP"]], ipFamilies=["IPv4"], ipFamilyPolicy="SingleStack")
    for port in spec.get("ports", []):
        _set(port, protocol="TCP", targetPort=port.get("port"))


def service_address(obj: Obj) -> str:
    """A cluster IP that depends on the name alone, so that a dry run and the write agree."""
    name = json.dumps([obj["metadata"].get("namespace"), obj["metadata"]["name"]]).encode()
    digest = hashlib.sha256(name).digest()
    return f"10.{96 + digest[0] % 16}.{digest[1]}.{1 + digest[2] % 254}"


def _lws(obj: Obj) -> None:
    spec = obj["spec"]
    _set(
        spec, replicas=1, startupPolicy="LeaderCreated", rolloutStrategy={}, networkConfig={"subdomainPolicy": "Shared"}
    )
    _set(spec["rolloutStrategy"], type="RollingUpdate")
    _set(spec["rolloutStrategy"], rollingUpdateConfiguration={})
    _set(spec["rolloutStrategy"]["rollingUpdateConfiguration"], maxUnavailable=1, maxSurge=0, partition=0)
    _set(spec.setdefault("leaderWorkerTemplate", {}), size=1, restartPolicy="RecreateGroupOnPodRestart")


def _namespace(obj: Obj) -> None:
    obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"]["name"]
    obj.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])
    obj.setdefault("status", {}).setdefault("phase", "Active")


def _crd(obj: Obj) -> None:
    names = obj["spec"]["names"]
    _set(names, singular=names["kind"].lower(), listKind=names["kind"] + "List")
    _set(obj["spec"], conversion={"strategy": "None"})


_DEFAULTS: dict[tuple[str, str], Callable[[Obj], None]] = {
    ("", "Pod"): _pod,
    ("", "Service"): _service,
    ("", "Namespace"): _namespace,
    ("apps", "StatefulSet"): _stateful_set,
    ("apps", "Deployment"): _deployment,
    ("apps", "ReplicaSet"): _replica_set,
    ("leaderworkerset.x-k8s.io", "LeaderWorkerSet"): _lws,
    ("apiextensions.k8s.io", "CustomResourceDefinition"): _crd,
}


def set_defaults(kind: Kind, obj: Obj, gates: frozenset[str]) -> None:
    """Fills in what the client left out. Drops fields whose feature gate is off, silently, as the real server does."""
    defaults = _DEFAULTS.get((kind.group, kind.name))
    if defaults is None:
        return
    if kind.name != "Namespace":
        obj.setdefault("spec", {})
    defaults(obj)
    if kind.name == "StatefulSet":
        rolling = obj["spec"]["updateStrategy"].get("rollingUpdate") or {}
        if "MaxUnavailableStatefulSet" not in gates:
            rolling.pop("maxUnavailable", None)
        elif rolling:
            _set(rolling, maxUnavailable=1)


def first_status(kind: Kind) -> Obj | None:
    """The status that a built-in object comes into being with."""
    statuses: dict[tuple[str, str], Obj] = {
        ("", "Pod"): {"phase": "Pending", "qosClass": "BestEffort"},
        ("", "Service"): {"loadBalancer": {}},
        ("", "PersistentVolumeClaim"): {"phase": "Pending"},
        ("apps", "StatefulSet"): {"replicas": 0, "availableReplicas": 0},
        ("apps", "ReplicaSet"): {"replicas": 0},
        ("apps", "Deployment"): {},
        ("policy", "PodDisruptionBudget"): {
            "currentHealthy": 0,
            "desiredHealthy": 0,
            "disruptionsAllowed": 0,
            "expectedPods": 0,
        },
    }
    return statuses.get((kind.group, kind.name))
