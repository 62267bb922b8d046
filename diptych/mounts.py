"""Paths inside a pod's volumes, when the pod is a process on this machine.

A manifest names model folders by their mount path (`/models/Qwen3-32B/`), which exists on Kubernetes only. `diptych
up` says in `DIPTYCH_MOUNTS` where each mount path really is: a JSON list of [mount path, folder]. Programs open
`resolve(path)` and go on showing `path` to people. On Kubernetes the variable is unset and paths are what they are.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence

import msgspec

from diptych.errors import ConfigError


def resolve(path: str) -> str:
    """Where `path` is on this machine: the longest mount path that contains it is replaced by its folder.

    Relative paths, and paths in no mount, come back unchanged. Raises ConfigError when DIPTYCH_MOUNTS is malformed.
    """
    text = os.environ.get("DIPTYCH_MOUNTS")
    if not text:
        return path
    try:
        mounts = msgspec.json.decode(text, type=list[tuple[str, str]])
    except msgspec.DecodeError as error:
        raise ConfigError(f"DIPTYCH_MOUNTS must be a JSON list of [mount path, folder]: {error}") from None
    return locate(path, mounts)


def locate(path: str, mounts: Sequence[tuple[str, str]]) -> str:
    """`resolve` with the mounts given: pairs of mount path and folder."""
    wanted = posixpath.normpath(path)
    found = [(posixpath.normpath(mount), folder) for mount, folder in mounts]
    found = [(mount, folder) for mount, folder in found if _contains(mount, wanted)]
    if not path.startswith("/") or not found:
        return path
    mount, folder = max(found, key=lambda pair: len(pair[0]))
    rest = posixpath.relpath(wanted, mount)
    return folder if rest == "." else posixpath.join(folder, rest)


def _contains(mount: str, path: str) -> bool:
    return path == mount or path.startswith(mount.rstrip("/") + "/")
