"""What scheduler and kubelet do to pods: bind, run, become ready, restart, fail, end. No container really runs.

Times and outcomes come from `Behaviour`s that a test sets; probes in a pod's spec are not carried out.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from diptych.testing.kube import gang, podstatus
from diptych.testing.kube.api import Api
from diptych.testing.kube.controllers import Key, Work
from diptych.testing.kube.deletion import Deleting
from diptych.testing.kube.status import Obj
from diptych.testing.kube.store import Change, key_of

PODS, CONFIG_MAPS = ("", "pods"), ("", "configmaps")
MANAGER = "kubelet"
_EPSILON_S = 1e-6  # a timer may fire this much early, in floating point


@dataclass(frozen=True)
class Behaviour:
    """Seconds from one step of a pod's life to the next; None: it never comes.

    `scheduled_s` from creation, `running_s` from binding, `ready_s` from running (and from every restart),
    `ended_s` from deletion (never longer than the grace period). `crash_s`: the containers restart whenever they ran
    that long; `fail_s`: the pod fails when it ran that long.
    """

    scheduled_s: float | None = 0.0
    running_s: float | None = 0.0
    ready_s: float | None = 0.0
    ended_s: float | None = 0.0
    crash_s: float | None = None
    fail_s: float | None = None


@dataclass
class _Life:
    """When a pod's steps happened, by the cluster's clock."""

    created_s: float
    bound_s: float | None = None
    started_s: float | None = None
    deleted_s: float | None = None
    ready: bool | None = None  # set by hand


class Kubelet:
    """`behaviour` is every pod's, unless a rule matches (the latest one wins)."""

    def __init__(self, api: Api, work: Work, nodes: int = 3) -> None:
        self._api, self._work, self._nodes = api, work, nodes
        self.behaviour = Behaviour()
        self._rules: list[tuple[Callable[[Obj], bool], Behaviour]] = []
        self._lives: dict[str, _Life] = {}
        self._bound = self._started = 0
        self._waiting: dict[tuple[str, str], set[Key]] = defaultdict(set)

    # for tests

    def rule(
        self, *, labels: Mapping[str, str] | None = None, name: str = "*", **behaviour: float | None
    ) -> Callable[[], None]:
        """Pods with these labels, and a name like the pattern, behave so: `rule(name="a-*", ready_s=None)`. Fields not
        given are as in `behaviour`. Returns what removes the rule again.
        """
        wanted = dict(labels or {}).items()

        def matches(pod: Obj) -> bool:
            return fnmatchcase(pod["metadata"]["name"], name) and wanted <= pod["metadata"].get("labels", {}).items()

        with self._api.lock:
            rule = (matches, dataclasses.replace(self.behaviour, **behaviour))
            self._rules.append(rule)
            self._recheck()

        def undo() -> None:
            with self._api.lock:
                if rule in self._rules:
                    self._rules.remove(rule)
                self._recheck()

        return undo

    def crash(self, name: str, namespace: str = "default", *, container: str | None = None) -> None:
        """One container (the first) restarts now. Raises ApiError 404."""
        with self._api.lock:
            pod = self._api.get("Pod", namespace, name)
            self._restart(pod, container or pod["spec"]["containers"][0]["name"])

    def fail(self, name: str, namespace: str = "default", *, reason: str = "Evicted") -> None:
        """The pod's phase becomes Failed, for good. Raises ApiError 404."""
        with self._api.lock:
            pod = self._api.get("Pod", namespace, name)
            self._write(pod, podstatus.failed(pod, reason, self._api.clock.stamp()))

    def set_ready(self, name: str, ready: bool | None, namespace: str = "default") -> None:
        """Holds readiness at `ready`, whatever the behaviour says; None lets go. Raises ApiError 404."""
        with self._api.lock:
            pod = self._api.get("Pod", namespace, name)
            self._life(pod).ready = ready
            self.sync(key_of(pod))

    # the controller

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == PODS:
            yield change.key
            if change.type == "ADDED":
                yield from (key_of(pod) for pod in gang.waiting_with(self._api.store, change.obj))
        elif change.resource == CONFIG_MAPS and change.type == "ADDED":
            yield from sorted(self._waiting.pop(change.key, set()), key=str)
        elif change.resource[1] == "podgroups":
            namespace = change.key[0]
            yield from (key_of(pod) for pod in self._api.store.all(PODS, namespace) if "nodeName" not in pod["spec"])

    def sync(self, key: Key) -> None:
        namespace, name = key
        pod = self._api.store.get(PODS, namespace, name)
        if pod is None:
            self._forget()
            return
        behaviour, life = self._behaviour(pod), self._life(pod)
        if "deletionTimestamp" in pod["metadata"]:
            self._end(pod, behaviour, life)
        elif pod["status"].get("phase") in ("Failed", "Succeeded"):
            return
        elif "nodeName" not in pod["spec"]:
            self._bind(pod, behaviour, life)
        elif pod["status"].get("phase") != "Running":
            self._start(pod, behaviour, life)
        else:
            self._keep(pod, behaviour, life)

    def _behaviour(self, pod: Obj) -> Behaviour:
        for matches, behaviour in reversed(self._rules):
            if matches(pod):
                return behaviour
        return self.behaviour

    def _life(self, pod: Obj) -> _Life:
        return self._lives.setdefault(pod["metadata"]["uid"], _Life(self._api.clock.now()))

    def _forget(self) -> None:
        if len(self._lives) > 2 * sum(1 for _ in self._api.store.all(PODS)) + 64:
            alive = {pod["metadata"]["uid"] for pod in self._api.store.all(PODS)}
            self._lives = {uid: life for uid, life in self._lives.items() if uid in alive}

    def _recheck(self) -> None:
        for pod in self._api.store.all(PODS):
            self._work.enqueue(self, key_of(pod))

    def _due(self, pod: Obj, start_s: float, seconds: float | None) -> bool:
        """Whether that time has come; if it is still to come, the pod is looked at again then."""
        if seconds is None:
            return False
        left_s = start_s + seconds - self._api.clock.now()
        if left_s > _EPSILON_S:
            self._work.after(left_s, self, key_of(pod))
            return False
        return True

    def _bind(self, pod: Obj, behaviour: Behaviour, life: _Life) -> None:
        if pod["spec"].get("schedulingGates") or not gang.admitted(self._api.store, pod):
            return
        if not self._due(pod, life.created_s, behaviour.scheduled_s):
            return
        life.bound_s = self._api.clock.now()
        node = f"node-{self._bound % self._nodes}"
        self._bound += 1
        status = podstatus.bound(pod, self._api.clock.stamp())
        spec = {**pod["spec"], "nodeName": node}
        self._api.replace("Pod", {**pod, "spec": spec, "status": status}, manager="kube-scheduler")

    def _start(self, pod: Obj, behaviour: Behaviour, life: _Life) -> None:
        namespace = pod["metadata"]["namespace"]
        for name in podstatus.config_maps(pod):
            if self._api.store.get(CONFIG_MAPS, namespace, name) is None:
                self._waiting[namespace, name].add(key_of(pod))
                return
        if not self._due(pod, life.bound_s or life.created_s, behaviour.running_s):
            return
        life.started_s = self._api.clock.now()
        self._started += 1
        address = f"10.{244 + self._started // 62_500}.{self._started // 250 % 250}.{self._started % 250 + 1}"
        status = podstatus.running(pod, address, self._api.clock.stamp())
        ready = behaviour.ready_s == 0 if life.ready is None else life.ready
        self._write(pod, podstatus.with_ready({**pod, "status": status}, ready, self._api.clock.stamp()))

    def _keep(self, pod: Obj, behaviour: Behaviour, life: _Life) -> None:
        """A running pod: new images, crashes, failure, readiness."""
        started_s = life.started_s if life.started_s is not None else life.created_s
        for container in podstatus.with_new_image(pod):
            self._restart(pod, container)
            return
        if behaviour.fail_s is not None and self._due(pod, started_s, behaviour.fail_s):
            self._write(pod, podstatus.failed(pod, "Error", self._api.clock.stamp()))
            return
        if behaviour.crash_s is not None and self._due(pod, started_s, behaviour.crash_s):
            self._restart(pod, pod["spec"]["containers"][0]["name"])
            return
        ready = life.ready
        if ready is None:
            ready = self._due(pod, started_s, behaviour.ready_s)
        self._write(pod, podstatus.with_ready(pod, ready, self._api.clock.stamp()))

    def _restart(self, pod: Obj, container: str) -> None:
        self._life(pod).started_s = self._api.clock.now()
        status = podstatus.restarted(pod, container, self._api.clock.stamp())
        self._write(pod, status)

    def _end(self, pod: Obj, behaviour: Behaviour, life: _Life) -> None:
        if life.deleted_s is None:
            life.deleted_s = self._api.clock.now()
        grace_s = float(pod["metadata"].get("deletionGracePeriodSeconds") or 0)
        seconds = grace_s if behaviour.ended_s is None else min(behaviour.ended_s, grace_s)
        if grace_s == 0 and pod["metadata"].get("finalizers"):
            return
        if self._due(pod, life.deleted_s, seconds):
            namespace, name = key_of(pod)
            self._api.delete("Pod", namespace, name, Deleting(grace_s=0, uid=pod["metadata"]["uid"]))

    def _write(self, pod: Obj, status: Obj) -> None:
        if status != pod["status"]:
            self._api.update("Pod", *key_of(pod), {**pod, "status": status}, subresource="status", manager=MANAGER)
