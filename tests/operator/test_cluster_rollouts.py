"""Updates and scaling, step by step, on any cluster (see cluster_place). Readiness gates hold every step."""

from __future__ import annotations

import pytest
from cluster_place import (
    GROUP_LABEL,
    IMAGE,
    ROLE_LABEL,
    SECOND_IMAGE,
    Place,
    image_of,
    num_ready,
    role,
    set_image,
)
from driver import is_pod_ready

from diptych.group.operator.resources import ADAPTER, GROUP, GROUP_SET, POD, STATEFUL_SET, Json

DEPLOYMENT = {"workload": {"apiVersion": "apps/v1", "kind": "Deployment"}}


def rolling(**settings: object) -> Json:
    return {"rolloutStrategy": {"rollingUpdate": settings}}


def new_pods(place: Place, *, ready: bool) -> set[str]:
    pods = place.objects(POD, "g").items()
    return {name for name, pod in pods if image_of(pod) == SECOND_IMAGE and is_pod_ready(pod) == ready}


def test_two_pods_at_a_time(place: Place) -> None:
    """Kubernetes 1.36 drops a StatefulSet's own maxUnavailable, so this is the operator's work."""
    place.create("g", role("a", 4, gate=True, **rolling(maxUnavailable=2)))
    place.open(*(f"g-a-{i}" for i in range(4)))
    place.wait_ready("g")
    with place.watching("g", num_ready) as ready:
        place.edit("g", set_image())
        for pair in ({"g-a-2", "g-a-3"}, {"g-a-0", "g-a-1"}):
            place.until(lambda pair=pair: new_pods(place, ready=False) == pair, f"the new pods {sorted(pair)}")  # type: ignore[misc]
            place.open(*pair)
        place.wait_ready("g")
    assert min(ready) == 2
    assert place.images("g") == {f"g-a-{i}": SECOND_IMAGE for i in range(4)}


@pytest.mark.parametrize("workload", [{}, DEPLOYMENT], ids=["StatefulSet", "Deployment"])
def test_a_surge_keeps_every_pod_ready(place: Place, workload: Json) -> None:
    place.create("g", role("a", 2, **workload, **rolling(maxUnavailable=0, maxSurge=1)))
    place.wait_ready("g")

    def count(pods: dict[str, Json]) -> tuple[int, int]:
        return num_ready(pods), sum("deletionTimestamp" not in pod["metadata"] for pod in pods.values())

    with place.watching("g", count) as seen:
        place.edit("g", set_image())
        place.until(lambda: list(place.images("g").values()) == [SECOND_IMAGE] * 2, "two new pods alone")
        place.wait_ready("g")
    assert min(ready for ready, _ in seen) == 2 and max(number for _, number in seen) == 3


def test_an_update_follows_dependencies(place: Place) -> None:
    place.create("g", role("router", 1, dependencies=["engine"]), role("engine", 2, gate=True))
    place.open("g-engine-0", "g-engine-1")
    place.wait_ready("g")
    place.edit("g", set_image())
    for name in ("g-engine-1", "g-engine-0"):
        place.until(lambda name=name: name in new_pods(place, ready=False), f"a new {name}")  # type: ignore[misc]
        assert place.images("g")["g-router-0"] == IMAGE
        place.open(name)
    place.wait_ready("g")
    assert set(place.images("g").values()) == {SECOND_IMAGE}


def test_a_failed_update_is_undone(place: Place) -> None:
    strategy = {"progressDeadlineSeconds": 3, "rollbackOnFailure": True}
    place.create("g", role("a", 2, gate=True, rolloutStrategy=strategy))
    place.open("g-a-0", "g-a-1")
    place.wait_ready("g")
    first = place.read(POD, "g-a-0")["metadata"]["uid"]

    def new(pods: dict[str, Json]) -> list[str]:
        return [name for name, pod in pods.items() if image_of(pod) == SECOND_IMAGE]

    with place.watching("g", new) as seen:
        place.edit("g", set_image())
        place.until(lambda: ["g-a-1"] in seen, "a new pod, which is not ready")
        place.until(lambda: place.images("g") == {"g-a-0": IMAGE, "g-a-1": IMAGE}, "the old image, again")
    assert all(each in ([], ["g-a-1"]) for each in seen)
    place.open("g-a-1")
    place.wait_ready("g")
    template = place.read(GROUP, "g")["spec"]["roles"][0]["template"]
    assert template["spec"]["containers"][0]["image"] == IMAGE
    assert place.read(POD, "g-a-0")["metadata"]["uid"] == first


