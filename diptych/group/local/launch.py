"""From a manifest and the command line to what the supervisor needs. Everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from diptych.errors import ConfigError
from diptych.group import spec
from diptych.group.actions import Backoff, Desired
from diptych.group.desired import desired_group, template_revision
from diptych.group.local import limits
from diptych.group.local.gpus import find_gpus
from diptych.group.local.probes import Probing


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """A run as asked for. Plain data, so that a detached supervisor gets it through a file.

    `claims`: folders by claim name, absolute. `service_ports`: ports on 127.0.0.1 by "service" or "service:port name";
    0 lets the kernel choose. `cwd`: where pods without a workingDir start.
    """

    manifest: str
    source: str
    cwd: str
    claims: dict[str, str] = {}
    service_ports: dict[str, int] = {}
    backoff: Backoff = Backoff()
    probing: Probing = Probing()


class Prepared(msgspec.Struct, frozen=True):
    """A launch that can run. `notes`: what the local run leaves out, one line each."""

    launch: Launch
    manifest: spec.Manifest
    desired: Desired
    gpus: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def group(self) -> str:
        return self.manifest.group.name


def read_launch(
    file: str, claims: Sequence[str] = (), service_ports: Sequence[str] = (), backoff: Backoff | None = None
) -> Launch:
    """A launch from what was typed. Raises ConfigError for an unreadable file or a malformed option."""
    try:
        text = Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    return Launch(
        manifest=text,
        source=str(Path(file).absolute()),
        cwd=str(Path.cwd()),
        claims={name: _folder(name, value) for name, value in _pairs("--claim", "NAME=DIR", claims)},
        service_ports={
            name: _port(name, value) for name, value in _pairs("--service-port", "NAME=PORT", service_ports)
        },
        backoff=backoff or Backoff(),
    )


def prepare(launch: Launch) -> Prepared:
    """Raises ConfigError for whatever is wrong with the manifest or cannot run on this machine."""
    manifest = spec.parse(launch.manifest)
    gpus = tuple(find_gpus())
    limits.refuse(manifest, launch.claims, len(gpus))
    _check_service_ports(manifest, launch.service_ports)
    revisions = {role.name: template_revision(role.template) for role in manifest.group.spec.roles}
    desired = desired_group(manifest.group, revisions, launch.backoff)
    roles = tuple(msgspec.structs.replace(role, kind="StatefulSet") for role in desired.roles)  # all are run alike
    desired = msgspec.structs.replace(desired, roles=roles)
    return Prepared(launch, manifest, desired, gpus, tuple(limits.notes(manifest, launch.claims, len(gpus))))


def with_claims(launch: Launch, known: Mapping[str, str]) -> Launch:
    """The launch with the folders of `known` for those claims of its volumes that it gives none. Raises ConfigError."""
    roles = spec.parse(launch.manifest).group.spec.roles
    kept = {name: known[name] for role in roles for name in limits.claimed(role) if name in known}
    return msgspec.structs.replace(launch, claims=kept | launch.claims)


def service_port_key(service: spec.Service, port: spec.ServicePort) -> str:
    """How --service-port names this port."""
    return service.name if len(service.spec.ports) == 1 else f"{service.name}:{port.name}"


def _check_service_ports(manifest: spec.Manifest, chosen: Mapping[str, int]) -> None:
    known = [
        service_port_key(each, port) for each in manifest.services for port in each.spec.ports if not each.headless
    ]
    for name in chosen:
        if name not in known:
            raise ConfigError(f"--service-port {name}: no such service; there is: {', '.join(known) or 'none'}")


def _pairs(option: str, form: str, values: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for value in values:
        name, equals, rest = value.partition("=")
        if not name or not equals or not rest:
            raise ConfigError(f"{option} {value}: must have the form {form}")
        pairs.append((name, rest))
    return pairs


def _folder(name: str, value: str) -> str:
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"--claim {name}={value}: there is no such folder")
    return str(folder.resolve())


def _port(name: str, value: str) -> int:
    if not value.isdigit() or int(value) > 65535:
        raise ConfigError(f"--service-port {name}={value}: the port must be a number from 0 to 65535")
    return int(value)
