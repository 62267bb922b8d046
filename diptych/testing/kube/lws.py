"""The LeaderWorkerSet controller: groups of a leader and its workers, built from StatefulSets as upstream does.

Leaders `<lws>-<i>` are the pods of the StatefulSet `<lws>`; the workers `<lws>-<i>-<j>` (j from 1) those of a
StatefulSet `<lws>-<i>` that the leader pod owns. A headless Service `<lws>` names them all. maxSurge is not simulated:
an update goes through the leaders' StatefulSet, from the highest group down to the partition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from diptych.testing.kube.api import CONTROLLER, Api
from diptych.testing.kube.controllers import Key
from diptych.testing.kube.deletion import Deleting
from diptych.testing.kube.dns import is_ready
from diptych.testing.kube.owned import (
    controlled,
    is_terminating,
    owner_reference,
    template_hash,
    whole,
    write_status,
)
from diptych.testing.kube.statefulset import SETS as STATEFUL_SETS
from diptych.testing.kube.status import Obj
from diptych.testing.kube.store import Change, key_of

SETS, PODS = ("leaderworkerset.x-k8s.io", "leaderworkersets"), ("", "pods")
PREFIX = "leaderworkerset.sigs.k8s.io"
NAME, GROUP, WORKER, KEY = f"{PREFIX}/name", f"{PREFIX}/group-index", f"{PREFIX}/worker-index", f"{PREFIX}/group-key"
REVISION, SIZE = f"{PREFIX}/template-revision-hash", f"{PREFIX}/size"


def group_key(namespace: str, leader: str) -> str:
    """A label's value that no other group has."""
    return hashlib.sha1(f"{namespace}/{leader}".encode(), usedforsecurity=False).hexdigest()


