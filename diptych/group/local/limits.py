"""What one machine cannot give a manifest: refused where the pods would not work, said once where they do. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from diptych.errors import ConfigError
from diptych.group.local.addresses import HOSTS
from diptych.group.pod import Container, gpus_wanted, probes
from diptych.group.service import selected
from diptych.group.spec import Manifest, Role, Unmodelled

_REFUSED = {
    "hostPath": "hostPath volumes are refused; use a persistentVolumeClaim and --claim NAME=DIR",
    "initContainers": "init containers do not run locally; do their work before `diptych up`",
    "envFrom": "there are no config maps or secrets here; write the variables under env",
    "configMapKeyRef": "there are no config maps here; write the value",
    "secretKeyRef": "there are no secrets here; write the value, or leave it to the environment of `diptych up`",
    "resourceFieldRef": "there are no resource limits here; write the value",
    "fileKeyRef": "variables from files are not read here; write the value",
    "grpc": "grpc probes are not asked here; use tcpSocket or httpGet",
}
_NOTES = {
    "image": "images are not pulled: commands are programs of this machine, and `python3` is the one that runs diptych",
    "lifecycle": "lifecycle hooks do not run",
    "securityContext": "securityContext has no effect: pods run as you",
    "engineRuntimes": "engineRuntimes are not injected: there are no sidecar profiles here",
    "podGroupPolicy": "podGroupPolicy has no effect: nothing is scheduled here",
    "scalingAdapter": "scalingAdapter has no effect: `diptych scale` sets replicas",
}
_SILENT = {
    "rolloutStrategy",
    "minReadySeconds",
    "coordination",
    "paused",
    "imagePullPolicy",
    "type",
    "status",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "managedFields",
}
_EXTENDED = ("cpu", "memory", "ephemeral-storage", "nvidia.com/gpu")


def refuse(manifest: Manifest, claims: Mapping[str, str], gpus: int) -> None:
    """Raises ConfigError with a line for each thing without which the pods would not work."""
    problems = [f"{each.path}: {_REFUSED[each.field]}" for each in manifest.unmodelled if each.field in _REFUSED]
    for i, role in enumerate(manifest.group.spec.roles):
        problems += _role_problems(role, f"spec.roles[{i}]")
    for service in manifest.services:
        problems += [
            f"Service {service.name}: protocol {port.protocol} is not forwarded; only TCP is"
            for port in service.spec.ports
            if port.protocol != "TCP"
        ]
    used = {name for role in manifest.group.spec.roles for name in claimed(role)}
    problems += [
        f"--claim {name}: no volume claims it; claimed are: {', '.join(sorted(used)) or 'none'}"
        for name in claims
        if name not in used
    ]
    problems += [
        f"which folder is the claim {name} (roles {', '.join(_users(name, manifest))})? Add --claim {name}=DIR"
        for name in sorted(used - set(claims))
    ]
    problems += gpu_problems(manifest.group.spec.roles, {}, gpus)
    problems += address_problems(sum(role.replicas for role in manifest.group.spec.roles), len(manifest.services))
    if problems:
        raise ConfigError("this manifest cannot run on this machine:\n" + "\n".join(f"  {each}" for each in problems))


def claimed(role: Role) -> list[str]:
    """Names of the claims that the role's volumes use."""
    volumes = role.template.spec.volumes
    return [each.persistent_volume_claim.claim_name for each in volumes if each.persistent_volume_claim]


def gpu_problems(roles: tuple[Role, ...], replicas: Mapping[str, int], gpus: int) -> list[str]:
    """Whether the machine's GPUs suffice; without any GPU every pod runs on the CPU, which is said and allowed."""
    wanted = sum(replicas.get(role.name, role.replicas) * gpus_wanted(role.template.spec) for role in roles)
    if gpus == 0 or wanted <= gpus:
        return []
    return [
        f"the pods ask for {wanted} GPUs (nvidia.com/gpu) and there are {gpus}; ask for fewer, "
        "or run on the CPU with CUDA_VISIBLE_DEVICES= in the environment of `diptych up`"
    ]


