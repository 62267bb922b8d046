"""The manifest: RoleBasedGroup (workloads.x-k8s.io/v1alpha1) and Service, read from YAML.

v0.4 of the API is the primary contract; fields that v0.5 and v0.6 added are accepted. Whatever is wrong is reported at
once, each with the path of its field. Nothing here knows about processes or pods of a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
import yaml
from msgspec import Meta

from diptych.errors import ConfigError
from diptych.group import order
from diptych.group.names import pod_name
from diptych.group.pod import PodTemplate, Port, pod_problems
from diptych.group.reader import Object, Problem, Reading, field_names

API_VERSION = "workloads.x-k8s.io/v1alpha1"
T = TypeVar("T")
RestartPolicy = Literal["None", "RecreateRBGOnPodRestart", "RecreateRoleInstanceOnPodRestart"]
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
WORKLOADS = {"apps/v1/StatefulSet", "apps/v1/Deployment", "leaderworkerset.x-k8s.io/v1/LeaderWorkerSet"}


class ObjectMeta(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = field_names(
        "uid resourceVersion generation creationTimestamp managedFields ownerReferences finalizers generateName"
    )

    name: Annotated[str, Meta(min_length=1)]
    namespace: str = "default"
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class Workload(Object, frozen=True, kw_only=True):
    api_version: str = "apps/v1"
    kind: str = "StatefulSet"


class LeaderWorkerSet(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = frozenset({"patchLeaderTemplate", "patchWorkerTemplate"})

    size: Annotated[int, Meta(ge=1)] = 1


class Role(Object, frozen=True, kw_only=True):
    """One role. `other_fields` matter only to a runner with workload objects (roll-outs, adapters, sidecars)."""

    other_fields: ClassVar[frozenset[str]] = field_names(
        "labels annotations rolloutStrategy servicePorts engineRuntimes scalingAdapter minReadySeconds templateRef"
        " templatePatch components"
    )

    name: Annotated[str, Meta(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$(?!\n)", max_length=63)]
    template: PodTemplate
    replicas: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 1
    dependencies: tuple[str, ...] = ()
    restart_policy: RestartPolicy = "None"
    workload: Workload = Workload()
    leader_worker_set: LeaderWorkerSet | None = None


class GroupSpec(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = frozenset({"podGroupPolicy", "coordination", "roleTemplates"})

    roles: Annotated[tuple[Role, ...], Meta(min_length=1)]


class RoleBasedGroup(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = frozenset({"status"})

    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: GroupSpec

    @property
    def name(self) -> str:
        return self.metadata.name

    def role(self, name: str) -> Role:
        """Raises ConfigError that lists the roles there are."""
        for role in self.spec.roles:
            if role.name == name:
                return role
        raise ConfigError(
            f"group {self.name} has no role {name}; its roles: {', '.join(r.name for r in self.spec.roles)}"
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


class Unmodelled(msgspec.Struct, frozen=True):
    """A field that is accepted and has no place in the structs: `path` is the object's, `value` the manifest's."""

    path: str
    field: str
    value: Any


class Manifest(msgspec.Struct, frozen=True):
    """A file's content: one group, its services, what else it holds (kind, name), and fields outside the model."""

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
    for number, document in enumerate(_documents(text), start=1):
        kind, name = _identity(document)
        reading = Reading("" if kind == "RoleBasedGroup" else f"{kind or 'document'} {name or number}: ")
        if kind == "RoleBasedGroup":
            groups += _read(reading, RoleBasedGroup, document, _check_group)
        elif kind == "Service":
            services += _read(reading, Service, document, _check_service)
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


def _identity(document: Any) -> tuple[str, str]:
    """(kind, name) of a document; kind is empty if this is no Kubernetes object."""
    if not isinstance(document, dict) or not isinstance(document.get("apiVersion"), str):
        return "", ""
    metadata = document.get("metadata")
    name = metadata.get("name", "") if isinstance(metadata, dict) else ""
    return str(document.get("kind") or ""), str(name)


def _read(reading: Reading, kind: type[T], document: Any, check: Callable[[T, Reading], None]) -> list[T]:
    value = reading.read(kind, document)
    if value is None:
        return []
    check(value, reading)
    return [value]


def _check_group(group: RoleBasedGroup, reading: Reading) -> None:
    if group.api_version != API_VERSION:
        reading.problem("apiVersion", f"must be {API_VERSION}, not {group.api_version}")
    if not LABEL.fullmatch(group.name):
        reading.problem("metadata.name", f"{group.name!r} must be lower-case letters, digits and dashes")
    names = [role.name for role in group.spec.roles]
    for i, role in enumerate(group.spec.roles):
        path = f"spec.roles[{i}]"
        if role.name in names[:i]:
            reading.problem(f"{path}.name", f"{role.name} is already used")
        if len(pod_name(group.name, role.name, max(role.replicas - 1, 0))) > 63:
            reading.problem(f"{path}.name", "makes pod names longer than 63 characters; shorten the group or the role")
        for j, dependency in enumerate(role.dependencies):
            if dependency not in names:
                reading.problem(f"{path}.dependencies[{j}]", f"there is no role {dependency}")
        if f"{role.workload.api_version}/{role.workload.kind}" not in WORKLOADS:
            reading.problem(f"{path}.workload", f"must be one of {', '.join(sorted(WORKLOADS))}")
        for below, message in pod_problems(role.template.spec):
            reading.problem(f"{path}.template.spec.{below}", message)
    cycle = order.find_cycle({role.name: role.dependencies for role in group.spec.roles})
    if cycle:
        reading.problem("spec.roles", f"dependencies go in a circle: {' -> '.join(cycle)}")


def _check_service(service: Service, reading: Reading) -> None:
    if service.api_version != "v1":
        reading.problem("apiVersion", f"must be v1, not {service.api_version}")
    if not LABEL.fullmatch(service.name):
        reading.problem("metadata.name", f"{service.name!r} must be lower-case letters, digits and dashes")
    for i, port in enumerate(service.spec.ports):
        if len(service.spec.ports) > 1 and not port.name:
            reading.problem(f"spec.ports[{i}].name", "is required when a Service has several ports")


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice (the second would silently win) and text no process can be given."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            raise yaml.constructor.ConstructorError(
                None, None, "text must not contain a NUL character", node.start_mark
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is written twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _documents(text: str) -> list[Any]:
    try:
        # a SafeLoader: plain data only
        return [each for each in yaml.load_all(text, Loader=_Loader) if each is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"the manifest is no valid YAML: {line}{getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise ConfigError("the manifest is no valid YAML: it is nested too deeply") from None
    except ValueError as error:  # a date or number in form, but not in value
        raise ConfigError(f"the manifest is no valid YAML: {error}") from None


def _at(document: Any, path: str) -> Any:
    """The part of a document at a path such as spec.roles[1].template."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        document = document[name] if name else document[int(index)]
    return document
