"""The contract with any cluster: a few stories, told on our API server or, with DIPTYCH_TEST_CLUSTER=1, on the cluster
of the kubeconfig (see cluster_place). What differs between the two is a bug of ours.
"""

from __future__ import annotations

import pytest
from cluster_place import IMAGE, SECOND_IMAGE, Place, role

from diptych.errors import NotFound
from diptych.group.operator.resources import (
    ADAPTER,
    CONFIG_MAP,
    GROUP,
    LEADER_WORKER_SET,
    POD,
    POD_GROUP,
    REVISION,
    SERVICE,
    STATEFUL_SET,
    Json,
)

LWS = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet"}


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


def test_a_gang_has_a_pod_group_while_it_is_wanted(place: Place) -> None:
    """Scheduler-plugins' kind; on a cluster that lacks it, there is nothing to see."""
    try:
        place.api.list(POD_GROUP, place.namespace)
    except NotFound:
        pytest.skip("the PodGroups of scheduler-plugins are not installed")
    place.create("g", role("a", 2), role("b"), podGroupPolicy={"kubeScheduling": {"scheduleTimeoutSeconds": 30}})
    place.wait_ready("g")
    made = place.read(POD_GROUP, "g")["spec"]
    assert (made["minMember"], made["scheduleTimeoutSeconds"]) == (3, 30)
    labels = [pod["metadata"]["labels"] for pod in place.objects(POD, "g").values()]
    assert [each["pod-group.scheduling.sigs.k8s.io/name"] for each in labels] == ["g"] * 3
    place.edit("g", lambda obj: obj["spec"].pop("podGroupPolicy"))
    place.until(lambda: not place.exists(POD_GROUP, "g"), "no PodGroup")


def test_a_leader_worker_set_is_made_as_its_definition_wants_it(place: Place) -> None:
    """Its controller need not run."""
    try:
        place.api.list(LEADER_WORKER_SET, place.namespace)
    except NotFound:
        pytest.skip("LeaderWorkerSets are not installed")
    place.create("g", role("a", 2, workload=LWS, leaderWorkerSet={"size": 2}))
    place.until(lambda: place.exists(LEADER_WORKER_SET, "g-a"), "the LeaderWorkerSet")
    made = place.read(LEADER_WORKER_SET, "g-a")["spec"]
    assert (made["replicas"], made["leaderWorkerTemplate"]["size"]) == (2, 2)
    place.edit("g", lambda obj: obj["spec"]["roles"][0].update(replicas=3))
    place.until(lambda: place.read(LEADER_WORKER_SET, "g-a")["spec"]["replicas"] == 3, "three of them")
    place.edit("g", lambda obj: obj["spec"]["roles"][0].pop("workload"))
    place.edit("g", lambda obj: obj["spec"]["roles"][0].pop("leaderWorkerSet"))
    place.until(lambda: not place.exists(LEADER_WORKER_SET, "g-a"), "no LeaderWorkerSet")
    place.wait_ready("g")
