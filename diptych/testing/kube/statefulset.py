"""The StatefulSet controller: pods with ordinals, revisions, one pod at a time in a rolling update."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from diptych.testing.kube.api import CONTROLLER, Api
from diptych.testing.kube.controllers import Key, Work
from diptych.testing.kube.deletion import Deleting
from diptych.testing.kube.dns import is_ready
from diptych.testing.kube.owned import (
    controlled,
    has_ended,
    is_healthy,
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

SETS, REVISIONS, CLAIMS = ("apps", "statefulsets"), ("apps", "controllerrevisions"), ("", "persistentvolumeclaims")
REVISION = "controller-revision-hash"


def ordinal(pod: Obj) -> int:
    return int(pod["metadata"]["name"].rpartition("-")[2])


class StatefulSets:
    def __init__(self, api: Api, work: Work) -> None:
        self._api, self._work = api, work

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == SETS:
            yield change.key
        elif change.resource == ("", "pods") and (key := owner_key(change, "StatefulSet")):
            yield key
            if change.type == "DELETED":  # one of the same name, of an older set, may have been in the way
                yield change.key[0], change.key[1].rpartition("-")[0]

    def sync(self, key: Key) -> None:
        namespace, name = key
        found = self._api.store.get(SETS, namespace, name)
        if found is None or is_terminating(found):
            return
        update = self._revision(found)
        current = found.get("status", {}).get("currentRevision") or update
        if self._scale(found, current, update):
            self._roll(found, update)
        self._report(found, current, update)

    def _pods(self, owner: Obj) -> dict[int, Obj]:
        pods = controlled(self._api.store, owner)
        return {ordinal(pod): pod for pod in pods}

    def _revision(self, owner: Obj) -> str:
        """The name of the ControllerRevision of the present template, made if it does not exist."""
        template = {"spec": {"template": {**owner["spec"]["template"], "$patch": "replace"}}}
        digest = template_hash(template)
        name = f"{owner['metadata']['name']}-{digest}"
        known = controlled(self._api.store, owner, REVISIONS)
        newest = max((one["revision"] for one in known), default=0)
        existing = self._api.store.get(REVISIONS, owner["metadata"]["namespace"], name)
        if existing is None:
            body = {
                "metadata": {
                    "name": name,
                    "labels": {
                        **owner["spec"]["template"]["metadata"].get("labels", {}),
                        "controller.kubernetes.io/hash": digest,
                    },
                    "ownerReferences": [owner_reference(owner)],
                },
                "data": template,
                "revision": newest + 1,
            }
            self._api.create("ControllerRevision", owner["metadata"]["namespace"], body, manager=CONTROLLER)
        elif existing["revision"] < newest:  # back to an older template
            self._api.patch(
                "ControllerRevision",
                owner["metadata"]["namespace"],
                name,
                {"revision": newest + 1},
                manager=CONTROLLER,
            )
        self._trim(owner, known, name)
        return name

    def _trim(self, owner: Obj, known: list[Obj], update: str) -> None:
        """Deletes the oldest revisions beyond revisionHistoryLimit that no pod is of."""
        status = owner.get("status", {})
        live = {pod["metadata"]["labels"].get(REVISION) for pod in self._pods(owner).values()}
        live |= {update, status.get("currentRevision"), status.get("updateRevision")}
        idle = sorted((one for one in known if one["metadata"]["name"] not in live), key=lambda one: one["revision"])
        for one in idle[: max(0, len(idle) - owner["spec"]["revisionHistoryLimit"])]:
            self._api.delete("ControllerRevision", *key_of(one))

    def _template_of(self, owner: Obj, revision: str) -> Obj:
        stored = self._api.store.get(REVISIONS, owner["metadata"]["namespace"], revision)
        template: Obj = dict((stored["data"] if stored else owner)["spec"]["template"])
        template.pop("$patch", None)
        return template

    def _create(self, owner: Obj, index: int, revision: str) -> None:
        spec, namespace = owner["spec"], owner["metadata"]["namespace"]
        name = f"{owner['metadata']['name']}-{index}"
        if self._api.store.get(("", "pods"), namespace, name) is not None:
            return  # someone else's pod, or an older set's that still ends
        labels = {
            "statefulset.kubernetes.io/pod-name": name,
            "apps.kubernetes.io/pod-index": str(index),
            REVISION: revision,
        }
        pod = pod_from(self._template_of(owner, revision), owner, name, labels)
        pod["spec"].update(hostname=name, subdomain=spec.get("serviceName", ""))
        for claim in spec.get("volumeClaimTemplates", []):
            self._claim(owner, claim, name)
            volume = {"name": claim["metadata"]["name"]}
            volume["persistentVolumeClaim"] = {"claimName": f"{volume['name']}-{name}"}
            others = [one for one in pod["spec"].get("volumes", []) if one["name"] != volume["name"]]
            pod["spec"]["volumes"] = [*others, volume]
        self._api.create("Pod", namespace, pod, manager=CONTROLLER)

    def _claim(self, owner: Obj, template: Obj, pod: str) -> None:
        namespace, name = owner["metadata"]["namespace"], f"{template['metadata']['name']}-{pod}"
        if self._api.store.get(CLAIMS, namespace, name) is None:
            metadata = {**template["metadata"], "name": name}
            body = {"metadata": metadata, "spec": template["spec"]}
            self._api.create("PersistentVolumeClaim", namespace, body, manager=CONTROLLER)

    def _delete(self, pod: Obj) -> None:
        self._api.delete("Pod", *key_of(pod), Deleting(uid=pod["metadata"]["uid"]))

    def _scale(self, owner: Obj, current: str, update: str) -> bool:
        """Creates missing pods from the lowest ordinal up, deletes surplus ones from the highest down.

        False when an ordered set has to wait for a pod: then nothing else may happen.
        """
        spec = owner["spec"]
        start = spec.get("ordinals", {}).get("start", 0)
        wanted = range(start, start + spec["replicas"])
        ordered = spec["podManagementPolicy"] == "OrderedReady"
        partition = (spec["updateStrategy"].get("rollingUpdate") or {}).get("partition", 0)
        pods = self._pods(owner)
        for index in wanted:
            pod = pods.get(index)
            if pod is None:
                self._create(owner, index, current if index < start + partition else update)
                if ordered:
                    return False
            elif has_ended(pod) and not is_terminating(pod):
                self._delete(pod)
                if ordered:
                    return False
            elif ordered and not is_healthy(pod):
                return False
        for index in sorted(pods.keys() - set(wanted), reverse=True):
            if not is_terminating(pods[index]):
                self._delete(pods[index])
            if ordered:
                return False
        return True

    def _roll(self, owner: Obj, update: str) -> None:
        """Deletes outdated pods from the highest ordinal down to the partition, while enough are available.

        Without the gate MaxUnavailableStatefulSet the field is never stored, and one pod at a time it is.
        """
        spec = owner["spec"]
        strategy = spec["updateStrategy"]
        if strategy["type"] != "RollingUpdate":
            return
        rolling = strategy.get("rollingUpdate") or {}
        start = spec.get("ordinals", {}).get("start", 0)
        last = start + spec["replicas"]
        pods = self._pods(owner)
        allowed = max(1, whole(rolling.get("maxUnavailable", 1), spec["replicas"], up=False))
        unavailable = 0
        for index in range(last - 1, start + rolling.get("partition", 0) - 1, -1):
            pod = pods.get(index)
            if pod is None:
                unavailable += 1
            elif pod["metadata"]["labels"].get(REVISION) != update and not is_terminating(pod):
                self._delete(pod)
                unavailable += 1
            elif not is_healthy(pod):
                unavailable += 1
            if unavailable >= allowed:
                return

    def _available(self, owner: Obj, pods: list[Obj]) -> int:
        minimum_s = owner["spec"].get("minReadySeconds", 0)
        if not minimum_s:
            return len(pods)
        count = 0
        for pod in pods:
            since = next(one["lastTransitionTime"] for one in pod["status"]["conditions"] if one["type"] == "Ready")
            left_s = datetime.fromisoformat(since).timestamp() + minimum_s - self._api.clock.now()
            if left_s <= 0:
                count += 1
            else:
                self._work.after(left_s, self, key_of(owner))
        return count

    def _report(self, owner: Obj, current: str, update: str) -> None:
        live = self._api.store.get(SETS, *key_of(owner)) or owner
        pods = [pod for pod in self._pods(live).values() if not has_ended(pod)]
        alive = [pod for pod in pods if not is_terminating(pod)]
        ready = [pod for pod in pods if pod["status"].get("phase") == "Running" and is_ready(pod)]
        revisions = [pod["metadata"]["labels"].get(REVISION) for pod in alive]
        updated, replicas = revisions.count(update), live["spec"]["replicas"]
        rolls = live["spec"]["updateStrategy"]["type"] == "RollingUpdate"  # OnDelete never completes an update
        if rolls and len(pods) == len(ready) == updated == replicas:
            current = update
        status = {
            "observedGeneration": live["metadata"]["generation"],
            "replicas": len(pods),
            "readyReplicas": len(ready) or None,
            "availableReplicas": self._available(live, ready),
            "currentReplicas": revisions.count(current) or None,
            "updatedReplicas": updated or None,
            "currentRevision": current,
            "updateRevision": update,
            "collisionCount": 0,
        }
        write_status(self._api, live, status)
