"""What a container's processes get: environment, command line, folders. Pure but for the folders it names."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

import diptych
from diptych import mounts
from diptych.errors import ConfigError
from diptych.group import expand
from diptych.group.expand import PodFacts
from diptych.group.local.limits import mount_folder
from diptych.group.local.paths import GroupFolder
from diptych.group.pod import Container, PodSpec

PACKAGE_ROOT = Path(diptych.__file__).parents[1]
SHIMS = Path(diptych.__file__).parent / "group" / "shims"


class Command(msgspec.Struct, frozen=True):
    """A container ready to start. `variables` are the manifest's own, for `$(VAR)` in probes."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    variables: Mapping[str, str]
    cwd: str


def pod_folder(folder: GroupFolder, pod: str) -> Path:
    return folder.pods / pod


def volume_folders(folder: GroupFolder, pod: str, spec: PodSpec, claims: Mapping[str, str]) -> dict[str, str]:
    """Where each volume of the pod is: a claim's folder, or one of the pod's own for an emptyDir."""
    own = pod_folder(folder, pod) / "volumes"
    return {
        volume.name: claims[volume.persistent_volume_claim.claim_name]
        if volume.persistent_volume_claim
        else str(own / volume.name)
        for volume in spec.volumes
    }


def container_command(
    container: Container,
    facts: PodFacts,
    volumes: Mapping[str, str],
    folder: GroupFolder,
    gpus: Sequence[str],
    base: Mapping[str, str],
    cwd: str,
) -> Command:
    """The container as a command of this machine. `base`: the environment it grows from. Raises ConfigError."""
    variables = expand.container_environment(container, facts)
    pairs = [
        (
            mount.mount_path,
            mount_folder(volumes[mount.name], expand.expand(mount.sub_path_expr, variables) or mount.sub_path),
        )
        for mount in container.volume_mounts
    ]
    environment = {**base, **variables}
    environment["PATH"] = _joined(str(folder.bin), environment.get("PATH") or os.defpath)
    environment["PYTHONPATH"] = _joined(str(SHIMS), str(PACKAGE_ROOT), environment.get("PYTHONPATH", ""))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment["HOSTNAME"] = facts.name
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    environment["DIPTYCH_POD_IP"] = facts.ip
    environment["DIPTYCH_HOSTS"] = str(folder.hosts)
    environment["DIPTYCH_MOUNTS"] = msgspec.json.encode(pairs).decode()
    return Command(tuple(expand.argv(container, variables)), environment, variables, _cwd(container, pairs, cwd))


def _cwd(container: Container, pairs: list[tuple[str, str]], default: str) -> str:
    if not container.working_dir:
        return default
    folder = mounts.locate(container.working_dir, pairs)
    if not Path(folder).is_dir():
        raise ConfigError(
            f"container {container.name}: workingDir {container.working_dir} is no folder of this machine"
        )
    return folder


def _joined(*parts: str) -> str:
    return os.pathsep.join(part for part in parts if part)


def write_programs(folder: GroupFolder) -> None:
    """`python3`, `python` and `diptych` of the pods: the interpreter that runs this process.

    Scripts and not links, because an interpreter of a virtual environment finds it by the path it is called with.
    """
    python = shlex.quote(sys.executable)
    programs = {"python3": python, "python": python, "diptych": f"{python} -m diptych"}
    for name, command in programs.items():
        path = folder.bin / name
        path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        path.chmod(0o700)
