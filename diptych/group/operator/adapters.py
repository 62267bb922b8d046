"""Scaling adapters: the scale subresource of one role or scaling group, for autoscalers.

An adapter that has just been made takes the replicas the group has. From then on the adapter's replicas decide, and
the group's spec follows: an upgrade that applies the group's first manifest again does not undo an autoscaler's work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diptych.group.operator import objects
from diptych.group.operator.cluster import Cluster
from diptych.group.operator.report import timestamp
from diptych.group.operator.resources import ADAPTER, GROUP, Json


class AdapterReconciler:
    """See Reconciler. `clock` gives Unix time."""

    def __init__(self, cluster: Cluster, clock: Callable[[], float]) -> None:
        self._cluster, self._clock = cluster, clock

    def reconcile(self, namespace: str, name: str) -> float | None:
        adapter = self._cluster.get(ADAPTER, namespace, name)
        if adapter is None or adapter["metadata"].get("deletionTimestamp"):
            return None
        target = adapter["spec"]["scaleTargetRef"]
        group = self._cluster.get(GROUP, namespace, target["name"])
        found = find_target(group, target["role"]) if group else None
        if group is None or found is None or not _belongs(adapter, group):
            self._tell(adapter, {"phase": "NotBound"})
            return None
        field, index = found
        current = group["spec"][field][index].get("replicas", 1)
        wanted = adapter["spec"].get("replicas")
        status: Json = {"phase": "Bound", "replicas": current, "selector": selector(group, field, target["role"])}
        if wanted is None:
            patch = {"metadata": {"resourceVersion": adapter["metadata"]["resourceVersion"]}}
            self._cluster.merge(ADAPTER, namespace, name, {**patch, "spec": {"replicas": current}})
            self._cluster.events.tell(adapter, "Normal", "SuccessfulBound", f"bound to {target['role']} of the group")
        elif wanted != current:
            self._cluster.scale_group(group, field, index, wanted)
            status["lastScaleTime"] = timestamp(self._clock())
            message = f"{target['role']}: {current} -> {wanted} replicas"
            self._cluster.events.tell(adapter, "Normal", "SuccessfulScale", message)
        self._tell(adapter, status)
        return None

    def _tell(self, adapter: Json, status: Json) -> None:
        old = adapter.get("status") or {}
        if "lastScaleTime" in old:
            status.setdefault("lastScaleTime", old["lastScaleTime"])
        self._cluster.apply_status(ADAPTER, adapter, status)


def with_scale(group: Json, adapters: Sequence[Json]) -> Json:
    """The group as its adapters scale it: at no moment do the replicas of a manifest that was applied again count."""
    wanted: dict[str, int] = {}
    for each in adapters:
        target, replicas = each["spec"]["scaleTargetRef"], each["spec"].get("replicas")
        if replicas is not None and target["name"] == group["metadata"]["name"]:
            wanted[target["role"]] = replicas
    scaled = set(objects.scaled(group)) & wanted.keys()
    if not scaled:
        return group
    spec = dict(group["spec"])
    for field in ("roles", "scalingGroups"):
        if spec.get(field):
            spec[field] = [
                {**each, "replicas": wanted[each["name"]]} if each["name"] in scaled else each for each in spec[field]
            ]
    return {**group, "spec": spec}


def find_target(group: Json, name: str) -> tuple[str, int] | None:
    """Where in a group's spec the role or scaling group `name` is: (field, index)."""
    for field in ("roles", "scalingGroups"):
        for index, each in enumerate(group["spec"].get(field) or []):
            if each["name"] == name:
                return field, index
    return None


def selector(group: Json, field: str, name: str) -> str:
    """Which pods an autoscaler measures: the role's, or for a scaling group all of the group's."""
    labels = objects.metadata(group, name if field == "roles" else "", "")["labels"]
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _belongs(adapter: Json, group: Json) -> bool:
    owners = [each["uid"] for each in adapter["metadata"].get("ownerReferences") or []]
    return group["metadata"]["uid"] in owners