def address_problems(pods: int, services: int) -> list[str]:
    """Whether each pod and each Service can have an address of its own."""
    if pods + services <= len(HOSTS):
        return []
    return [f"a group on one machine has at most {len(HOSTS)} pods and Services, not {pods + services}"]


def _users(claim: str, manifest: Manifest) -> list[str]:
    return [role.name for role in manifest.group.spec.roles if claim in claimed(role)]


def _role_problems(role: Role, path: str) -> Iterator[str]:
    if role.leader_worker_set is not None and role.leader_worker_set.size > 1:
        yield f"{path}.leaderWorkerSet.size: roles of several pods an instance do not run locally; use size 1"
    for i, container in enumerate(role.template.spec.containers):
        where = f"{path}.template.spec.containers[{i}]"
        if not container.command:
            yield f"{where}.command: is required here: an image's own entry point is not known"
        for field, probe in probes(container).items():
            if not probe.actions:
                yield f"{where}.{field}: needs exec, tcpSocket or httpGet"
    for i, volume in enumerate(role.template.spec.volumes):
        if volume.persistent_volume_claim is None and volume.empty_dir is None:
            where = f"{path}.template.spec.volumes[{i}]"
            yield f"{where}: volume {volume.name} must be a persistentVolumeClaim or an emptyDir to run locally"


def notes(manifest: Manifest, claims: Mapping[str, str], gpus: int) -> list[str]:
    """One line for each thing that the local run leaves out, in the order of the manifest."""
    fields = {each.field: each for each in reversed(manifest.unmodelled)}  # where each is first
    lines = [_note(each) for each in reversed(fields.values()) if each.field not in _SILENT]
    for role in manifest.group.spec.roles:
        spec = role.template.spec
        for container in spec.containers:
            lines += _resource_notes(container, gpus)
        for volume in spec.volumes:
            if volume.empty_dir and (volume.empty_dir.medium or volume.empty_dir.size_limit):
                lines.append(f"emptyDir {volume.name} is an ordinary folder: its medium and sizeLimit have no effect")
            if volume.persistent_volume_claim:
                name = volume.persistent_volume_claim.claim_name
                lines.append(f"claim {name} is {claims[name]}")
    for service in manifest.services:
        kinds = [each.value for each in manifest.unmodelled if each.field == "type" and each.path == "spec"]
        if service.spec.selector and not selected(service, manifest.group.name, manifest.group.spec.roles):
            lines.append(f"Service {service.name} selects no pod of this group: nothing will answer at its port")
        if any(kind in ("NodePort", "LoadBalancer") for kind in kinds):
            lines.append(f"Service {service.name} is reached at 127.0.0.1 only")
    lines += [
        f"{kind} {name} is not used: --claim names the folder of a claim" for kind, name in manifest.other_objects
    ]
    return list(dict.fromkeys(lines))


def _note(each: Unmodelled) -> str:
    return _NOTES.get(each.field, f"{each.field} has no effect here ({each.path})")


def _resource_notes(container: Container, gpus: int) -> Iterator[str]:
    asked = {**container.resources.requests, **container.resources.limits}
    if "nvidia.com/gpu" in asked and gpus == 0:
        yield "nvidia.com/gpu: there is no GPU here, so the pods run on the CPU"
    limited = [name for name in ("cpu", "memory") if name in container.resources.limits]
    if limited:
        yield "cpu and memory limits are not enforced"
    for name in asked:
        if name not in _EXTENDED:
            yield f"{name}: devices of this kind are not handed out"


def mount_folder(folder: str, sub_path: str) -> str:
    """Where a mount with a subPath is (checked by `spec`: relative, without ..)."""
    return str(PurePosixPath(folder) / sub_path) if sub_path else folder
