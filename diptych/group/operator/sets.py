"""RoleBasedGroupSets: `replicas` groups of one spec, called <set>-<index>.

A new template reaches all groups at once, or with `rolloutStrategy` as many at a time as may be missing: from the
highest index down, those that are not ready anyway first. An annotation tells which template a group has.

A group that went back from a template (`rollbackOnFailure`) is left with the one before, and holds its place among the
missing, until the set has another.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence

import msgspec

from diptych.group.coordinate import amount
from diptych.group.names import child_name
from diptych.group.operator.api import ApiError
from diptych.group.operator.cluster import Cluster
from diptych.group.operator.history import ROLLED_BACK
from diptych.group.operator.report import TEMPLATE, adding_to, timestamp
from diptych.group.operator.resources import GROUP, GROUP_SET, Json
from diptych.group.operator.template import EXCLUSIVE_TOPOLOGY

PREFIX = "rolebasedgroupset.workloads.x-k8s.io"
MAX_GROUPS = 1000
SET_LABEL, INDEX_LABEL = f"{PREFIX}/name", f"{PREFIX}/rbg-index"


class SetReconciler:
    """See Reconciler. `clock` gives Unix time."""

    def __init__(self, cluster: Cluster, clock: Callable[[], float]) -> None:
        self._cluster, self._clock = cluster, clock

    def reconcile(self, namespace: str, name: str) -> float | None:
        owner = self._cluster.get(GROUP_SET, namespace, name)
        if owner is None or owner["metadata"].get("deletionTimestamp"):
            return None
        found = self._cluster.owned(GROUP, owner["metadata"]["uid"])
        groups = {group["metadata"]["name"]: group for group in found}
        with self._cluster.events.of_refusals(owner):
            try:
                self._carry_out(owner, groups)
            except ApiError as error:
                with adding_to(error):
                    self._tell(owner, groups)
                raise
            self._tell(owner, groups)
        return None

    def _tell(self, owner: Json, groups: Mapping[str, Json]) -> None:
        self._cluster.apply_status(GROUP_SET, owner, set_status(owner, list(groups.values()), self._clock()))

    def _carry_out(self, owner: Json, groups: dict[str, Json]) -> None:
        wanted = owner["spec"].get("replicas", 1)
        if wanted > MAX_GROUPS:
            raise ApiError(f"spec.replicas: {wanted} groups are too many, a set may have {MAX_GROUPS}")
        names = [child_name(owner["metadata"]["name"], index) for index in range(wanted)]
        due = groups_due(owner, groups, names)
        for index, name in enumerate(names):
            live = groups.get(name)
            if name not in due:
                continue
            if live is None or not live["metadata"].get("deletionTimestamp"):
                self._cluster.apply(GROUP, child_group(owner, name, index, live))
        for name in sorted(set(groups) - set(names), key=_index, reverse=True):
            self._cluster.delete(GROUP, groups[name])


def groups_due(owner: Json, groups: Mapping[str, Json], names: Sequence[str]) -> set[str]:
    """Those of `names` that are written now: all but groups that have to wait for their new template."""
    strategy = (owner["spec"].get("rolloutStrategy") or {}).get("rollingUpdate") or {}
    most = max(1, amount(strategy.get("maxUnavailable", "100%"), len(names), round_up=False))
    template = template_hash(owner)
    outdated = [name for name in reversed(names) if name in groups and not _has_template(groups[name], template)]
    went_back = {name for name in names if name in groups and _went_back(groups[name], template)}
    missing = {name for name in names if name not in groups or not is_settled(groups[name])} | went_back
    chosen = [*(name for name in outdated if name in missing), *(name for name in outdated if name not in missing)]
    room = len(missing & {*outdated}) + max(0, most - len(missing))
    return {*names} - {*chosen[room:]} - went_back


def template_hash(owner: Json) -> str:
    """Of all that a set's groups get of it."""
    said = [owner["spec"]["template"], (owner["metadata"].get("annotations") or {}).get(EXCLUSIVE_TOPOLOGY)]
    return hashlib.sha256(msgspec.json.encode(said, order="sorted")).hexdigest()[:10]


