"""A manifest for one machine: one RoleBasedGroup and its Services, read from YAML.

Whatever is wrong is reported at once, each with the path of its field. The group comes back resolved: every role has
its template and its replicas. Nothing here knows about processes or pods of a cluster.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from diptych.errors import ConfigError
from diptych.group.checks import LABEL, MAX_LABEL, group_problems, resolved_problems
from diptych.group.documents import documents, identity
from diptych.group.kinds import API_VERSION, ObjectMeta, RoleBasedGroup
from diptych.group.names import pod_name
from diptych.group.pod import Port, mount_problems
from diptych.group.reader import Object, Problem, Reading, field_names
from diptych.group.resolve import resolve_spec
from diptych.group.role import Role as Role


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


class Unmodelled(msgspec.Struct, frozen=True):
    """A field that is accepted and means nothing on one machine: `path` is the object's, `value` the manifest's."""

    path: str
    field: str
    value: Any


class Manifest(msgspec.Struct, frozen=True):
    """A file's content: one group, its services, what else it holds (kind, name), and fields without effect here."""

    group: RoleBasedGroup
    services: tuple[Service, ...]
    other_objects: tuple[tuple[str, str], ...]
    unmodelled: tuple[Unmodelled, ...]


def parse(text: str) -> Manifest:
    """Raises ConfigError with one line a mistake."""
    problems: list[Problem] = []
    groups: list[RoleBasedGroup] = []
    services: list[Service] = []
    others: list[tuple[str, str]] = []
    unmodelled: list[Unmodelled] = []
    for number, document in enumerate(documents(text), start=1):
        kind, name = identity(document)
        reading = Reading("" if kind == "RoleBasedGroup" else f"{kind or 'document'} {name or number}: ")
        if kind == "RoleBasedGroup":
            group, document = read_group(reading, document)
            groups += [] if group is None else [group]
        elif kind == "Service":
            service = read_service(reading, document)
            services += [] if service is None else [service]
        elif kind:
            others.append((kind, name))
        else:
            reading.problem("", "needs apiVersion and kind")
        problems += reading.problems
        unmodelled += [Unmodelled(path, field, _at(document, path)[field]) for path, field in reading.unmodelled]
    if not problems and len(groups) != 1:
        problems.append(Problem("", f"needs exactly one RoleBasedGroup, has {len(groups)}"))
    if problems:
        raise ConfigError("the manifest is wrong:\n" + "\n".join(f"  {each}" for each in problems))
    return Manifest(groups[0], tuple(services), tuple(others), tuple(unmodelled))


def read_group(reading: Reading, document: Any) -> tuple[RoleBasedGroup | None, Any]:
    """(the resolved group or None, the resolved document); mistakes go to the reading."""
    group = reading.read(RoleBasedGroup, document)
    if group is None:
        return None, document
    before = len(reading.problems)
    if group.api_version != API_VERSION:
        reading.problem("apiVersion", f"must be {API_VERSION}, not {group.api_version}")
    if not LABEL.fullmatch(group.name):
        reading.problem("metadata.name", f"{group.name!r} must be lower-case letters, digits and dashes")
    for i, role in enumerate(group.spec.roles):
        if len(pod_name(group.name, role.name, max(role.replicas - 1, 0))) > MAX_LABEL:
            reading.problem(
                f"spec.roles[{i}].name", "makes pod names longer than 63 characters; shorten the group or the role"
            )
    reading.add(group_problems(group.spec) or resolved_problems(document["spec"]))
    if len(reading.problems) > before:
        return None, document
    document = {**document, "spec": resolve_spec(document["spec"])}
    reading.unmodelled.clear()
    resolved = reading.read(RoleBasedGroup, document)
    for i, role in enumerate(resolved.spec.roles if resolved else ()):
        for below, message in mount_problems(role.template.spec):  # sidecars and their volumes are not injected here
            reading.problem(f"spec.roles[{i}].template.spec.{below}", message)
    return resolved, document


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


def _at(document: Any, path: str) -> Any:
    """The part of a document at a path such as spec.roles[1].template."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        document = document[name] if name else document[int(index)]
    return document
