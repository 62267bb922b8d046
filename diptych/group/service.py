"""Services: how they are written, and whether a group has what they send connections to. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from diptych.group.checks import LABEL, unknown
from diptych.group.kinds import ObjectMeta
from diptych.group.names import PREFIX
from diptych.group.pod import Port
from diptych.group.reader import Object, Problem, Reading, field_names
from diptych.group.role import Role

NAME_LABEL, ROLE_LABEL = f"{PREFIX}/name", f"{PREFIX}/role"
CONTROLLED = (  # labels that a controller sets: no template has them
    f"{PREFIX}/",
    "apps.kubernetes.io/",
    "statefulset.kubernetes.io/",
    "leaderworkerset.sigs.k8s.io/",
    "controller-revision-hash",
    "pod-template-hash",
)


class ServicePort(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = frozenset({"nodePort", "appProtocol"})

    port: Annotated[int, Meta(ge=1, le=65535)]
    name: str = ""
    protocol: str = "TCP"
    target_port: Port | None = None


class ServiceSpec(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = field_names(
        "type sessionAffinity sessionAffinityConfig externalTrafficPolicy internalTrafficPolicy ipFamilies"
        " ipFamilyPolicy externalIPs externalName loadBalancerIP loadBalancerClass loadBalancerSourceRanges"
        " allocateLoadBalancerNodePorts healthCheckNodePort trafficDistribution clusterIPs"
    )

    ports: tuple[ServicePort, ...] = ()
    selector: dict[str, str] = msgspec.field(default_factory=dict)
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    publish_not_ready_addresses: bool = False


class Service(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = frozenset({"status"})

    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: ServiceSpec

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def headless(self) -> bool:
        return self.spec.cluster_ip == "None"


def read_service(reading: Reading, document: Any) -> Service | None:
    service = reading.read(Service, document)
    if service is None:
        return None
    if service.api_version != "v1":
        reading.problem("apiVersion", f"must be v1, not {service.api_version}")
    if not LABEL.fullmatch(service.name):
        reading.problem("metadata.name", f"{service.name!r} must be lower-case letters, digits and dashes")
    for i, port in enumerate(service.spec.ports):
        if len(service.spec.ports) > 1 and not port.name:
            reading.problem(f"spec.ports[{i}].name", "is required when a Service has several ports")
    return service


def service_problems(service: Service, group: str, roles: Sequence[Role]) -> list[Problem]:
    """Why nothing would answer behind it. `roles`: the group's, resolved.

    A Service that selects none of their pods is wrong only if it names the group: it may be for others.
    """
    chosen = selected(service, group, roles)
    selector = service.spec.selector
    if not chosen and selector.get(NAME_LABEL) == group:
        names = [role.name for role in roles]
        if ROLE_LABEL in selector and selector[ROLE_LABEL] not in names:
            return [unknown("role", selector[ROLE_LABEL], names, f"spec.selector[{ROLE_LABEL}]")]
        return [Problem("spec.selector", f"no pod of {group} has all these labels")]
    if not chosen or any(_gets_more(role) for role in chosen):
        return []
    ports = [port.name for role in chosen for each in role.template.spec.containers for port in each.ports if port.name]
    return [
        unknown("container port", target, ports, f"spec.ports[{i}].targetPort")
        for i, target in enumerate(port.target_port for port in service.spec.ports)
        if isinstance(target, str) and not target.isdigit() and target not in ports
    ]


def selected(service: Service, group: str, roles: Sequence[Role]) -> list[Role]:
    """The roles whose pods it selects, as far as their labels are known; without a selector, none."""
    return [role for role in roles if service.spec.selector and _selects(service.spec.selector, group, role)]


def _selects(selector: Mapping[str, str], group: str, role: Role) -> bool:
    own = {NAME_LABEL: group, ROLE_LABEL: role.name}
    labels = {**role.template.metadata.labels, **own}
    return all(
        labels.get(key) == value
        or (key not in own and _gets_more(role))
        or (key not in labels and key.startswith(CONTROLLED))
        for key, value in selector.items()
    )


def _gets_more(role: Role) -> bool:
    """Whether sidecars or patches may give the pods labels and ports that the role's template has not."""
    return bool(role.engine_runtimes) or role.workload.kind == "LeaderWorkerSet"