def _has_template(group: Json, template: str) -> bool:
    return bool((group["metadata"].get("annotations") or {}).get(TEMPLATE) == template)


def _went_back(group: Json, template: str) -> bool:
    """Whether it was given this template, and none since, and has returned to the one before."""
    from_template = (group["metadata"].get("annotations") or {}).get(ROLLED_BACK)
    return _has_template(group, template) and bool(from_template == template)


def child_group(owner: Json, name: str, index: int, live: Json | None) -> Json:
    """The group `name` of a set. Roles that an adapter scales keep the replicas they have."""
    metadata = owner["metadata"]
    spec = copy.deepcopy(owner["spec"]["template"])
    for field in ("roles", "scalingGroups"):
        current = {each["name"]: each.get("replicas") for each in ((live or {}).get("spec") or {}).get(field) or []}
        for each in spec.get(field) or []:
            if (each.get("scalingAdapter") or {}).get("enable") and current.get(each["name"]) is not None:
                each["replicas"] = current[each["name"]]
    topology = (metadata.get("annotations") or {}).get(EXCLUSIVE_TOPOLOGY)
    annotations = {TEMPLATE: template_hash(owner), ROLLED_BACK: ""}  # it has yet to fail with what is given now
    owner_reference = {
        "apiVersion": GROUP_SET.api_version,
        "kind": GROUP_SET.kind,
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "metadata": {
            "namespace": metadata["namespace"],
            "name": name,
            "labels": {SET_LABEL: metadata["name"], INDEX_LABEL: str(index)},
            "annotations": annotations | ({EXCLUSIVE_TOPOLOGY: topology} if topology else {}),
            "ownerReferences": [owner_reference],
        },
        "spec": spec,
    }


def set_status(owner: Json, groups: list[Json], now: float) -> Json:
    """The set's status; the condition's time is kept while it does not change."""
    wanted = owner["spec"].get("replicas", 1)
    ready = sum(is_ready(group) for group in groups)
    template = template_hash(owner)
    went_back = sum(_went_back(group, template) for group in groups)
    updated = sum(_has_template(group, template) for group in groups) - went_back
    good = ready >= wanted and len(groups) == wanted
    old = {each["type"]: each for each in (owner.get("status") or {}).get("conditions") or []}.get("Ready", {})
    state = "True" if good else "False"
    condition = {
        "type": "Ready",
        "status": state,
        "reason": "AllReplicasReady" if good else "ReplicasNotReady",
        "message": f"{ready} of {wanted} groups are ready, {updated} have the template of now"
        + (f", {went_back} went back to the one before: correct the template" if went_back else ""),
        "lastTransitionTime": old["lastTransitionTime"] if old.get("status") == state else timestamp(now),
    }
    return {
        "observedGeneration": owner["metadata"]["generation"],
        "replicas": len(groups),
        "readyReplicas": ready,
        "updatedReplicas": updated,
        "conditions": [condition],
    }


def is_ready(group: Json) -> bool:
    """Whether the group says so about the spec it has now."""
    told_of_now = (group.get("status") or {}).get("observedGeneration") == group["metadata"]["generation"]
    return told_of_now and _conditions(group).get("Ready") == "True"


def is_settled(group: Json) -> bool:
    """Whether it is ready with the template it has, no update of it goes on, and nothing of it is refused."""
    metadata, status = group["metadata"], group.get("status") or {}
    told_of_now = status.get("observedTemplate") == (metadata.get("annotations") or {}).get(TEMPLATE)
    leaving, conditions = "deletionTimestamp" in metadata, _conditions(group)
    busy = conditions.get("RollingUpdateInProgress") == "True" or conditions.get("Progressing") == "False"
    return is_ready(group) and told_of_now and not leaving and not busy


def _conditions(group: Json) -> dict[str, str]:
    return {each["type"]: each["status"] for each in (group.get("status") or {}).get("conditions") or []}


def _index(name: str) -> int:
    return int(name.rpartition("-")[2])
