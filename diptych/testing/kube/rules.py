"""What the API refuses: names, labels, owner references, and the rules of built-in kinds that an operator meets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from diptych.testing.kube.kinds import Kind
from diptych.testing.kube.selectors import matches
from diptych.testing.kube.status import Obj

Cause = tuple[str, str]  # field, what is wrong
_LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
_LABEL_1035 = re.compile(r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")
_SUBDOMAIN = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
_VALUE = re.compile(r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")
_NAME_PART = re.compile(r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
_MAX_ANNOTATIONS = 256 * 1024


def _quoted(value: object) -> str:
    return f'Invalid value: "{value}"'


def _qualified(name: str) -> bool:
    prefix, slash, last = name.rpartition("/")
    return bool(_NAME_PART.match(last)) and (not slash or bool(_SUBDOMAIN.match(prefix)))


def labels_causes(labels: Obj, field: str) -> Iterator[Cause]:
    for key, value in labels.items():
        if not _qualified(key):
            yield field, f"{_quoted(key)}: name part must consist of alphanumeric characters, '-', '_' or '.'"
        if not isinstance(value, str):
            yield f"{field}.{key}", f"{_quoted(value)}: must be a string"
        elif len(value) > 63 or not _VALUE.match(value):
            yield field, f"{_quoted(value)}: a valid label must be 63 characters or less of [A-Za-z0-9._-]"


def _name_causes(kind: Kind, name: str) -> Iterator[Cause]:
    if kind.name == "Service" and not kind.group:
        form, text = _LABEL_1035, "a DNS-1035 label must start with a letter and have no more than 63 of [a-z0-9-]"
    elif kind.name == "Namespace":
        form, text = _LABEL, "a lowercase RFC 1123 label must consist of no more than 63 of [a-z0-9-]"
    else:
        form, text = _SUBDOMAIN, "a lowercase RFC 1123 subdomain must consist of [a-z0-9.-]"
    if not form.match(name) or len(name) > 253:
        yield "metadata.name", f"{_quoted(name)}: {text}"


def _owner_causes(owners: list[Obj]) -> Iterator[Cause]:
    for i, owner in enumerate(owners):
        for field in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(field):
                yield f"metadata.ownerReferences[{i}].{field}", 'Invalid value: "": must not be empty'
    if sum(bool(owner.get("controller")) for owner in owners) > 1:
        yield "metadata.ownerReferences", "Invalid value: Only one reference can have Controller set to true"


def metadata_causes(kind: Kind, obj: Obj) -> Iterator[Cause]:
    metadata = obj["metadata"]
    yield from _name_causes(kind, metadata["name"])
    yield from labels_causes(metadata.get("labels", {}), "metadata.labels")
    annotations = metadata.get("annotations", {})
    for key, value in annotations.items():
        if not _qualified(key.lower()):
            yield "metadata.annotations", f"{_quoted(key)}: is no qualified name"
        if not isinstance(value, str):
            yield f"metadata.annotations.{key}", f"{_quoted(value)}: must be a string"
    if sum(len(key) + len(str(value)) for key, value in annotations.items()) > _MAX_ANNOTATIONS:
        yield "metadata.annotations", f"Too long: may not be more than {_MAX_ANNOTATIONS} bytes"
    yield from _owner_causes(metadata.get("ownerReferences", []))


def _container_causes(spec: Obj, field: str) -> Iterator[Cause]:
    if not spec.get("containers"):
        yield f"{field}.containers", "Required value"
    volumes = {volume.get("name") for volume in spec.get("volumes", [])}
    for group in ("containers", "initContainers"):
        seen: set[str] = set()
        for i, container in enumerate(spec.get(group, [])):
            here = f"{field}.{group}[{i}]"
            name = container.get("name", "")
            if not name:
                yield f"{here}.name", "Required value"
            elif not _LABEL.match(name):
                yield f"{here}.name", f"{_quoted(name)}: a lowercase RFC 1123 label is needed"
            elif name in seen:
                yield f"{here}.name", f'Duplicate value: "{name}"'
            seen.add(name)
            if not container.get("image"):
                yield f"{here}.image", "Required value"
            yield from _mount_causes(container, volumes, here)


def _mount_causes(container: Obj, volumes: set[str | None], field: str) -> Iterator[Cause]:
    paths: set[str] = set()
    for i, mount in enumerate(container.get("volumeMounts", [])):
        if mount.get("name") not in volumes:
            yield f"{field}.volumeMounts[{i}].name", f'Not found: "{mount.get("name")}"'
        if mount.get("mountPath") in paths:
            yield f"{field}.volumeMounts[{i}].mountPath", f"{_quoted(mount.get('mountPath'))}: must be unique"
        paths.add(mount.get("mountPath"))


def _pod_causes(obj: Obj) -> Iterator[Cause]:
    yield from _container_causes(obj["spec"], "spec")


def _workload_causes(obj: Obj) -> Iterator[Cause]:
    spec = obj["spec"]
    labels = spec["template"]["metadata"].get("labels", {})
    yield from labels_causes(labels, "spec.template.labels")
    selector = spec.get("selector")
    if not selector:
        yield "spec.selector", "Required value"
    elif not matches(selector, labels):
        yield "spec.template.metadata.labels", f"Invalid value: {labels}: `selector` does not match template `labels`"
    if spec["replicas"] < 0:
        yield "spec.replicas", f"Invalid value: {spec['replicas']}: must be greater than or equal to 0"
    if spec["template"]["spec"].get("restartPolicy") != "Always":
        yield "spec.template.spec.restartPolicy", 'Unsupported value: supported values: "Always"'
    yield from _container_causes(spec["template"]["spec"], "spec.template.spec")


def _stateful_set_causes(obj: Obj) -> Iterator[Cause]:
    yield from _workload_causes(obj)
    strategy = obj["spec"]["updateStrategy"]
    if strategy["type"] == "OnDelete" and strategy.get("rollingUpdate") is not None:
        text = f"Invalid value: {strategy['rollingUpdate']}: only allowed for updateStrategy 'RollingUpdate'"
        yield "spec.updateStrategy.rollingUpdate", text


def _deployment_causes(obj: Obj) -> Iterator[Cause]:
    yield from _workload_causes(obj)
    rolling = obj["spec"]["strategy"].get("rollingUpdate") or {}
    if rolling.get("maxUnavailable") in (0, "0%") and rolling.get("maxSurge") in (0, "0%"):
        where = "spec.strategy.rollingUpdate.maxUnavailable"
        yield where, f"Invalid value: {rolling['maxUnavailable']}: may not be 0 when `maxSurge` is 0"


def _service_causes(obj: Obj) -> Iterator[Cause]:
    spec = obj["spec"]
    if not spec.get("ports") and spec.get("clusterIP") != "None" and spec["type"] != "ExternalName":
        yield "spec.ports", "Required value"
    if len(spec.get("ports", [])) > 1 and not all(port.get("name") for port in spec["ports"]):
        yield "spec.ports[0].name", "Required value"


def _pdb_causes(obj: Obj) -> Iterator[Cause]:
    spec = obj.get("spec", {})
    if "minAvailable" in spec and "maxUnavailable" in spec:
        yield "spec", "Invalid value: minAvailable and maxUnavailable cannot be both set"


_CREATE: dict[tuple[str, str], Callable[[Obj], Iterator[Cause]]] = {
    ("", "Pod"): _pod_causes,
    ("", "Service"): _service_causes,
    ("apps", "StatefulSet"): _stateful_set_causes,
    ("apps", "Deployment"): _deployment_causes,
    ("apps", "ReplicaSet"): _workload_causes,
    ("policy", "PodDisruptionBudget"): _pdb_causes,
}

_STATEFUL_SET_MUTABLE = frozenset(
    {"replicas", "ordinals", "template", "updateStrategy", "revisionHistoryLimit", "minReadySeconds"}
    | {"persistentVolumeClaimRetentionPolicy"}
)


def built_in_causes(kind: Kind, obj: Obj) -> Iterator[Cause]:
    check = _CREATE.get((kind.group, kind.name))
    if check:
        yield from check(obj)


def change_causes(kind: Kind, old: Obj, new: Obj) -> Iterator[Cause]:
    """What an update may not change."""
    place = kind.group, kind.name
    before, after = old.get("spec", {}), new.get("spec", {})
    if place == ("apps", "StatefulSet"):
        changed = {name for name in {**before, **after} if before.get(name) != after.get(name)}
        if changed - _STATEFUL_SET_MUTABLE:
            yield (
                "spec",
                "Forbidden: updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', "
                "'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and "
                "'minReadySeconds' are forbidden",
            )
    elif place in (("apps", "Deployment"), ("apps", "ReplicaSet")):
        if before.get("selector") != after.get("selector"):
            yield "spec.selector", f"Invalid value: {after.get('selector')}: field is immutable"
    elif place == ("", "Service") and before.get("clusterIP") != after.get("clusterIP"):
        yield "spec.clusterIPs[0]", f"{_quoted(after.get('clusterIP'))}: may not change once set"
    elif place == ("", "Pod") and _frozen(before) != _frozen(after):
        yield "spec", "Forbidden: pod updates may not change fields other than images, tolerations and deadlines"
    elif place == ("apps", "ControllerRevision") and old.get("data") != new.get("data"):
        yield "data", f"Invalid value: {new.get('data')}: field is immutable"


def _frozen(spec: Obj) -> Obj:
    """A pod's spec without what may change."""
    mutable = ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "schedulingGates", "nodeName")
    frozen = {name: value for name, value in spec.items() if name not in mutable}
    for group in ("containers", "initContainers"):
        frozen[group] = [{**container, "image": ""} for container in spec.get(group, [])]
    return frozen