def test_coordinated_updates_stay_within_the_skew(place: Place) -> None:
    policy = {"name": "pd", "roles": ["p", "d"], "strategy": {"rollingUpdate": {"maxSkew": "25%"}}}
    several = rolling(maxUnavailable=4)
    place.create("g", role("p", 4, **several), role("d", 8, **several), coordination=[policy])
    place.wait_ready("g")

    def skew(pods: dict[str, Json]) -> int:
        new = [pod["metadata"]["labels"][ROLE_LABEL] for pod in pods.values() if image_of(pod) == SECOND_IMAGE]
        return abs(2 * new.count("p") - new.count("d"))  # in eighths

    with place.watching("g", skew) as skews:
        place.edit("g", set_image())
        place.wait_ready("g")
    assert set(place.images("g").values()) == {SECOND_IMAGE}
    assert max(skews) <= 4  # 25 %, or one pod of the smaller role, on either side of what is on its way


def test_coordinated_scaling_waits_for_ready_pods(place: Place) -> None:
    strategy = {"scaling": {"maxSkew": "34%", "progression": "OrderReady"}}
    policy = {"name": "pd", "roles": ["p", "d"], "strategy": strategy}
    place.create("g", role("p", gate=True), role("d", gate=True), coordination=[policy])
    place.open("g-p-0", "g-d-0")
    place.wait_ready("g")
    place.edit("g", lambda obj: [each.update(replicas=3) for each in obj["spec"]["roles"]])
    place.open("g-p-1")
    place.until(lambda: is_pod_ready(place.read(POD, "g-p-1")), "g-p-1 is ready")
    place.wait_observed("g")
    assert "g-p-2" not in place.objects(POD, "g")  # d would be two pods behind
    place.open("g-d-1", "g-p-2", "g-d-2")
    place.wait_ready("g")
    assert sorted(place.objects(POD, "g")) == [f"g-{name}-{i}" for name in "dp" for i in range(3)]


def test_an_autoscaler_decides_and_its_work_is_not_undone(place: Place) -> None:
    """Prefill and decode in a ratio, scaled as one through the scale subresource."""
    ratio = {"name": "pd", "roles": {"p": 2, "d": 1}, "replicas": 1, "scalingAdapter": {"enable": True}}
    place.create("g", role("p"), role("d"), scalingGroups=[ratio])
    place.wait_ready("g")
    assert sorted(place.objects(POD, "g")) == ["g-d-0", "g-p-0", "g-p-1"]
    place.until(lambda: "replicas" in place.read(ADAPTER, "g-pd")["spec"], "the adapter has the group's replicas")
    scale = place.api.merge(ADAPTER, place.namespace, "g-pd", {"spec": {"replicas": 2}}, "scale")
    assert scale["kind"] == "Scale" and scale["spec"]["replicas"] == 2
    place.until(lambda: len(place.objects(POD, "g")) == 6, "four of p and two of d")
    place.wait_ready("g")
    place.until(lambda: place.read(ADAPTER, "g-pd")["status"]["replicas"] == 2, "the adapter says two")
    selector = place.read(ADAPTER, "g-pd")["status"]["selector"]
    measured, _ = place.api.list(POD, place.namespace, selector)
    assert len(measured) == 6
    place.edit("g", lambda obj: obj["spec"]["scalingGroups"][0].update(replicas=1))  # a manifest applied again
    place.until(lambda: place.read(GROUP, "g")["spec"]["scalingGroups"][0]["replicas"] == 2, "the adapter's number")
    assert len(place.objects(POD, "g")) == 6


def test_a_set_of_groups(place: Place) -> None:
    place.make(GROUP_SET, "s", {"replicas": 2, "template": {"roles": [role("a")]}})
    for name in ("s-0", "s-1"):
        place.until(lambda name=name: place.exists(GROUP, name) and place.is_ready(name), f"{name} is ready")  # type: ignore[misc]
    place.until(lambda: place.read(GROUP_SET, "s").get("status", {}).get("readyReplicas") == 2, "two are ready")
    place.api.merge(GROUP_SET, place.namespace, "s", {"spec": {"replicas": 1}}, "scale")
    place.until(lambda: not place.exists(GROUP, "s-1"), "the second group is gone")
    place.until(lambda: not place.exists(STATEFUL_SET, "s-1-a"), "and what belonged to it")
    assert place.read(GROUP, "s-0")["metadata"]["labels"].get(GROUP_LABEL) is None
    place.delete(GROUP_SET, "s")
    place.until(lambda: not place.exists(GROUP, "s-0") and not place.exists(STATEFUL_SET, "s-0-a"), "nothing is left")