class LeaderWorkerSets:
    def __init__(self, api: Api) -> None:
        self._api = api

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == SETS:
            yield change.key
        elif change.resource in (PODS, STATEFUL_SETS):
            name = change.obj["metadata"].get("labels", {}).get(NAME)
            if name:
                yield change.key[0], name

    def sync(self, key: Key) -> None:
        owner = self._api.store.get(SETS, *key)
        if owner is None or is_terminating(owner):
            return
        self._service(owner)
        revision = template_hash(owner["spec"]["leaderWorkerTemplate"])
        leaders = self._leaders(owner, revision)
        size = owner["spec"]["leaderWorkerTemplate"]["size"]
        for leader in controlled(self._api.store, leaders):
            if self._restart(owner, leader):
                continue
            started = owner["spec"]["startupPolicy"] == "LeaderCreated" or is_ready(leader)
            if started and size > 1 and not is_terminating(leader):
                self._workers(owner, leader)
        self._report(key, leaders, revision)

    def _service(self, owner: Obj) -> None:
        namespace, name = key_of(owner)
        if self._api.store.get(("", "services"), namespace, name) is None:
            metadata = {"name": name, "ownerReferences": [owner_reference(owner)]}
            spec = {"clusterIP": "None", "selector": {NAME: name}, "publishNotReadyAddresses": True}
            self._api.create("Service", namespace, {"metadata": metadata, "spec": spec}, manager=CONTROLLER)

    def _leaders(self, owner: Obj, revision: str) -> Obj:
        """The leaders' StatefulSet as the set wants it now."""
        namespace, name = key_of(owner)
        template = owner["spec"]["leaderWorkerTemplate"]
        size = template["size"]
        labels = {NAME: name, WORKER: "0", REVISION: revision}
        rolling = owner["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]
        pod = _pod_template(template.get("leaderTemplate") or template["workerTemplate"], labels, {SIZE: str(size)})
        spec = {
            "replicas": owner["spec"]["replicas"],
            "serviceName": name,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {NAME: name, WORKER: "0"}},
            "template": pod,
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": rolling["partition"]}},
        }
        _environment(pod, f"{name}-$(LWS_GROUP_INDEX).{name}.{namespace}", size)
        return self._ensure(owner, name, labels, spec)

    def _workers(self, owner: Obj, leader: Obj) -> Obj:
        namespace, name = key_of(owner)
        template = owner["spec"]["leaderWorkerTemplate"]
        own = leader["metadata"]["name"]
        labels = {NAME: name, GROUP: leader["metadata"]["labels"].get("apps.kubernetes.io/pod-index", "")}
        labels |= {KEY: group_key(namespace, own), REVISION: leader["metadata"]["labels"].get(REVISION, "")}
        existing = self._api.store.get(STATEFUL_SETS, namespace, own)
        if existing is not None:  # a group's workers change only with their leader
            return existing
        pod = _pod_template(template["workerTemplate"], labels, {SIZE: str(template["size"])})
        _environment(pod, f"{own}.{name}.{namespace}", template["size"])
        spec = {
            "replicas": template["size"] - 1,
            "ordinals": {"start": 1},
            "serviceName": name,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {NAME: name, GROUP: labels[GROUP], KEY: labels[KEY]}},
            "template": pod,
        }
        return self._ensure(leader, own, labels, spec)

    def _ensure(self, owner: Obj, name: str, labels: dict[str, str], spec: Obj) -> Obj:
        namespace = owner["metadata"]["namespace"]
        metadata = {"name": name, "labels": labels, "ownerReferences": [owner_reference(owner)]}
        config = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": spec}
        return self._api.apply("StatefulSet", namespace, name, config, manager="lws", force=True)

    def _group(self, leader: Obj) -> list[Obj]:
        """The leader's workers."""
        sets = controlled(self._api.store, leader, STATEFUL_SETS)
        return [pod for one in sets for pod in controlled(self._api.store, one)]

    def _restart(self, owner: Obj, leader: Obj) -> bool:
        """Deletes the whole group when one of its pods restarted or is being deleted, if the policy says so."""
        if owner["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "None" or is_terminating(leader):
            return False
        workers = self._group(leader)
        sets = controlled(self._api.store, leader, STATEFUL_SETS)
        restarted = any(_restarts(pod) for pod in [leader, *workers])
        if not restarted and not any(is_terminating(pod) for pod in workers) and not any(map(is_terminating, sets)):
            return False
        options = Deleting(policy="Foreground", uid=leader["metadata"]["uid"])
        self._api.delete("Pod", *key_of(leader), options)
        return True

    def _report(self, key: Key, leaders: Obj, revision: str) -> None:
        owner = self._api.store.get(SETS, *key)
        if owner is None:
            return
        size, replicas = owner["spec"]["leaderWorkerTemplate"]["size"], owner["spec"]["replicas"]
        ready = updated = 0
        groups = [pod for pod in controlled(self._api.store, leaders) if not is_terminating(pod)]
        for leader in groups:
            pods = [leader, *self._group(leader)]
            whole_group = len(pods) == size and all(map(is_ready, pods))
            current = leader["metadata"]["labels"].get(REVISION) == revision
            ready += whole_group
            updated += current
        partition = whole(
            owner["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]["partition"], replicas, up=False
        )
        done = ready == replicas and updated >= replicas - partition
        status: dict[str, Any] = {
            "replicas": len(groups),
            "readyReplicas": ready,
            "updatedReplicas": updated,
            "observedGeneration": owner["metadata"]["generation"],
            "hpaPodSelector": f"{NAME}={key[1]},{WORKER}=0",
            "conditions": [self._condition(owner, "Available", done), self._condition(owner, "Progressing", not done)],
        }
        write_status(self._api, owner, status)

    def _condition(self, owner: Obj, kind: str, state: bool) -> Obj:
        for one in owner.get("status", {}).get("conditions", []):
            if (one["type"], one["status"]) == (kind, str(state)):
                found: Obj = one
                return found
        reason = "AllGroupsReady" if kind == "Available" else "GroupsProgressing"
        time = {"lastTransitionTime": self._api.clock.stamp()}
        return {"type": kind, "status": str(state), "reason": reason, "message": reason, **time}


def _restarts(pod: Obj) -> bool:
    status = pod.get("status", {})
    containers = [*status.get("containerStatuses", []), *status.get("initContainerStatuses", [])]
    return any(one["restartCount"] > 0 for one in containers) or status.get("phase") == "Failed"


def _pod_template(template: Obj, labels: dict[str, str], annotations: dict[str, str]) -> Obj:
    metadata = template.get("metadata", {})
    return {
        "metadata": {
            **metadata,
            "labels": {**metadata.get("labels", {}), **labels},
            "annotations": {**metadata.get("annotations", {}), **annotations},
        },
        "spec": template["spec"],
    }


def _environment(pod: Obj, leader: str, size: int) -> None:
    """What every container learns about its group, before its own variables."""

    def label(name: str, field: str) -> Obj:
        return {
            "name": name,
            "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{field}']"}},
        }

    known = [label("LWS_WORKER_INDEX", "apps.kubernetes.io/pod-index"), {"name": "LWS_GROUP_SIZE", "value": str(size)}]
    if "$(LWS_GROUP_INDEX)" in leader:
        index = label("LWS_GROUP_INDEX", "apps.kubernetes.io/pod-index")
        known = [index, {"name": "LWS_WORKER_INDEX", "value": "0"}, known[1]]
    known = [*known, {"name": "LWS_LEADER_ADDRESS", "value": leader}]
    names = {one["name"] for one in known}
    spec = dict(pod["spec"])
    for group in ("containers", "initContainers"):
        if group in spec:
            spec[group] = [
                {**one, "env": known + [env for env in one.get("env", []) if env["name"] not in names]}
                for one in spec[group]
            ]
    pod["spec"] = spec
