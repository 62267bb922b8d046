"""The operator driven by hand: real reconcilers, caches and queue, on an API server in memory with a clock of its own.

Nothing happens by itself, so a test decides what the operator has seen, and when it dies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from kube_world import NAMESPACE

from diptych.errors import DiptychError, NotFound, Unavailable
from diptych.group.crds import crds
from diptych.group.operator.api import FIELD_MANAGER, ApiError, Conflict
from diptych.group.operator.cache import Cache
from diptych.group.operator.cluster import Cluster
from diptych.group.operator.events import Events
from diptych.group.operator.main import KINDS, reconcilers, selector
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.queue import KeyQueue
from diptych.group.operator.resources import EVENT, GROUP, Json, Kind, key_of
from diptych.group.operator.routes import CONTROLLERS, Key, keys
from diptych.testing.kube import ApiError as ServerError
from diptych.testing.kube import Cluster as KubeCluster
from diptych.testing.kube import Deleting
from diptych.testing.kube.selectors import label_selector
from diptych.testing.kube.store import Change

LIMIT = 400  # reconciles until the operator has come to rest


class Crash(BaseException):
    """The operator's process ends here."""


class DirectApi:
    """The calls of operator.api.Api without HTTP. `crash_after`: writes until the process ends, after the last one."""

    def __init__(self, cluster: KubeCluster) -> None:
        self._api = cluster.api
        self.writes: list[tuple[str, str, str]] = []
        self.crash_after: int | None = None
        self.down = False

    def get(self, kind: Kind, namespace: str, name: str) -> Json:
        return self._call(lambda: self._api.get(_id(kind), namespace, name))

    def list(self, kind: Kind, namespace: str = "", selector: str = "") -> tuple[list[Json], str]:
        page = self._call(lambda: self._api.list(_id(kind), namespace or None, labels=selector))
        return page.items, str(page.revision)

    def apply(self, kind: Kind, obj: Json, subresource: str = "") -> Json:
        body = {"apiVersion": kind.api_version, "kind": kind.kind, **obj}
        where = key_of(obj)
        options: dict[str, Any] = {"manager": FIELD_MANAGER, "force": True, "subresource": subresource}
        return self._write("apply", kind, where[1], lambda: self._api.apply(_id(kind), *where, body, **options))

    def merge(self, kind: Kind, namespace: str, name: str, patch: Json, subresource: str = "") -> Json:
        options: dict[str, Any] = {"manager": FIELD_MANAGER, "subresource": subresource}
        return self._write("patch", kind, name, lambda: self._api.patch(_id(kind), namespace, name, patch, **options))

    def replace(self, kind: Kind, obj: Json) -> Json:
        body = {"apiVersion": kind.api_version, "kind": kind.kind, **obj}
        where = key_of(obj)
        return self._write(
            "update", kind, where[1], lambda: self._api.update(_id(kind), *where, body, manager=FIELD_MANAGER)
        )

    def delete(self, kind: Kind, namespace: str, name: str, uid: str, *, foreground: bool = False) -> Json | None:
        options = Deleting(uid=uid, policy="Foreground" if foreground else "Background")
        try:
            return self._write("delete", kind, name, lambda: self._api.delete(_id(kind), namespace, name, options))
        except (NotFound, Conflict):
            return None

    def _write(self, verb: str, kind: Kind, name: str, call: Callable[[], Json]) -> Json:
        answer = self._call(call)
        if kind != EVENT:
            self.writes.append((verb, kind.kind, name))
            if self.crash_after is not None:
                self.crash_after -= 1
                if self.crash_after <= 0:
                    raise Crash
        return answer

    def _call(self, call: Callable[[], Any]) -> Any:
        if self.down:
            raise Unavailable("the API server does not answer")
        try:
            return call()
        except ServerError as error:
            raise _error(error) from None
        except KeyError as error:
            raise NotFound(str(error)) from None


def _id(kind: Kind) -> str:
    return f"{kind.api_version}/{kind.kind}"


def _error(error: ServerError) -> DiptychError:
    text = str(error)
    return {404: NotFound(text), 409: Conflict(text)}.get(error.code, ApiError(text))


