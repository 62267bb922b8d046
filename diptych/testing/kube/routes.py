"""Paths of the API: which kind, namespace, object and subresource one names."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.testing.kube.kinds import Kind, Kinds
from diptych.testing.kube.status import no_such_path


@dataclass(frozen=True)
class Target:
    """`namespace` None: all of them; `name` empty: the collection."""

    kind: Kind
    namespace: str | None
    name: str = ""
    subresource: str = ""


def parse(kinds: Kinds, path: str) -> Target:
    """Raises 404 for a path that no kind is served at."""
    parts = [part for part in path.split("/") if part]
    if parts[:1] == ["api"] and len(parts) > 2:
        group, version, rest = "", parts[1], parts[2:]
    elif parts[:1] == ["apis"] and len(parts) > 3:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        raise no_such_path()
    namespace: str | None = None
    # /namespaces/a names the object, /namespaces/a/status its status, /namespaces/a/pods what is in it
    if rest[0] == "namespaces" and len(rest) > 2 and not (group == "" and rest[2] in ("status", "finalize")):
        namespace, rest = rest[1], rest[2:]
    kind = kinds.at(group, version, rest[0])
    name, subresource = [*rest[1:], "", ""][:2]
    if len(rest) > 3 or (namespace is not None and not kind.namespaced):
        raise no_such_path()
    if kind.namespaced and name and namespace is None:
        raise no_such_path()
    if not kind.namespaced:
        namespace = ""
    if subresource == "status" and not kind.status:
        raise no_such_path()
    if subresource == "scale" and not kind.scale:
        raise no_such_path()
    return Target(kind, namespace, name, subresource)
