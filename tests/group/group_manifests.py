"""Small manifests for the tests of group/, and the program their pods run."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path
from typing import Any

import yaml

TOY = Path(__file__).with_name("toy_pod.py")
EXAMPLES = Path(__file__).parents[2] / "examples"
PORT = 8000
POD_IP = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}


def toy(*arguments: str) -> list[str]:
    """A command that serves HTTP on the pod's own address; see toy_pod.py."""
    return ["python3", str(TOY), "--host", "$(POD_IP)", "--port", str(PORT), *arguments]


def shell(script: str) -> list[str]:
    return ["sh", "-c", textwrap.dedent(script).strip()]


def python(code: str) -> list[str]:
    return ["python3", "-S", "-c", textwrap.dedent(code).strip()]


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def role(name: str, command: list[str], *, probe: bool = True, grace_s: int = 5, **fields: Any) -> dict[str, Any]:
    """A role of one container. Role fields by their YAML names; `container` and `pod` add to those objects."""
    container: dict[str, Any] = {"name": name, "command": command, "env": [POD_IP, *fields.pop("env", [])]}
    if probe:
        container["readinessProbe"] = {"tcpSocket": {"port": PORT}, "initialDelaySeconds": 30}
    container |= fields.pop("container", {})
    spec = {"containers": [container], "terminationGracePeriodSeconds": grace_s, **fields.pop("pod", {})}
    return {"name": name, "template": {"spec": spec}, **fields}


def group(*roles: dict[str, Any], name: str = "toy", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "workloads.x-k8s.io/v1alpha1",
        "kind": "RoleBasedGroup",
        "metadata": {"name": name},
        "spec": {"roles": list(roles), **spec},
    }


def service(role_name: str, port: int = 80, target: int | str = PORT, name: str = "toy") -> dict[str, Any]:
    prefix = "rolebasedgroup.workloads.x-k8s.io"
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "ports": [{"name": "http", "port": port, "targetPort": target}],
            "selector": {f"{prefix}/name": "toy", f"{prefix}/role": role_name},
        },
    }


def text(*documents: dict[str, Any]) -> str:
    return yaml.safe_dump_all(documents)