class Driver:
    """One cluster and the operators that live in it, one after the other."""

    def __init__(self, **cluster: Any) -> None:
        self.cluster = KubeCluster(clock="manual", **cluster)
        self.cluster.create(*crds())
        self.api = DirectApi(self.cluster)
        self._kinds = {kind.key: ours for ours in KINDS if (kind := self._kind(ours)) is not None}
        self._matches = {kind: label_selector(selector(kind)) for kind in KINDS}
        self._news: list[Change] = []
        self.deaf = False  # watches bring nothing for a while
        self.checks: list[Callable[[], None]] = []  # called after every step of the cluster and every reconcile
        self.cluster.store.listeners.append(self._news.append)
        self.restart()

    def _kind(self, kind: Kind) -> Any:
        try:
            return self.cluster.kinds.find(_id(kind))
        except KeyError:
            return None

    # ---- the operator ----

    def restart(self) -> None:
        """A new process: an empty memory, everything listed."""
        self.queue: KeyQueue[Key] = KeyQueue(clock=self.cluster.clock.now)
        self.api.crash_after = None
        self._news.clear()
        metrics = Metrics()
        self.caches = {kind: Cache(kind, self._on_change(kind)) for kind in KINDS}
        events = Events(self.api, "driver", self.cluster.clock.now)  # type: ignore[arg-type]
        self.memory = Cluster(self.api, self.caches, events, metrics)  # type: ignore[arg-type]
        self.reconcilers = reconcilers(self.memory, self.cluster.clock.now)
        for kind in self._kinds.values():
            self.caches[kind].begin_list()
            self.caches[kind].replace(*self.api.list(kind, "", selector(kind)))

    def _on_change(self, kind: Kind) -> Callable[[Json], None]:
        def on_change(obj: Json) -> None:
            for key in keys(kind, obj, self.caches):
                self.queue.add(key)

        return on_change

    def hear(self, count: int | None = None) -> None:
        """The next `count` changes (all) reach the operator, unless it is deaf."""
        if self.deaf:
            return
        news, self._news[:] = self._news[:count], self._news[count:] if count is not None else []
        for change in news:
            kind = self._kinds.get(change.resource)
            if kind is None:
                continue
            obj, matches = copy.deepcopy(change.obj), self._matches[kind]
            version = obj["metadata"]["resourceVersion"]
            if change.type != "DELETED" and matches(obj["metadata"].get("labels", {})):
                self.caches[kind].put(obj)
            elif change.before is not None and matches(change.before["metadata"].get("labels", {})):
                self.caches[kind].drop(key_of(obj), version)

    def reconcile_one(self) -> bool:
        """One key that is due; False if none is. A failure is put back, as by the operator's workers."""
        key = self.queue.get(0)
        if key is None:
            return False
        try:
            again_s = self.reconcilers[key.controller].reconcile(key.namespace, key.name)
            self.queue.succeeded(key)
            if again_s is not None:
                self.queue.add_after(key, again_s)
        except DiptychError:
            self.queue.retry(key)
        finally:
            self.queue.done(key)
            self._check()
        return True

    def _check(self) -> None:
        for check in self.checks:
            check()

    # ---- time ----

    def step(self) -> bool:
        """One step of the cluster, and everything the operator makes of it. False if nothing is left to do now."""
        busy = self.cluster.work.run_one()
        self._check()
        self.hear()
        while self.reconcile_one():
            busy = True
            self.hear()
        return busy

    def settle(self) -> None:
        """Until neither the cluster nor the operator has anything to do at this time."""
        for _ in range(LIMIT * 20):
            if not self.step():
                return
        raise AssertionError(f"no rest; the last writes: {self.api.writes[-20:]}")

    def run(self, seconds: float, tick_s: float = 0.5) -> None:
        """Time passes, and everything happens that it brings."""
        self.settle()
        end_s = self.cluster.clock.now() + seconds
        while self.cluster.clock.now() < end_s:
            self.cluster.clock.move(min(end_s, self.cluster.clock.now() + tick_s))
            self.settle()

    # ---- objects ----

    def create(self, *objects: Json) -> None:
        self.cluster.create(*copy.deepcopy(objects), namespace=NAMESPACE)

    def read(self, kind: str, name: str) -> Json:
        return self.cluster.api.get(kind, NAMESPACE, name)

    def names(self, kind: str) -> list[str]:
        return sorted(each["metadata"]["name"] for each in self.cluster.objects(kind, NAMESPACE))

    def edit(self, name: str, change: Callable[[Json], Any], kind: str = "RoleBasedGroup") -> Json:
        obj = self.read(kind, name)
        change(obj)
        return self.cluster.api.update(kind, NAMESPACE, name, obj)

    def delete(self, kind: str, name: str, policy: str = "Background") -> None:
        self.cluster.api.delete(kind, NAMESPACE, name, Deleting(policy=policy))

    def pods(self, of_role: str = "") -> dict[str, Json]:
        """Pods that are not ending, by name."""
        key = "rolebasedgroup.workloads.x-k8s.io/role"
        return {
            pod["metadata"]["name"]: pod
            for pod in self.cluster.objects("Pod", NAMESPACE)
            if "deletionTimestamp" not in pod["metadata"] and of_role in ("", pod["metadata"]["labels"].get(key))
        }

    def conditions(self, name: str, kind: str = GROUP.kind) -> dict[str, Json]:
        status = self.read(kind, name).get("status") or {}
        return {each["type"]: each for each in status.get("conditions") or []}

    def ready(self, name: str) -> bool:
        """Of the spec as it is now."""
        found = self.read(GROUP.kind, name)
        ready = self.conditions(name).get("Ready", {})
        return ready.get("status") == "True" and ready.get("observedGeneration") == found["metadata"]["generation"]

    def events(self, reason: str) -> list[str]:
        return [each["message"] for each in self.cluster.objects("Event") if each["reason"] == reason]

    def rests(self, seconds: float = 60.0) -> bool:
        """Whether the operator writes nothing while time passes, nor when it looks at everything again."""
        before = len(self.api.writes)
        for kind, controller in CONTROLLERS.items():
            for key in self.caches[kind].all_keys():
                self.queue.add(Key(controller, *key))
        self.run(seconds, tick_s=5.0)
        return len(self.api.writes) == before


def refuse(driver: Driver, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The API server refuses every apply of this kind, until `monkeypatch.undo`."""
    apply = driver.api.apply

    def refusing(kind: Kind, obj: Json, subresource: str = "") -> Json:
        if kind.kind == what:
            raise ApiError(f"exceeded quota of {what}")
        return apply(kind, obj, subresource)

    monkeypatch.setattr(driver.api, "apply", refusing)


def image_of(pod: Json) -> str:
    return str(pod["spec"]["containers"][0]["image"])


def set_image(image: str, *roles: str) -> Callable[[Json], None]:
    def change(obj: Json) -> None:
        for each in obj["spec"]["roles"]:
            if not roles or each["name"] in roles:
                each["template"]["spec"]["containers"][0]["image"] = image

    return change


def is_pod_ready(pod: Json) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
