"""The pod template of a role: the part of Kubernetes' PodTemplateSpec that decides how a program runs.

Fields that Kubernetes knows and that do not matter to a process on one machine are listed by name (`other_fields`):
they are accepted, reported by the local runner, and passed on unchanged by a runner that has pods.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from diptych.group.reader import Object, field_names, keyed

Quantity = int | float | str
Port = int | str  # a number, or the name of a container port
Seconds = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
EnvName = Annotated[str, Meta(pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$(?!\n)")]  # `$` alone lets a last line end pass
PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")  # RFC 6335
MountPath = Annotated[str, Meta(min_length=1, pattern="^[^:]*$")]


class FieldRef(Object, frozen=True, kw_only=True):
    field_path: str
    api_version: str = "v1"


class EnvSource(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = field_names("configMapKeyRef secretKeyRef resourceFieldRef fileKeyRef")

    field_ref: FieldRef | None = None


class EnvVar(Object, frozen=True, kw_only=True):
    name: EnvName
    value: str | None = None
    value_from: EnvSource | None = None


class ContainerPort(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = field_names("hostPort hostIP")

    container_port: Annotated[int, Meta(ge=1, le=65535)]
    name: str = ""
    protocol: str = "TCP"


class ExecAction(Object, frozen=True, kw_only=True):
    command: Annotated[tuple[str, ...], Meta(min_length=1)]


class TcpSocketAction(Object, frozen=True, kw_only=True):
    port: Port
    host: str = ""


class HttpHeader(Object, frozen=True, kw_only=True):
    name: str
    value: str


class HttpGetAction(Object, frozen=True, kw_only=True):
    port: Port
    path: str = "/"
    host: str = ""
    scheme: str = "HTTP"
    http_headers: tuple[HttpHeader, ...] = ()


class Probe(Object, frozen=True, kw_only=True):
    """How a container's health is asked for; defaults are Kubernetes'. At most one action is set (`pod_problems`)."""

    other_fields: ClassVar[frozenset[str]] = field_names("grpc terminationGracePeriodSeconds")

    exec: ExecAction | None = None
    tcp_socket: TcpSocketAction | None = None
    http_get: HttpGetAction | None = None
    initial_delay_seconds: Seconds = 0
    timeout_seconds: Positive = 1
    period_seconds: Positive = 10
    success_threshold: Positive = 1
    failure_threshold: Positive = 3

    @property
    def actions(self) -> tuple[ExecAction | TcpSocketAction | HttpGetAction, ...]:
        return tuple(each for each in (self.exec, self.tcp_socket, self.http_get) if each is not None)


class Resources(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = field_names("claims")

    limits: dict[str, Quantity] = msgspec.field(default_factory=dict)
    requests: dict[str, Quantity] = msgspec.field(default_factory=dict)


class VolumeMount(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = field_names("mountPropagation recursiveReadOnly")

    name: str
    mount_path: MountPath
    sub_path: str = ""
    sub_path_expr: str = ""
    read_only: bool = False


class Container(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = field_names(
        "image imagePullPolicy envFrom lifecycle resizePolicy restartPolicy restartPolicyRules securityContext stdin"
        " stdinOnce terminationMessagePath terminationMessagePolicy tty volumeDevices"
    )
    outline: ClassVar[frozenset[str] | None] = field_names("name")

    name: Annotated[str, Meta(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$(?!\n)", max_length=63)]
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    env: tuple[EnvVar, ...] = ()
    ports: tuple[ContainerPort, ...] = ()
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None
    startup_probe: Probe | None = None
    resources: Resources = Resources()
    volume_mounts: tuple[VolumeMount, ...] = ()


class ClaimVolume(Object, frozen=True, kw_only=True):
    claim_name: str
    read_only: bool = False


class EmptyDirVolume(Object, frozen=True, kw_only=True):
    medium: str = ""
    size_limit: Quantity | None = None


class Volume(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = field_names(
        "hostPath configMap secret projected downwardAPI csi ephemeral nfs iscsi image fc flexVolume rbd cephfs"
        " glusterfs awsElasticBlockStore gcePersistentDisk azureDisk azureFile"
    )
    outline: ClassVar[frozenset[str] | None] = field_names("name")

    name: str
    persistent_volume_claim: ClaimVolume | None = None
    empty_dir: EmptyDirVolume | None = None


class PodSpec(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = field_names(
        "activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig dnsPolicy enableServiceLinks"
        " ephemeralContainers hostAliases hostIPC hostNetwork hostPID hostUsers hostname hostnameOverride"
        " imagePullSecrets initContainers nodeName nodeSelector os overhead preemptionPolicy priority"
        " priorityClassName readinessGates resourceClaims resources restartPolicy runtimeClassName schedulerName"
        " schedulingGates securityContext serviceAccount serviceAccountName setHostnameAsFQDN shareProcessNamespace"
        " subdomain tolerations topologySpreadConstraints"
    )
    outline: ClassVar[frozenset[str] | None] = field_names("containers volumes")

    containers: Annotated[tuple[Container, ...], Meta(min_length=1), keyed("name")]
    volumes: Annotated[tuple[Volume, ...], keyed("name")] = ()
    termination_grace_period_seconds: Seconds = 30


class TemplateMeta(Object, frozen=True, kw_only=True):
    other_fields: ClassVar[frozenset[str]] = field_names("name generateName namespace creationTimestamp finalizers")
    outline: ClassVar[frozenset[str] | None] = field_names("labels annotations")

    labels: dict[str, str] = msgspec.field(default_factory=dict)
    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class PodTemplate(Object, frozen=True, kw_only=True):
    outline: ClassVar[frozenset[str] | None] = field_names("metadata spec")

    spec: PodSpec
    metadata: TemplateMeta = TemplateMeta()


def pod_problems(spec: PodSpec) -> list[tuple[str, str]]:
    """What the types cannot say: (path below the pod spec, message)."""
    problems: list[tuple[str, str]] = []
    for i, container in enumerate(spec.containers):
        path = f"containers[{i}]"
        for j, mount in enumerate(container.volume_mounts):
            if ".." in mount.sub_path.split("/") or mount.sub_path.startswith("/"):
                problems.append((f"{path}.volumeMounts[{j}].subPath", "must be relative and must not contain .."))
            if mount.mount_path in [each.mount_path for each in container.volume_mounts[:j]]:
                problems.append((f"{path}.volumeMounts[{j}].mountPath", f"{mount.mount_path} is already mounted"))
        for j, variable in enumerate(container.env):
            if variable.value is not None and variable.value_from is not None:
                problems.append((f"{path}.env[{j}]", "value and valueFrom exclude each other"))
        problems += _port_problems(container, path)
        problems += _probe_problems(container, path)
    return problems


def mount_problems(spec: PodSpec) -> list[tuple[str, str]]:
    """Mounts of volumes that the pod does not have; a pod that gets sidecars may get their volumes too."""
    volumes = {each.name for each in spec.volumes}
    return [
        (f"containers[{i}].volumeMounts[{j}].name", f"no volume is called {mount.name}")
        for i, container in enumerate(spec.containers)
        for j, mount in enumerate(container.volume_mounts)
        if mount.name not in volumes
    ]


def _port_problems(container: Container, path: str) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    names = [port.name for port in container.ports]
    for i, name in enumerate(names):
        where = f"{path}.ports[{i}].name"
        if name and not PORT_NAME.fullmatch(name):
            problems.append((where, f"{name!r} must be up to 15 lower-case letters, digits and single dashes"))
        if name and name in names[:i]:
            problems.append((where, f"{name} is already used"))
    numbers = [(port.container_port, port.protocol) for port in container.ports]
    for i, (number, protocol) in enumerate(numbers):
        if (number, protocol) in numbers[:i]:  # server-side apply refuses it
            problems.append((f"{path}.ports[{i}].containerPort", f"{number}/{protocol} is already listed"))
    return problems


def _probe_problems(container: Container, path: str) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    names = {port.name for port in container.ports if port.name}
    for field, probe in probes(container).items():
        where = f"{path}.{field}"
        if len(probe.actions) > 1:
            problems.append((where, "only one of exec, tcpSocket and httpGet may be set"))
        if field != "readinessProbe" and probe.success_threshold != 1:
            problems.append((f"{where}.successThreshold", "must be 1 here"))
        for action in probe.actions:
            port = getattr(action, "port", None)
            if isinstance(port, str) and not port.isdigit() and port not in names:
                problems.append((where, f"no port of the container is called {port}"))
            if isinstance(port, int) and not 1 <= port <= 65535:
                problems.append((where, f"port {port} is outside 1-65535"))
    return problems


def probes(container: Container) -> dict[str, Probe]:
    """The container's probes by field name."""
    found = {
        "startupProbe": container.startup_probe,
        "readinessProbe": container.readiness_probe,
        "livenessProbe": container.liveness_probe,
    }
    return {name: probe for name, probe in found.items() if probe is not None}


def port_number(container: Container, port: Port) -> int | None:
    """The number of a port given by number or name; None if this container has no port of that name."""
    if isinstance(port, int) or port.isdigit():
        return int(port)
    return next((each.container_port for each in container.ports if each.name == port), None)


def gpus_wanted(spec: PodSpec) -> int:
    """nvidia.com/gpu of all containers; a limit counts as a request, as on Kubernetes."""
    return sum(
        int(each.resources.requests.get("nvidia.com/gpu", each.resources.limits.get("nvidia.com/gpu", 0)))
        for each in spec.containers
    )
