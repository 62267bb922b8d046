"""What a group must fulfil beyond the types of its fields: references, names, circles. Pure.

`group_problems` holds wherever a group runs; `cluster_problems` adds what Kubernetes demands of names. Both answer with
all problems at once, each with the path of its field.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from diptych.errors import ConfigError
from diptych.group import expand, names, order, resolve
from diptych.group.kinds import GroupSpec
from diptych.group.pod import PodTemplate, mount_problems, pod_problems
from diptych.group.reader import Problem, Reading
from diptych.group.role import Role

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035: must begin with a letter
MAX_LABEL = 63
REVISION_SUFFIX = 11  # a StatefulSet's pods carry a label <name>-<hash of 10 characters>


def group_problems(spec: GroupSpec, path: str = "spec") -> list[Problem]:
    """References between the parts of a group, and its pod templates."""
    roles = [role.name for role in spec.roles]
    problems = [
        problem for i, role in enumerate(spec.roles) for problem in _role_problems(role, spec, f"{path}.roles[{i}]")
    ]
    for i, coordination in enumerate(spec.coordination):
        for j, name in enumerate(coordination.roles):
            if name not in roles:
                problems.append(unknown("role", name, roles, f"{path}.coordination[{i}].roles[{j}]"))
    problems += _scaling_problems(spec, f"{path}.scalingGroups")
    cycle = order.find_cycle({role.name: role.dependencies for role in spec.roles})
    if cycle:
        problems.append(Problem(f"{path}.roles", f"dependencies go in a circle: {' -> '.join(cycle)}"))
    return problems


def _role_problems(role: Role, spec: GroupSpec, path: str) -> Iterator[Problem]:
    roles = [each.name for each in spec.roles]
    templates = [each.name for each in spec.role_templates]
    for j, dependency in enumerate(role.dependencies):
        if dependency not in roles:
            yield unknown("role", dependency, roles, f"{path}.dependencies[{j}]")
    if role.template_ref is not None and role.template_ref.name not in templates:
        yield unknown("role template", role.template_ref.name, templates, f"{path}.templateRef.name")
    if role.own_template is not None:
        yield from template_problems(role.own_template, f"{path}.template", sidecars=bool(role.engine_runtimes))


def resolved_problems(spec: Mapping[str, Any], path: str = "spec", *, open_pods: bool = False) -> list[Problem]:
    """Mistakes that show only once templates are patched: `spec` is the plain object, free of other problems.

    `open_pods`: as in Reading.
    """
    problems = []
    templates = resolve.role_templates(spec)
    for i, role in enumerate(spec["roles"]):
        where = f"{path}.roles[{i}]"
        try:
            if role.get("templateRef") is not None:
                patched = {"template, patched": resolve.resolve_role(role, templates, where)["template"]}
            elif (role.get("workload") or {}).get("kind") == "LeaderWorkerSet":
                leader, worker = resolve.leader_worker_templates(role, where)
                patched = {"template, patched for leaders": leader, "template, patched for workers": worker}
            else:
                continue
        except ConfigError as error:
            field, _, message = error.message.partition(": ")
            problems.append(Problem(field, message))
            continue
        for label, template in patched.items():
            reading = Reading(open_pods=open_pods)
            read = reading.read(PodTemplate, template, f"{where}.{label}")
            if read is not None:
                reading.add(template_problems(read, f"{where}.{label}", sidecars=bool(role.get("engineRuntimes"))))
            problems += reading.problems
    return problems


def template_problems(template: PodTemplate, path: str, *, sidecars: bool) -> Iterator[Problem]:
    """`sidecars`: whether the pods get containers and volumes besides those of the template."""
    found = pod_problems(template.spec) + ([] if sidecars else mount_problems(template.spec))
    for below, message in found:
        yield Problem(f"{path}.spec.{below}", message)
    for i, container in enumerate(template.spec.containers):
        for j, variable in enumerate(container.env):
            field = variable.value_from.field_ref if variable.value_from else None
            if field is not None and not expand.is_field(field.field_path):
                where = f"{path}.spec.containers[{i}].env[{j}].valueFrom.fieldRef.fieldPath"
                yield unknown("field", field.field_path, expand.FIELDS, where)


def _scaling_problems(spec: GroupSpec, path: str) -> Iterator[Problem]:
    roles = {role.name: role for role in spec.roles}
    member_of: dict[str, str] = {}
    for i, group in enumerate(spec.scaling_groups):
        if group.name in roles:
            yield Problem(f"{path}[{i}].name", f"{group.name} is a role; an adapter could not tell them apart")
        for name in group.roles:
            where = f"{path}[{i}].roles.{name}"
            if name not in roles:
                yield unknown("role", name, roles, where)
            elif name in member_of:
                yield Problem(where, f"the scaling group {member_of[name]} already scales {name}")
            elif (adapter := roles[name].scaling_adapter) is not None and adapter.enable:
                yield Problem(where, f"{name} has a scalingAdapter of its own; disable it, or take {name} out of here")
            member_of.setdefault(name, group.name)


def unknown(what: str, name: str, known: Collection[str], path: str) -> Problem:
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {close[0]}?" if close else f"there is: {', '.join(known) or 'none'}"
    return Problem(path, f"there is no {what} {name}; {hint}")


def cluster_problems(group: str, spec: GroupSpec, path: str = "spec") -> list[Problem]:
    """Names that Kubernetes would refuse, or that two roles of this group would share."""
    problems = []
    if not SERVICE_NAME.fullmatch(group):
        problems.append(
            Problem("metadata.name", f"{group!r} must be lower-case letters, digits and dashes, a letter first")
        )
    for i, role in enumerate(spec.roles):
        where = f"{path}.roles[{i}].name"
        longest = MAX_LABEL - REVISION_SUFFIX - _index_length(role)
        name = names.workload_name(group, role.name)
        if len(name) > longest:
            problems.append(
                Problem(
                    where,
                    f"{name} has {len(name)} characters, a {role.workload.kind} may have {longest};"
                    " shorten the group or the role",
                )
            )
        for other in spec.roles:
            if _is_worker_of(role.name, other):
                problems.append(Problem(where, f"the workers of role {other.name} are called {name} too"))
    return problems


def _index_length(role: Role) -> int:
    """A LeaderWorkerSet's workers are StatefulSets <name>-<index>."""
    return len(f"-{max(role.replicas - 1, 0)}") if role.workload.kind == "LeaderWorkerSet" else 0


def _is_worker_of(name: str, role: Role) -> bool:
    """Whether the LeaderWorkerSet of `role` makes a StatefulSet that a role `name` would make too."""
    index = name.removeprefix(f"{role.name}-")
    same = index != name and index.isdigit() and str(int(index)) == index
    return role.workload.kind == "LeaderWorkerSet" and same and int(index) < role.replicas
