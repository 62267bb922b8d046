"""A cluster in memory: API, controllers and a clock. `KubeServer` puts it on the network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal

from diptych.testing.kube import dns, environment
from diptych.testing.kube.api import Api
from diptych.testing.kube.clock import Clock
from diptych.testing.kube.controllers import Work
from diptych.testing.kube.deployment import Deployments, ReplicaSets
from diptych.testing.kube.disruption import Disruptions
from diptych.testing.kube.gc import GarbageCollector
from diptych.testing.kube.kinds import Kinds
from diptych.testing.kube.kubelet import Kubelet
from diptych.testing.kube.lws import LeaderWorkerSets
from diptych.testing.kube.namespaces import Namespaces
from diptych.testing.kube.statefulset import StatefulSets
from diptych.testing.kube.status import Obj
from diptych.testing.kube.store import Change, Store


class Cluster:
    """`clock` real: controllers act by themselves once a KubeServer serves the cluster. manual: nothing but the API
    moves until `settle` or `advance`.

    `gates`: feature gates that are on (known: MaxUnavailableStatefulSet). `without`: API groups that are not
    installed. `history`: changes of a resource that stay watchable. How pods behave: `pods` (see Kubelet).
    """

    def __init__(
        self,
        *,
        clock: Literal["real", "manual"] = "real",
        gates: Iterable[str] = (),
        without: Iterable[str] = (),
        history: int = 10_000,
    ) -> None:
        self.lock = threading.RLock()
        self.clock = Clock(manual=clock == "manual")
        self.store = Store(history)
        self.kinds = Kinds(frozenset(without))
        self.api = Api(self.store, self.kinds, self.clock, self.lock, frozenset(gates))
        self.on_work: Callable[[], None] = lambda: None
        self.work = Work(self.clock)
        self.pods = Kubelet(self.api, self.work)
        for controller in (
            self.pods,
            GarbageCollector(self.api, self.work),
            Namespaces(self.api),
            StatefulSets(self.api, self.work),
            ReplicaSets(self.api),
            Deployments(self.api),
            LeaderWorkerSets(self.api),
            Disruptions(self.api),
        ):
            self.work.add(controller)
        self.store.listeners.append(self._changed)
        for name in ("default", "kube-system"):
            self.namespace(name)

    def _changed(self, change: Change) -> None:
        self.work.notice(change)
        self.on_work()

    def namespace(self, name: str) -> Obj:
        """Creates a namespace."""
        return self.api.create("Namespace", "", {"metadata": {"name": name}})

    def create(self, *objects: Obj, namespace: str = "default") -> list[Obj]:
        """Creates each object in its own namespace, or in `namespace`."""
        created = []
        for obj in objects:
            kind = self.kinds.find(f"{obj['apiVersion']}/{obj['kind']}")
            where = obj.get("metadata", {}).get("namespace", namespace) if kind.namespaced else ""
            created.append(self.api.create(kind, where, obj))
        return created

    def settle(self, limit: int = 1_000_000) -> int:
        """Runs controllers and due timers until nothing is left to do now; how many steps that took.

        Raises RuntimeError after `limit` steps: something writes for ever.
        """
        for steps in range(limit):
            with self.lock:
                if not self.work.run_one():
                    return steps
        raise RuntimeError(f"the controllers did not come to rest within {limit} steps")

    def advance(self, seconds: float) -> None:
        """Moves a manual clock on, stopping at every timer on the way; controllers settle at each."""
        end_s = self.clock.now() + seconds
        self.settle()
        while (next_s := self.clock.next_at()) is not None and next_s <= end_s:
            self.clock.move(next_s)
            self.settle()
        self.clock.move(end_s)
        self.settle()

    def select(self, service: str, namespace: str = "default") -> list[str]:
        """Names of the pods that a Service's selector matches, sorted. Raises ApiError 404."""
        with self.lock:
            return dns.selected(self.store, self.api.get("Service", namespace, service))

    def resolve(self, name: str, namespace: str = "default") -> list[str]:
        """Names of the pods that a DNS name means to a pod in `namespace`; empty when it does not resolve."""
        with self.lock:
            return dns.resolve(self.store, name, namespace)

    def objects(self, kind: str, namespace: str | None = None, **selectors: Any) -> list[Obj]:
        """All objects of a kind; `labels` and `fields` select."""
        return self.api.list(kind, namespace, **selectors).items

    def environment(self, pod: str, namespace: str = "default", *, container: str = "") -> dict[str, str]:
        """The variables that the pod's container (the first) would see. Raises ApiError 404."""
        with self.lock:
            found = self.api.get("Pod", namespace, pod)
            return environment.variables(self.store, found, _container(found, container))

    def command_line(self, pod: str, namespace: str = "default", *, container: str = "") -> list[str]:
        """The command that the pod's container (the first) would run, `$(VAR)` replaced. Raises ApiError 404."""
        with self.lock:
            found = self.api.get("Pod", namespace, pod)
            return environment.command_line(self.store, found, _container(found, container))


def _container(pod: Obj, name: str) -> Obj:
    found: Obj = next(one for one in pod["spec"]["containers"] if name in ("", one["name"]))
    return found
