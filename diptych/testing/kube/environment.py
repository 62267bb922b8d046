"""What a container of a pod would see: its variables, and its command with `$(VAR)` replaced, as kubelet does it."""

from __future__ import annotations

import re
from typing import Any

from diptych.testing.kube.status import Obj
from diptych.testing.kube.store import Store

_REFERENCE = re.compile(r"\$(\$|\(([A-Za-z_.-][A-Za-z0-9_.-]*)\))")


def expand(text: str, known: dict[str, str]) -> str:
    """`$(NAME)` becomes its value; an unknown name stays as it is, `$$(NAME)` becomes `$(NAME)`."""

    def one(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return known.get(match[2], match[0])

    return _REFERENCE.sub(one, text)


def variables(store: Store, pod: Obj, container: Obj) -> dict[str, str]:
    """The container's environment: a variable may refer to those before it."""
    known: dict[str, str] = {}
    for env in container.get("env", []):
        source = env.get("valueFrom")
        known[env["name"]] = expand(env.get("value") or "", known) if source is None else _sourced(store, pod, source)
    return known


def command_line(store: Store, pod: Obj, container: Obj) -> list[str]:
    """`command` and `args`, expanded."""
    known = variables(store, pod, container)
    return [expand(text, known) for text in [*container.get("command", []), *container.get("args", [])]]


def _sourced(store: Store, pod: Obj, source: Obj) -> str:
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    if "configMapKeyRef" in source:
        reference = source["configMapKeyRef"]
        found = store.get(("", "configmaps"), pod["metadata"]["namespace"], reference["name"]) or {}
        return str(found.get("data", {}).get(reference["key"], ""))
    raise ValueError(f"variables from {', '.join(source)} are not simulated; use fieldRef or configMapKeyRef")


def _field(pod: Obj, path: str) -> str:
    """A field path of the downward API: `status.podIP`, `metadata.labels['key']`."""
    if match := re.match(r"^metadata\.(labels|annotations)\['(.+)'\]$", path):
        return str(pod["metadata"].get(match[1], {}).get(match[2], ""))
    value: Any = pod
    for name in path.split("."):
        value = value.get(name, "") if isinstance(value, dict) else ""
    return str(value)
