"""The Services of a local group: ports of 127.0.0.1, addresses of their own inside, and the readiness they imply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from diptych.errors import ConfigError
from diptych.group import names
from diptych.group.local.addresses import Slot
from diptych.group.local.forward import Forwarder
from diptych.group.local.launch import Prepared, service_port_key
from diptych.group.local.state import ServiceView
from diptych.group.pod import Container, PodSpec, Port, Probe, TcpSocketAction, port_number
from diptych.group.spec import Role, Service, ServicePort

LOCALHOST = "127.0.0.1"


class OpenPort(msgspec.Struct, frozen=True):
    """One port of one Service, open in two places: for this machine's users, and for the group's pods."""

    service: Service
    port: ServicePort
    outside: Forwarder
    inside: Forwarder


class LocalServices:
    """Forwarders for each port of each Service with a cluster address. A headless Service is names only."""

    def __init__(self, prepared: Prepared, slot: Slot) -> None:
        self._prepared = prepared
        self._slot = slot
        self._open: list[OpenPort] = []
        self.endpoints: dict[str, tuple[str, ...]] = {}

    async def open(self) -> None:
        """Raises ConfigError that tells how to choose another port if one is taken; `close` frees the others."""
        for service in self._prepared.manifest.services:
            if service.headless:
                continue
            for port in service.spec.ports:
                key = service_port_key(service, port)
                outside = Forwarder(LOCALHOST, self._prepared.launch.service_ports.get(key, port.port))
                try:
                    await outside.open()
                except ConfigError as error:
                    raise ConfigError(f"{error.message}; choose another with --service-port {key}=PORT") from None
                inside = Forwarder(self._slot.service_address(service.name), port.port)
                self._open.append(OpenPort(service, port, outside, inside))
                await inside.open()

    async def close(self) -> None:
        for each in self._open:
            await each.outside.close()
            await each.inside.close()

    def set_endpoints(
        self, service: str, pods: Sequence[str], specs: Mapping[str, PodSpec], ips: Mapping[str, str]
    ) -> None:
        """Sends new connections of a Service to these pods; `specs` and `ips` by pod name."""
        self.endpoints[service] = tuple(pods)
        for each in self._open:
            if each.service.name == service:
                targets = []
                for pod in pods:
                    number = target_port(each.port, specs[pod])
                    if number is not None:
                        targets.append((ips[pod], number))
                each.outside.set_targets(targets)
                each.inside.set_targets(targets)

    def host_lines(self) -> list[str]:
        """Lines of the hosts file for Services with an address."""
        return [
            f"{self._slot.service_address(each.name)} {' '.join(names.dns_names(each.name, each.metadata.namespace))}"
            for each in self._prepared.manifest.services
            if not each.headless
        ]

    def views(self) -> tuple[ServiceView, ...]:
        return tuple(
            ServiceView(
                name=each.service.name,
                port_name=each.port.name,
                address=f"{each.outside.host}:{each.outside.port}",
                inside=f"{each.inside.host}:{each.inside.port}",
                pods=self.endpoints.get(each.service.name, ()),
            )
            for each in self._open
        )


def target_port(port: ServicePort, spec: PodSpec) -> int | None:
    """The port of a pod behind a Service's port; None if the pod has none of that name."""
    target: Port = port.port if port.target_port is None else port.target_port
    numbers = (port_number(container, target) for container in spec.containers)
    return next((number for number in numbers if number is not None), None)


def readiness(role: Role, labels: Mapping[str, str], services: Sequence[Service]) -> dict[str, Probe]:
    """Readiness probes by container. One without a probe, behind a Service, is ready when its port takes connections.

    Kubernetes would send it requests as soon as its process runs; see docs/decisions/local-probes.md.
    """
    found = {each.name: each.readiness_probe for each in role.template.spec.containers if each.readiness_probe}
    for service in services:
        selector = service.spec.selector
        if not selector or any(labels.get(key, value) != value for key, value in selector.items()):
            continue
        for port in service.spec.ports:
            number = target_port(port, role.template.spec)
            container = _container_with(number, role.template.spec)
            if number is not None and container.name not in found and not service.spec.publish_not_ready_addresses:
                found[container.name] = Probe(tcp_socket=TcpSocketAction(port=number))
    return found


def _container_with(number: int | None, spec: PodSpec) -> Container:
    """The container that declares the port, else the first."""
    declared = (each for each in spec.containers if number in [port.container_port for port in each.ports])
    return next(declared, spec.containers[0])
