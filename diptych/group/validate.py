"""Manifests checked offline: what the API server would refuse, and what the operator would.

`object_problems` is for one object of our kinds; the operator asks it before it acts. `check` takes the documents of
several files and also looks at what they mean to each other: one name twice, a scaling adapter without its role.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from diptych.errors import ConfigError
from diptych.group import names
from diptych.group.checks import SERVICE_NAME, cluster_problems, group_problems, resolved_problems, unknown
from diptych.group.documents import documents, identity, read_text
from diptych.group.kinds import (
    API_GROUP,
    API_VERSION,
    KINDS,
    GroupSpec,
    RoleBasedGroup,
    RoleBasedGroupScalingAdapter,
    RoleBasedGroupSet,
)
from diptych.group.reader import Object, Problem, Reading
from diptych.group.resolve import leader_worker_templates, resolve_spec
from diptych.group.service import NAME_LABEL, Service, read_service, service_problems

T = TypeVar("T", bound=Object)
MADE_KINDS = ("StatefulSet", "Deployment", "LeaderWorkerSet", "Service", "ConfigMap")
MAX_CHILDREN = 1000  # of a RoleBasedGroupSet, when names are compared


class Checked(msgspec.Struct):
    """One document and what is wrong with it. `known`: whether this is a kind that is checked at all.

    `note`: what it lacks for Kubernetes but not for `diptych up`.
    """

    source: str
    document: Any
    kind: str
    name: str
    namespace: str
    known: bool
    problems: list[Problem]
    note: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.kind or 'document'} {self.name}" if self.name else self.source


def object_problems(document: Any, *, open_pods: bool = True) -> list[Problem]:
    """Everything that is wrong with one object of workloads.x-k8s.io: types, rules, references, names.

    `open_pods`: fields of pods that this program does not know are no mistakes, since the cluster may know them.
    """
    kind = KINDS.get(str(document.get("kind"))) if isinstance(document, dict) else None
    if kind is None:
        return [_unknown_kind(document)]
    if document.get("apiVersion") != API_VERSION:
        return [Problem("apiVersion", f"must be {API_VERSION}, not {document.get('apiVersion')}")]
    reading = Reading(open_pods=open_pods)
    value = reading.read(kind, document)
    if isinstance(value, RoleBasedGroup):
        reading.add(_spec_problems(value.name, value.spec, "spec"))
        reading.add([] if reading.problems else resolved_problems(document["spec"], "spec", open_pods=open_pods))
    elif isinstance(value, RoleBasedGroupSet):
        last = names.child_name(value.metadata.name, max(value.spec.replicas - 1, 0))
        path, template = "spec.template", document["spec"]["template"]
        reading.add(_spec_problems(last, value.spec.template, path))
        reading.add([] if reading.problems else resolved_problems(template, path, open_pods=open_pods))
    return reading.problems


def _unknown_kind(document: Any) -> Problem:
    kind = str(document.get("kind")) if isinstance(document, dict) else ""
    close = difflib.get_close_matches(kind, KINDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there is: {', '.join(KINDS)}"
    return Problem("kind", f"{kind or 'nothing'} is no kind of {API_GROUP}; {hint}")


def _spec_problems(group: str, spec: GroupSpec, path: str) -> list[Problem]:
    return [*group_problems(spec, path), *cluster_problems(group, spec, path)]


def check(files: Sequence[str]) -> list[Checked]:
    """Every document of the files, in their order; for a file that is no YAML, one without a name."""
    checked = [each for file in files for each in _checked_file(file)]
    _check_twice(checked)
    _check_made(checked)
    _check_targets(checked)
    _check_services(checked)
    return checked


def _checked_file(file: str) -> list[Checked]:
    try:
        found = documents(read_text(file))
        if not found:
            raise ConfigError("there is nothing in it; it needs at least one object, with apiVersion and kind")
        return [_checked(file, number, each) for number, each in enumerate(found, start=1)]
    except ConfigError as error:
        return [Checked(file, None, "", "", "", True, [Problem("", error.message)])]


def _checked(source: str, number: int, document: Any) -> Checked:
    kind, name = identity(document)
    metadata = document.get("metadata") if isinstance(document, dict) else None
    namespace = metadata.get("namespace") if isinstance(metadata, dict) else None
    result = Checked(source, document, kind, name or str(number), str(namespace or "default"), True, [])
    version = document.get("apiVersion") if kind else ""
    if not kind:
        result.problems = [Problem("", "needs apiVersion and kind")]
    elif kind in KINDS or str(version).startswith(f"{API_GROUP}/"):
        result.problems = object_problems(document, open_pods=False)
        result.note = "" if result.problems else _image_note(document)
    elif kind == "Service":
        reading = Reading()
        service = read_service(reading, document)
        if service is not None and not SERVICE_NAME.fullmatch(service.name):
            reading.problem("metadata.name", f"{service.name!r} must begin with a letter")
        result.problems = reading.problems
    else:
        result.known = False
    return result


def _image_note(document: Any) -> str:
    """Says which containers of a group, or of the groups of a set, have no image."""
    if document["kind"] not in ("RoleBasedGroup", "RoleBasedGroupSet"):
        return ""
    spec = document["spec"] if document["kind"] == "RoleBasedGroup" else document["spec"]["template"]
    without = {
        f"{role['name']}/{container['name']}": None
        for role in resolve_spec(spec)["roles"]
        for template in _pod_templates(role)
        for container in template["spec"]["containers"]
        if not container.get("image")
    }
    if not without:
        return ""
    return f"no image for {', '.join(without)}: `diptych up` needs none, Kubernetes will refuse the pods"


def _pod_templates(role: dict[str, Any]) -> Sequence[dict[str, Any]]:
    if (role.get("workload") or {}).get("kind") == "LeaderWorkerSet":
        return leader_worker_templates(role)
    return [role["template"]]


def _check_twice(checked: Sequence[Checked]) -> None:
    seen: dict[tuple[str, str, str], Checked] = {}
    for each in checked:
        key = (each.kind, each.namespace, each.name)
        if each.kind and key in seen:
            each.problems.append(Problem("metadata.name", f"{each.kind} {each.name} is in {seen[key].source} already"))
        seen.setdefault(key, each)


def _check_made(checked: Sequence[Checked]) -> None:
    """Workloads, Services and discovery files are called <group>-<role>: a-b with c, and a with b-c, are the same."""
    owners: dict[tuple[str, str], str] = {}
    for each in checked:
        for path, group, role in _roles(each):
            name = names.workload_name(group, role)
            owner = f"role {role} of {group}"
            if owners.setdefault((each.namespace, name), owner) != owner:
                taken = owners[each.namespace, name]
                each.problems.append(Problem(path, f"{name} is what {taken} is called too; rename one of them"))
    for each in checked:
        owner = owners.get((each.namespace, each.name), "")
        if owner and each.kind in MADE_KINDS:
            each.known = True
            each.problems.append(
                Problem("metadata.name", f"{each.name} is the name of what {owner} gets; choose another")
            )


def _roles(checked: Checked) -> Iterator[tuple[str, str, str]]:
    """(path of the name, group, role) of each role that a document brings about."""
    group = _read(RoleBasedGroup, checked)
    if group is not None:
        yield from ((f"spec.roles[{i}].name", group.name, role.name) for i, role in enumerate(group.spec.roles))
    several = _read(RoleBasedGroupSet, checked)
    if several is not None:
        for index in range(min(several.spec.replicas, MAX_CHILDREN)):
            child = names.child_name(several.metadata.name, index)
            for i, role in enumerate(several.spec.template.roles):
                yield f"spec.template.roles[{i}].name", child, role.name


def _check_targets(checked: Sequence[Checked]) -> None:
    """A scaling adapter's group may be elsewhere; if it is here, so must the role be."""
    targets: dict[tuple[str, str], list[str]] = {}
    for each in checked:
        group = _read(RoleBasedGroup, each)
        if group is not None:
            roles = [role.name for role in group.spec.roles]
            targets[each.namespace, group.name] = roles + [part.name for part in group.spec.scaling_groups]
    for each in checked:
        adapter = _read(RoleBasedGroupScalingAdapter, each)
        if adapter is None:
            continue
        target = adapter.spec.scale_target_ref
        known = targets.get((each.namespace, target.name))
        if known is not None and target.role not in known:
            each.problems.append(unknown("role or scaling group", target.role, known, "spec.scaleTargetRef.role"))


def _check_services(checked: Sequence[Checked]) -> None:
    """A Service's group may be elsewhere; if it is here, so must the role and the ports be."""
    groups = {(each.namespace, each.name): each for each in checked if each.kind == "RoleBasedGroup"}
    for each in checked:
        service = _read(Service, each)
        group = service and groups.get((each.namespace, service.spec.selector.get(NAME_LABEL, "")))
        if service is None or not group or group.problems:
            continue
        resolved = {**group.document, "spec": resolve_spec(group.document["spec"])}
        read = Reading().read(RoleBasedGroup, resolved)
        each.problems += service_problems(service, group.name, read.spec.roles) if read else []


def _read(kind: type[T], checked: Checked) -> T | None:
    """The document as `kind`, if it is one and its types are right."""
    return Reading().read(kind, checked.document) if checked.kind == kind.__name__ else None
