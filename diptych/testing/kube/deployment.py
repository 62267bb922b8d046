"""The Deployment and ReplicaSet controllers."""

from __future__ import annotations

from collections.abc import Iterable

from diptych.testing.kube.api import CONTROLLER, Api
from diptych.testing.kube.controllers import Key
from diptych.testing.kube.deletion import Deleting
from diptych.testing.kube.dns import is_ready
from diptych.testing.kube.owned import (
    controlled,
    has_ended,
    is_terminating,
    owner_key,
    owner_reference,
    pod_from,
    template_hash,
    whole,
    write_status,
)
from diptych.testing.kube.status import Obj
from diptych.testing.kube.store import Change, key_of

DEPLOYMENTS, SETS = ("apps", "deployments"), ("apps", "replicasets")
HASH = "pod-template-hash"
REVISION = "deployment.kubernetes.io/revision"


def _condition(kind: str, state: bool, reason: str, old: Obj, now: str) -> Obj:
    for one in old.get("conditions", []):
        if (one["type"], one["status"], one["reason"]) == (kind, str(state), reason):
            found: Obj = one
            return found
    times = {"lastTransitionTime": now, "lastUpdateTime": now}
    return {"type": kind, "status": str(state), "reason": reason, "message": reason, **times}


class ReplicaSets:
    """Keeps as many pods as replicas says; deletes unready ones first, then the youngest."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == SETS:
            yield change.key
        elif change.resource == ("", "pods") and (key := owner_key(change, "ReplicaSet")):
            yield key

    def sync(self, key: Key) -> None:
        owner = self._api.store.get(SETS, *key)
        if owner is None or is_terminating(owner):
            return
        pods = [pod for pod in controlled(self._api.store, owner) if not is_terminating(pod)]
        alive = [pod for pod in pods if not has_ended(pod)]
        missing = owner["spec"]["replicas"] - len(alive)
        for _ in range(missing):
            name = f"{key[1]}-{self._api.suffix()}"
            self._api.create("Pod", key[0], pod_from(owner["spec"]["template"], owner, name, {}), manager=CONTROLLER)
        youngest_first = list(reversed(alive))
        surplus = sorted(youngest_first, key=is_ready)[: max(0, -missing)]
        for pod in surplus:
            self._api.delete("Pod", *key_of(pod), Deleting(uid=pod["metadata"]["uid"]))
        self._report(key)

    def _report(self, key: Key) -> None:
        owner = self._api.store.get(SETS, *key)
        if owner is None:
            return
        pods = [pod for pod in controlled(self._api.store, owner) if not is_terminating(pod) and not has_ended(pod)]
        ready = sum(is_ready(pod) for pod in pods)
        status = {
            "replicas": len(pods),
            "fullyLabeledReplicas": len(pods) or None,
            "readyReplicas": ready or None,
            "availableReplicas": ready or None,
            "observedGeneration": owner["metadata"]["generation"],
        }
        write_status(self._api, owner, status)


class Deployments:
    """A ReplicaSet a template; in a rolling update never more pods than maxSurge allows, nor fewer ready ones than
    maxUnavailable does. `minReadySeconds` is not waited for.
    """

    def __init__(self, api: Api) -> None:
        self._api = api

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == DEPLOYMENTS:
            yield change.key
        elif change.resource == SETS and (key := owner_key(change, "Deployment")):
            yield key
        elif change.resource == ("", "pods") and (key := owner_key(change, "ReplicaSet")):
            yield key[0], key[1].rpartition("-")[0]

    def sync(self, key: Key) -> None:
        owner = self._api.store.get(DEPLOYMENTS, *key)
        if owner is None or is_terminating(owner):
            return
        new, old = self._sets(owner)
        if not owner["spec"].get("paused"):
            if owner["spec"]["strategy"]["type"] == "Recreate":
                self._recreate(owner, new, old)
            else:
                self._roll(owner, new, old)
        self._trim(owner, old)
        self._report(key)

    def _sets(self, owner: Obj) -> tuple[Obj, list[Obj]]:
        """The ReplicaSet of the present template (made if need be), and all others."""
        template, namespace = owner["spec"]["template"], owner["metadata"]["namespace"]
        digest = template_hash(template)
        name = f"{owner['metadata']['name']}-{digest}"
        sets = controlled(self._api.store, owner, SETS)
        revision = str(max((int(_revision(one)) for one in sets if one["metadata"]["name"] != name), default=0) + 1)
        found = next((one for one in sets if one["metadata"]["name"] == name), None)
        if found is None:
            labels = {**template["metadata"].get("labels", {}), HASH: digest}
            selector = owner["spec"]["selector"]
            body = {
                "metadata": {
                    "name": name,
                    "labels": labels,
                    "annotations": {REVISION: revision},
                    "ownerReferences": [owner_reference(owner)],
                },
                "spec": {
                    "replicas": 0,
                    "selector": {**selector, "matchLabels": {**selector.get("matchLabels", {}), HASH: digest}},
                    "template": {**template, "metadata": {**template["metadata"], "labels": labels}},
                },
            }
            found = self._api.create("ReplicaSet", namespace, body, manager=CONTROLLER)
        elif _revision(found) != revision:
            found = self._annotate("ReplicaSet", found, revision)
        if owner["metadata"].get("annotations", {}).get(REVISION) != revision:
            self._annotate("Deployment", owner, revision)
        return found, [dict(one) for one in sets if one["metadata"]["name"] != name]

    def _annotate(self, kind: str, obj: Obj, revision: str) -> Obj:
        patch = {"metadata": {"annotations": {REVISION: revision}}}
        return self._api.patch(kind, *key_of(obj), patch, manager=CONTROLLER)

    def _scale(self, one: Obj, replicas: int) -> None:
        if one["spec"]["replicas"] != replicas:
            self._api.patch("ReplicaSet", *key_of(one), {"spec": {"replicas": replicas}}, manager=CONTROLLER)

    def _recreate(self, owner: Obj, new: Obj, old: list[Obj]) -> None:
        for one in old:
            self._scale(one, 0)
        if not any(controlled(self._api.store, one) for one in old):
            self._scale(new, owner["spec"]["replicas"])

    def _roll(self, owner: Obj, new: Obj, old: list[Obj]) -> None:
        wanted, rolling = owner["spec"]["replicas"], owner["spec"]["strategy"]["rollingUpdate"]
        surge = whole(rolling["maxSurge"], wanted, up=True)
        unavailable = whole(rolling["maxUnavailable"], wanted, up=False)
        if not surge and not unavailable:
            unavailable = 1
        have = new["spec"]["replicas"]
        total = have + sum(one["spec"]["replicas"] for one in old)
        room = max(0, wanted + surge - total)
        grown = min(wanted, have + room) if have < wanted else wanted
        self._scale(new, grown)
        self._shrink(old, total + grown - have, grown - min(grown, self._ready(new)), wanted - unavailable)

    def _shrink(self, old: list[Obj], total: int, unready_new: int, minimum: int) -> None:
        """Scales old ReplicaSets down: first their unready pods, then ready ones above the `minimum` of ready pods."""
        spare = total - minimum - unready_new
        for only_unready in (True, False):
            for one in old:
                have, ready = one["spec"]["replicas"], min(one["spec"]["replicas"], self._ready(one))
                drop = max(0, min(have - ready if only_unready else have, spare))
                one["spec"] = {**one["spec"], "replicas": have - drop}
                spare -= drop
        for one in old:
            live = self._api.store.get(SETS, *key_of(one))
            if live is not None:
                self._scale(live, one["spec"]["replicas"])

    def _ready(self, one: Obj) -> int:
        """Counted from the pods: the status may be of before the last scaling."""
        pods = controlled(self._api.store, one)
        return sum(is_ready(pod) and not is_terminating(pod) for pod in pods)

    def _trim(self, owner: Obj, old: list[Obj]) -> None:
        idle = [one for one in old if not one["spec"]["replicas"] and not one.get("status", {}).get("replicas")]
        idle.sort(key=lambda one: int(_revision(one)))
        for one in idle[: max(0, len(idle) - owner["spec"]["revisionHistoryLimit"])]:
            self._api.delete("ReplicaSet", *key_of(one))

    def _report(self, key: Key) -> None:
        owner = self._api.store.get(DEPLOYMENTS, *key)
        if owner is None:
            return
        now, old = self._api.clock.stamp(), owner.get("status", {})
        sets = controlled(self._api.store, owner, SETS)
        digest = template_hash(owner["spec"]["template"])
        replicas = sum(one.get("status", {}).get("replicas", 0) for one in sets)
        ready = sum(self._ready(one) for one in sets)
        new = [one for one in sets if one["metadata"]["labels"][HASH] == digest]
        updated = sum(one.get("status", {}).get("replicas", 0) for one in new)
        wanted = owner["spec"]["replicas"]
        rolling = owner["spec"]["strategy"].get("rollingUpdate") or {}
        enough = ready >= wanted - whole(rolling.get("maxUnavailable", 0), wanted, up=False)
        done = updated == replicas == ready == wanted
        status = {
            "observedGeneration": owner["metadata"]["generation"],
            "replicas": replicas or None,
            "updatedReplicas": updated or None,
            "readyReplicas": ready or None,
            "availableReplicas": ready or None,
            "unavailableReplicas": max(0, max(wanted, replicas) - ready) or None,
            "conditions": [
                _condition("Available", enough, f"MinimumReplicas{'Available' if enough else 'Unavailable'}", old, now),
                _condition("Progressing", True, "NewReplicaSetAvailable" if done else "ReplicaSetUpdated", old, now),
            ],
        }
        write_status(self._api, owner, status)


def _revision(one: Obj) -> str:
    text: str = one["metadata"].get("annotations", {}).get(REVISION, "0")
    return text
