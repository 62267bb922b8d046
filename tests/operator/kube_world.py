"""An API server of our own with real HTTP, and operators in threads that reach it with the official client."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes.client import Configuration
from kubernetes.config import load_kube_config

from diptych.group.crds import crds
from diptych.group.operator.api import Api, Conflict
from diptych.group.operator.main import Operator
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.resources import GROUP, Json, Kind
from diptych.testing.kube import Behaviour, Cluster, KubeServer

NAMESPACE = "default"
DEADLINE_S = 30.0  # of any wait: reached only when something is wrong


def until(done: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Waits for a true value and returns it."""
    ends = time.monotonic() + deadline_s
    while not (found := done()):
        assert time.monotonic() < ends, f"{what} did not come about within {deadline_s:g} s"
        time.sleep(0.01)
    return found


def role(name: str, replicas: int = 1, *, image: str = "engine:1", **more: Any) -> Json:
    template = {"spec": {"containers": [{"name": "engine", "image": image}]}}
    return {"name": name, "replicas": replicas, "template": template, **more}


def group(name: str, *roles: Json, annotations: dict[str, str] | None = None, **spec: Any) -> Json:
    return {
        "apiVersion": GROUP.api_version,
        "kind": GROUP.kind,
        "metadata": {"name": name, "namespace": NAMESPACE, "annotations": annotations or {}},
        "spec": {"roles": list(roles), **spec},
    }


class World:
    """`start` operators, create groups, look. Everything ends with `close`."""

    def __init__(self, folder: Path, **cluster: Any) -> None:
        self.server = KubeServer(Cluster(**cluster))
        self.server.start()
        self.cluster = self.server.cluster
        self.cluster.pods.behaviour = Behaviour(ready_s=0.05)
        self.cluster.create(*crds())
        self._kubeconfig = self.server.kubeconfig(folder / "kubeconfig")
        self.api = Api(self.configuration(), Metrics())
        self._running: list[tuple[Operator, threading.Thread]] = []

    def configuration(self) -> Configuration:
        configuration = Configuration()
        load_kube_config(str(self._kubeconfig), client_configuration=configuration)
        return configuration

    def start(self, identity: str = "one", *, elect: bool = False, **options: Any) -> Operator:
        operator = Operator(self.configuration(), NAMESPACE, NAMESPACE, identity=identity, elect=elect, **options)
        thread = threading.Thread(target=operator.run, name=f"operator-{identity}")
        thread.start()
        self._running.append((operator, thread))
        return operator

    def stop(self, operator: Operator) -> None:
        operator.stop()
        for each, thread in self._running:
            if each is operator:
                thread.join(DEADLINE_S)
                assert not thread.is_alive()

    def close(self) -> None:
        for operator, _ in self._running:
            self.stop(operator)
        self.api.close()
        self.server.stop()

    # ---- objects ----

    def create(self, *objects: Json) -> None:
        self.cluster.create(*copy.deepcopy(objects), namespace=NAMESPACE)

    def read(self, kind: str, name: str) -> Json:
        """Raises ApiError 404."""
        return self.cluster.api.get(kind, NAMESPACE, name)

    def names(self, kind: str) -> list[str]:
        return sorted(each["metadata"]["name"] for each in self.cluster.objects(kind, NAMESPACE))

    def edit(self, name: str, change: Callable[[Json], None], kind: Kind = GROUP) -> Json:
        """Changes an object as a person with an editor would: again if it was changed meanwhile."""
        while True:
            obj = self.api.get(kind, NAMESPACE, name)
            change(obj)
            try:
                return self.api.replace(kind, obj)
            except Conflict:
                continue

    def delete(self, kind: Kind, name: str) -> None:
        assert (
            self.api.delete(kind, NAMESPACE, name, self.api.get(kind, NAMESPACE, name)["metadata"]["uid"]) is not None
        )

    # ---- groups ----

    def conditions(self, name: str) -> dict[str, Json]:
        status = self.read("RoleBasedGroup", name).get("status") or {}
        return {each["type"]: each for each in status.get("conditions") or []}

    def is_ready(self, name: str) -> bool:
        """Of the spec as it is now, and no update goes on."""
        found = self.read("RoleBasedGroup", name)
        status = found.get("status") or {}
        conditions = {each["type"]: each["status"] for each in status.get("conditions") or []}
        return (
            status.get("observedGeneration") == found["metadata"]["generation"]
            and conditions.get("Ready") == "True"
            and conditions.get("RollingUpdateInProgress") == "False"
        )

    def wait_ready(self, name: str) -> None:
        until(lambda: self.is_ready(name), f"{name} is ready")

    def pods(self, of_role: str = "") -> dict[str, Json]:
        """Pods that are not ending, by name."""
        key = "rolebasedgroup.workloads.x-k8s.io/role"
        return {
            pod["metadata"]["name"]: pod
            for pod in self.cluster.objects("Pod", NAMESPACE)
            if "deletionTimestamp" not in pod["metadata"] and of_role in ("", pod["metadata"]["labels"].get(key))
        }

    def quiet(self, since: int | None = None, seconds: float = 1.5) -> list[Any]:
        """The writes within `seconds`: none once nothing is left to do."""
        mark = self.server.record.mark() if since is None else since
        time.sleep(seconds)  # to see that nothing happens takes time
        return self.server.record.writes(mark)
