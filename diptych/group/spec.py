"""A manifest for one machine: one RoleBasedGroup and its Services, read from YAML.

Whatever is wrong is reported at once, each with the path of its field. The group comes back resolved: every role has
its template and its replicas. Nothing here knows about processes or pods of a cluster.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

import msgspec

from diptych.errors import ConfigError
from diptych.group.checks import LABEL, MAX_LABEL, group_problems, resolved_problems
from diptych.group.documents import documents, identity
from diptych.group.kinds import API_VERSION, RoleBasedGroup
from diptych.group.names import pod_name
from diptych.group.pod import mount_problems
from diptych.group.reader import Problem, Reading
from diptych.group.resolve import resolve_spec
from diptych.group.role import Role as Role
from diptych.group.service import Service as Service
from diptych.group.service import ServicePort as ServicePort
from diptych.group.service import read_service, service_problems


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
        near = get_close_matches("RoleBasedGroup", [kind for kind, _ in others], n=1)
        hint = f"; is {near[0]} meant to be one?" if near and not groups else ""
        problems.append(Problem("", f"needs exactly one RoleBasedGroup, has {len(groups)}{hint}"))
    for service in services if not problems else ():
        reading = Reading(f"Service {service.name}: ")
        reading.add(service_problems(service, groups[0].name, groups[0].spec.roles))
        problems += reading.problems
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


def _at(document: Any, path: str) -> Any:
    """The part of a document at a path such as spec.roles[1].template."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        document = document[name] if name else document[int(index)]
    return document
