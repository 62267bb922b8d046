"""The discovery file, /etc/rbg/config.yaml: who belongs to the group, and at which addresses. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from diptych.group import names
from diptych.group.operator.resources import Json


def config_yaml(group: str, roles: Sequence[Json], replicas: Mapping[str, int], services: Mapping[str, str]) -> str:
    """The file's text. `replicas`: how many pods each role has now, by name. `services`: their headless Services, where
    they are not called as ours.

    Addresses are those of pods with names of their own; pods of a Deployment have none and are reached by a Service.
    """
    content = {
        "group": {"name": group, "size": len(roles), "roles": [role["name"] for role in roles]},
        "roles": {role["name"]: _role(group, role, replicas.get(role["name"], 0), services) for role in roles},
    }
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text


def _role(group: str, role: Json, count: int, services: Mapping[str, str]) -> Json:
    ports = {_port_name(port): port["port"] for port in role.get("servicePorts") or []}
    kind = (role.get("workload") or {}).get("kind", "StatefulSet")
    indexes = () if kind == "Deployment" else range(count)
    service = services.get(role["name"]) or names.role_services(group, role["name"])[0]
    instances = [
        {"address": f"{names.pod_name(group, role['name'], index)}.{service}", **({"ports": ports} if ports else {})}
        for index in indexes
    ]
    return {"size": count, "instances": instances}


def _port_name(port: Json) -> str:
    return str(port.get("name") or f"port{port['port']}").lower().replace("-", "_")
