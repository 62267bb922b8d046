"""What a pod template says beyond the defaults of the API server. Pure, on plain objects.

The table is what kube-apiserver 1.36 makes of a template in a StatefulSet or a Deployment: fields that it fills in, and
those that it drops because they are empty. A template with and without them is stored as the same object, so no
workload's controller sees a difference. (Not so in a LeaderWorkerSet: its template is stored as it was written.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HTTP = {"path": "/", "scheme": "HTTP", "host": ""}
_PROBE = {"initialDelaySeconds": 0, "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1}
_PROBE |= {"failureThreshold": 3}
_CONTAINER: dict[str, dict[str, Any]] = {
    "": {
        "resources": {},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "workingDir": "",
        "stdin": False,
        "stdinOnce": False,
        "tty": False,
    },
    ".ports": {"protocol": "TCP", "name": "", "hostPort": 0, "hostIP": ""},
    ".env": {"value": ""},
    ".env.valueFrom.fieldRef": {"apiVersion": "v1"},
    ".env.valueFrom.resourceFieldRef": {"divisor": "0", "containerName": ""},
    ".resources": {"limits": {}, "requests": {}},
    ".volumeMounts": {"readOnly": False, "subPath": "", "subPathExpr": ""},
    **{f".lifecycle.{hook}.httpGet": _HTTP for hook in ("preStop", "postStart")},
}
for _name in ("livenessProbe", "readinessProbe", "startupProbe"):
    _CONTAINER[f".{_name}"] = _PROBE
    _CONTAINER[f".{_name}.httpGet"] = _HTTP
    _CONTAINER[f".{_name}.tcpSocket"] = {"host": ""}
    _CONTAINER[f".{_name}.grpc"] = {"service": ""}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {"metadata": {}},
    "metadata": {"labels": {}, "annotations": {}},
    "spec": {
        "restartPolicy": "Always",
        "dnsPolicy": "ClusterFirst",
        "schedulerName": "default-scheduler",
        "terminationGracePeriodSeconds": 30,
        "securityContext": {},
        "nodeSelector": {},
        "hostNetwork": False,
        "hostPID": False,
        "hostIPC": False,
    },
    "spec.volumes": {"emptyDir": {}},
    "spec.volumes.emptyDir": {"medium": ""},
    "spec.volumes.hostPath": {"type": ""},
    "spec.volumes.persistentVolumeClaim": {"readOnly": False},
    "spec.volumes.projected.sources.serviceAccountToken": {"expirationSeconds": 3600},
    "spec.volumes.projected.sources.downwardAPI.items.fieldRef": {"apiVersion": "v1"},
    "spec.volumes.downwardAPI.items.fieldRef": {"apiVersion": "v1"},
    "spec.volumes.ephemeral.volumeClaimTemplate": {"metadata": {}},
    "spec.volumes.ephemeral.volumeClaimTemplate.spec": {"volumeMode": "Filesystem"},
    **{
        f"spec.volumes.{source}": {"defaultMode": 420} for source in ("configMap", "secret", "projected", "downwardAPI")
    },
    **{
        f"spec.{containers}{path}": fields
        for containers in ("containers", "initContainers")
        for path, fields in _CONTAINER.items()
    },
}


def without_defaults(template: Mapping[str, Any]) -> dict[str, Any]:
    """The pod template without fields that say no more than their default; `template` does not change."""
    said: dict[str, Any] = _said(template, "")
    return said


def _said(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_said(each, path) for each in value]
    if not isinstance(value, Mapping):
        return value
    defaults = _DEFAULTS.get(path, {})
    if path in ("spec.containers", "spec.initContainers"):
        defaults = {**defaults, "imagePullPolicy": _pull_policy(str(value.get("image") or ""))}
    said = {name: _said(each, f"{path}.{name}" if path else name) for name, each in value.items()}
    return {
        name: each
        for name, each in said.items()
        if each is not None and each != [] and not (name in defaults and each == defaults[name])
    }


def _pull_policy(image: str) -> str:
    name, _, digest = image.rpartition("/")[2].partition("@")
    tag = name.partition(":")[2] or ("" if digest else "latest")
    return "Always" if tag == "latest" else "IfNotPresent"
