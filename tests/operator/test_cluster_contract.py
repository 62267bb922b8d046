"""The contract with any cluster: a few stories, told on our API server or, with DIPTYCH_TEST_CLUSTER=1, on the cluster
of the kubeconfig.

There everything lives in a namespace that is made for it and deleted afterwards; the CRDs must be installed
(`diptych crds | kubectl apply -f -`), and no other operator may watch that namespace. What differs between the two is
a bug of ours.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kube_world import World

from diptych.group.operator.api import Api, Conflict
from diptych.group.operator.main import Operator, connect
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.resources import (
    ADAPTER,
    CONFIG_MAP,
    GROUP,
    POD,
    REVISION,
    SERVICE,
    STATEFUL_SET,
    Json,
    Kind,
)

REAL = os.environ.get("DIPTYCH_TEST_CLUSTER") == "1"
IMAGE = os.environ.get("DIPTYCH_TEST_IMAGE", "registry.k8s.io/pause:3.9")
SECOND_IMAGE = os.environ.get("DIPTYCH_TEST_IMAGE_2", "registry.k8s.io/pause:3.10")
DEADLINE_S = 300.0 if REAL else 30.0
NAMESPACES = Kind("", "v1", "Namespace", "namespaces", namespaced=False)
GROUP_LABEL = "rolebasedgroup.workloads.x-k8s.io/name"


class Place:
    """A namespace with an operator."""

    def __init__(self, configuration: Callable[[], Any], namespace: str) -> None:
        self.namespace = namespace
        self.api = Api(configuration(), Metrics())
        self._operator = Operator(configuration(), namespace, namespace, identity="contract")
        self._thread = threading.Thread(target=self._operator.run)
        self._thread.start()

    def close(self) -> None:
        self._operator.stop()
        self._thread.join(60)
        self.api.close()
        assert not self._thread.is_alive()

    def create(self, name: str, *roles: Json, **spec: Any) -> None:
        self.api.create(
            GROUP, {"metadata": {"namespace": self.namespace, "name": name}, "spec": {"roles": roles, **spec}}
        )

    def edit(self, name: str, change: Callable[[Json], Any]) -> None:
        while True:
            obj = self.api.get(GROUP, self.namespace, name)
            change(obj)
            try:
                self.api.replace(GROUP, obj)
                return
            except Conflict:
                continue

    def delete(self, kind: Kind, name: str) -> None:
        self.api.delete(kind, self.namespace, name, self.api.get(kind, self.namespace, name)["metadata"]["uid"])

    def objects(self, kind: Kind, name: str) -> dict[str, Json]:
        """Those of a group that are not ending."""
        found, _ = self.api.list(kind, self.namespace, f"{GROUP_LABEL}={name}")
        return {each["metadata"]["name"]: each for each in found if "deletionTimestamp" not in each["metadata"]}

    def images(self, name: str) -> dict[str, str]:
        pods = self.objects(POD, name)
        return {pod: each["spec"]["containers"][0]["image"] for pod, each in pods.items()}

    def until(self, done: Callable[[], Any], what: str) -> None:
        ends = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < ends, f"{what} did not come about within {DEADLINE_S:g} s"
            time.sleep(0.5 if REAL else 0.02)

    def is_ready(self, name: str) -> bool:
        found = self.api.get(GROUP, self.namespace, name)
        status = found.get("status") or {}
        conditions = {each["type"]: each["status"] for each in status.get("conditions") or []}
        return (
            status.get("observedGeneration") == found["metadata"]["generation"]
            and conditions.get("Ready") == "True"
            and conditions.get("RollingUpdateInProgress") == "False"
        )

    def wait_ready(self, name: str) -> None:
        self.until(lambda: self.is_ready(name), f"{name} is ready")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    if not REAL:
        world = World(tmp_path)
        made = Place(world.configuration, "default")
        yield made
        made.close()
        world.close()
        return
    namespace = f"diptych-test-{uuid.uuid4().hex[:8]}"
    api = Api(connect(None)[0], Metrics())
    created = api.create(NAMESPACES, {"metadata": {"name": namespace}})
    made = Place(lambda: connect(None)[0], namespace)
    try:
        yield made
    finally:
        made.close()
        api.delete(NAMESPACES, "", namespace, created["metadata"]["uid"])
        api.close()


def role(name: str, replicas: int, **more: Any) -> Json:
    template = {"spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": IMAGE}]}}
    return {"name": name, "replicas": replicas, "template": template, **more}


def test_a_group_comes_in_order_is_repaired_and_goes(place: Place) -> None:
    place.create("g", role("router", 1, dependencies=["engine"]), role("engine", 2))
    place.wait_ready("g")
    assert sorted(place.objects(POD, "g")) == ["g-engine-0", "g-engine-1", "g-router-0"]
    born = {name: each["metadata"]["creationTimestamp"] for name, each in place.objects(STATEFUL_SET, "g").items()}
    assert born["g-engine"] <= born["g-router"]
    for kind, name in ((SERVICE, "g-engine"), (CONFIG_MAP, "g"), (STATEFUL_SET, "g-engine")):
        place.delete(kind, name)
        place.until(lambda kind=kind, name=name: name in place.objects(kind, "g"), f"a new {kind.kind}")  # type: ignore[misc]
    place.wait_ready("g")
    place.delete(GROUP, "g")
    for kind in (POD, STATEFUL_SET, SERVICE, CONFIG_MAP, REVISION):
        place.until(lambda kind=kind: not place.objects(kind, "g"), f"no {kind.kind}")  # type: ignore[misc]


def test_updates_and_scaling(place: Place) -> None:
    place.create("g", role("a", 3, rolloutStrategy={"rollingUpdate": {"maxUnavailable": 2}}), role("b", 1))
    place.wait_ready("g")
    before = place.objects(POD, "g")

    def change(obj: Json) -> None:
        obj["spec"]["roles"][0]["template"]["spec"]["containers"][0]["image"] = SECOND_IMAGE
        obj["spec"]["roles"][1]["replicas"] = 2

    place.edit("g", change)
    wanted = {f"g-a-{i}": SECOND_IMAGE for i in range(3)} | {f"g-b-{i}": IMAGE for i in range(2)}
    place.until(lambda: place.images("g") == wanted, "the new images, and a second b")
    place.wait_ready("g")
    assert place.objects(POD, "g")["g-b-0"]["metadata"]["uid"] == before["g-b-0"]["metadata"]["uid"]


def test_a_partition_and_a_pause(place: Place) -> None:
    place.create("g", role("a", 2, rolloutStrategy={"rollingUpdate": {"partition": 1}}))
    place.wait_ready("g")
    image = {"image": SECOND_IMAGE}
    place.edit("g", lambda each: each["spec"]["roles"][0]["template"]["spec"]["containers"][0].update(image))
    place.until(lambda: place.images("g") == {"g-a-0": IMAGE, "g-a-1": SECOND_IMAGE}, "the upper half")
    place.wait_ready("g")
    place.edit("g", lambda each: each["spec"].update(paused=True))
    place.edit("g", lambda each: each["spec"]["roles"][0].pop("rolloutStrategy"))
    place.edit("g", lambda each: each["spec"].update(paused=False))
    place.until(lambda: set(place.images("g").values()) == {SECOND_IMAGE}, "all of it")
    place.wait_ready("g")


def test_an_autoscaler_and_removed_roles(place: Place) -> None:
    place.create(
        "g", role("a", 1, scalingAdapter={"enable": True}), role("b", 1, podDisruptionBudget={"maxUnavailable": 1})
    )
    place.wait_ready("g")
    place.until(
        lambda: (place.objects(ADAPTER, "g").get("g-a") or {}).get("status", {}).get("phase") == "Bound", "bound"
    )
    place.api.merge(ADAPTER, place.namespace, "g-a", {"spec": {"replicas": 2}}, "scale")
    place.until(lambda: len(place.objects(POD, "g")) == 3, "a second a")
    place.edit("g", lambda each: each["spec"]["roles"].pop())
    place.until(lambda: sorted(place.objects(STATEFUL_SET, "g")) == ["g-a"], "no b")
    place.until(lambda: sorted(place.objects(POD, "g")) == ["g-a-0", "g-a-1"], "none of its pods")
    place.wait_ready("g")


def test_a_deployment_and_a_change_of_kind(place: Place) -> None:
    place.create("g", role("a", 2, workload={"apiVersion": "apps/v1", "kind": "Deployment"}))
    place.wait_ready("g")
    place.edit("g", lambda each: each["spec"]["roles"][0].pop("workload"))
    place.until(lambda: sorted(place.objects(POD, "g")) == ["g-a-0", "g-a-1"], "pods with ordinals")
    place.wait_ready("g")
