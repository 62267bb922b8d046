"""What others do to a group's objects: deletions, edits, forged labels, names that meet, groups that return."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from driver import Driver, image_of, set_image
from kube_world import NAMESPACE, group, role

from diptych.group.operator.cluster import MIN_FORGET
from diptych.group.operator.resources import Json
from diptych.group.operator.routes import Key

PREFIX = "rolebasedgroup.workloads.x-k8s.io"


def uids(driver: Driver, of_role: str = "") -> dict[str, str]:
    return {name: pod["metadata"]["uid"] for name, pod in driver.pods(of_role).items()}


def pod(name: str, labels: dict[str, str], **metadata: Any) -> Json:
    spec = {"containers": [{"name": "c", "image": "mine:1"}]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels, **metadata},
        "spec": spec,
    }


@pytest.mark.parametrize(
    "kind", ["StatefulSet", "Service", "ConfigMap", "PodDisruptionBudget", "ControllerRevision", "Pod"]
)
def test_what_somebody_deletes_comes_back(driver: Driver, kind: str) -> None:
    driver.create(group("g", role("a", 2, podDisruptionBudget={"maxUnavailable": 1})))
    driver.run(5)
    names = driver.names(kind)
    driver.delete(kind, names[0])
    driver.run(5)
    assert driver.names(kind) == names and driver.ready("g")


@pytest.mark.parametrize("field", ["labels", "annotations", "ownerReferences"])
def test_what_somebody_strips_comes_back(driver: Driver, field: str) -> None:
    driver.create(group("g", role("a", 2), role("b", dependencies=["a"])))
    driver.run(5)
    before, whole = uids(driver), driver.read("StatefulSet", "g-b")["metadata"][field]
    driver.edit("g-b", lambda each: each["metadata"].pop(field), "StatefulSet")
    driver.run(5)
    now = driver.read("StatefulSet", "g-b")["metadata"][field]
    assert now == whole if field == "ownerReferences" else whole.items() <= now.items()
    assert uids(driver) == before and driver.ready("g")


def test_a_workload_deleted_without_its_pods_comes_back(driver: Driver) -> None:
    driver.create(group("g", role("a", 2)))
    driver.run(5)
    driver.delete("StatefulSet", "g-a", policy="Orphan")
    driver.run(10)
    assert driver.names("StatefulSet") == ["g-a"]  # which then takes its pods back


def test_a_group_deleted_without_its_dependents_and_made_again_has_them_back(driver: Driver) -> None:
    manifest = group("g", role("router", dependencies=["a"]), role("a", 2))
    driver.create(manifest)
    driver.run(5)
    before = uids(driver)
    driver.delete("RoleBasedGroup", "g", policy="Orphan")
    driver.run(10)
    assert driver.names("RoleBasedGroup") == [] and uids(driver) == before
    driver.create(manifest)
    driver.run(10)
    assert driver.ready("g") and uids(driver) == before


def test_an_edited_template_is_put_right(driver: Driver) -> None:
    driver.create(group("g", role("a", 2)))
    driver.run(5)
    driver.edit(
        "g-a", lambda each: each["spec"]["template"]["spec"]["containers"][0].update(image="bad:1"), "StatefulSet"
    )
    driver.run(20)
    assert {image_of(each) for each in driver.pods().values()} == {"engine:1"} and driver.ready("g")


def test_a_status_that_somebody_wrote_is_put_right(driver: Driver) -> None:
    driver.create(group("g", role("a", 2)))
    driver.run(5)
    true = driver.read("RoleBasedGroup", "g")["status"]
    forged = copy.deepcopy(true)
    forged["roleStatuses"][0]["readyReplicas"] = 7
    driver.cluster.api.patch("RoleBasedGroup", NAMESPACE, "g", {"status": forged}, subresource="status", manager="me")
    driver.run(5)
    assert driver.read("RoleBasedGroup", "g")["status"]["roleStatuses"] == true["roleStatuses"]


@pytest.mark.parametrize("note", ["restarts", "rollout"])
def test_notes_that_somebody_garbled_do_no_harm(driver: Driver, note: str) -> None:
    driver.create(group("g", role("a", 2, restartPolicy="RecreateRoleInstanceOnPodRestart")))
    driver.run(5)
    driver.edit("g", set_image("engine:2"))
    driver.run(10)
    kind, name = ("RoleBasedGroup", "g") if note == "restarts" else ("StatefulSet", "g-a")
    text = {f"{PREFIX}/{note}": '{"a": 1'}
    driver.edit(name, lambda each: each["metadata"].setdefault("annotations", {}).update(text), kind)
    driver.run(5)
    driver.cluster.pods.crash("g-a-0")
    driver.run(10)
    assert driver.ready("g")


def test_pods_and_workloads_with_our_labels_that_are_not_ours_are_left_alone(driver: Driver) -> None:
    """A copied manifest is the usual reason."""
    driver.create(group("g", role("a", 2, restartPolicy="RecreateRBGOnPodRestart")))
    driver.run(5)
    labels = dict(driver.pods()["g-a-0"]["metadata"]["labels"])
    template = {"metadata": {"labels": labels | {"mine": "1"}}, "spec": {"containers": [{"name": "c", "image": "m:1"}]}}
    spec = {"replicas": 1, "selector": {"matchLabels": {"mine": "1"}}, "template": template}
    mine = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "g-a-copy", "labels": labels}}
    driver.create(pod("g-a-7", labels), pod("other", {**labels, f"{PREFIX}/role": "ghost"}), {**mine, "spec": spec})
    driver.run(5)
    ours = {name: uid for name, uid in uids(driver).items() if name in ("g-a-0", "g-a-1")}
    everything = uids(driver)
    driver.cluster.pods.fail("g-a-7")
    driver.cluster.pods.crash("other")
    driver.run(30)
    assert uids(driver).items() >= ours.items() and uids(driver).keys() == everything.keys()
    status = driver.read("RoleBasedGroup", "g")["status"]["roleStatuses"]
    assert [(each["replicas"], each["readyReplicas"]) for each in status] == [(2, 2)]
    driver.delete("RoleBasedGroup", "g")
    driver.run(10)
    assert driver.names("RoleBasedGroup") == [] and driver.names("Deployment") == ["g-a-copy"]
    assert {"g-a-7", "other"} <= set(driver.names("Pod"))
    driver.delete("Pod", "g-a-7")


def test_two_groups_whose_names_meet(driver: Driver) -> None:
    """a-b with role c, and a with role b-c, want the same names: the second is told, the first is not touched."""
    driver.create(group("a-b", role("c", 2)))
    driver.run(5)
    before = uids(driver)
    driver.create(group("a", role("b-c", image="thief:1"), role("d")))
    driver.run(5)
    assert any("a-b-c exists and does not belong" in each for each in driver.events("FailedReconcile"))
    assert uids(driver) == before and driver.ready("a-b") and not driver.ready("a")
    told = driver.conditions("a")
    assert told["Progressing"]["reason"] == "FailedReconcile" and "does not belong" in told["Progressing"]["message"]
    assert told["Ready"]["status"] == "False"
    assert driver.read("StatefulSet", "a-b-c")["spec"]["replicas"] == 2
    driver.delete("RoleBasedGroup", "a")
    driver.run(5)
    assert uids(driver) == before
    driver.edit("a-b", lambda each: each["spec"]["roles"][0].update(replicas=1))
    driver.run(5)
    assert driver.ready("a-b")


def test_groups_of_one_name_in_two_namespaces(driver: Driver) -> None:
    driver.cluster.namespace("other")
    second = group("g", role("a", 3))
    second["metadata"]["namespace"] = "other"
    driver.create(group("g", role("a", 1)), second)
    driver.run(5)
    assert len(driver.pods()) == 1 and len(driver.cluster.objects("Pod", "other")) == 3
    driver.delete("RoleBasedGroup", "g")
    driver.run(5)
    assert len(driver.pods()) == 0 and len(driver.cluster.objects("Pod", "other")) == 3


def test_a_group_that_is_deleted_and_made_again_at_once(driver: Driver) -> None:
    """Its predecessor's objects are in the way until they are gone; nobody has to do anything, and nobody is warned."""
    driver.create(group("g", role("a", 2)))
    driver.run(5)
    old = set(uids(driver).values())
    driver.cluster.pods.behaviour = driver.cluster.pods.behaviour.__class__(ended_s=10.0)
    driver.delete("RoleBasedGroup", "g")
    driver.create(group("g", role("a", 2, image="engine:2")))
    driver.hear()
    while driver.reconcile_one():  # before the garbage collector has done anything
        driver.hear()
    assert not driver.ready("g") if driver.conditions("g") else True
    driver.run(60)
    assert driver.ready("g") and not old & set(uids(driver).values())
    assert {image_of(each) for each in driver.pods().values()} == {"engine:2"}
    assert driver.events("FailedReconcile") == []


def test_a_group_whose_spec_cannot_be_can_still_be_deleted(driver: Driver) -> None:
    driver.create(group("g", role("router", dependencies=["a"]), role("a")))
    driver.run(5)
    runtime = {"engineRuntimes": [{"profileName": "gone"}]}
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(runtime))
    driver.run(5)
    assert driver.conditions("g")["Ready"]["reason"] == "InvalidSpec"
    mark = len(driver.api.writes)
    driver.delete("RoleBasedGroup", "g")
    driver.run(10)
    assert driver.names("RoleBasedGroup") == [] and driver.pods() == {}
    ended = [name for verb, kind, name in driver.api.writes[mark:] if (verb, kind) == ("delete", "StatefulSet")]
    assert ended == ["g-router", "g-a"]


@pytest.mark.parametrize("policy", ["Foreground", "Orphan"])
def test_other_ways_of_deleting_a_group_end_too(driver: Driver, policy: str) -> None:
    driver.create(group("g", role("router", dependencies=["a"]), role("a")))
    driver.run(5)
    driver.delete("RoleBasedGroup", "g", policy=policy)
    driver.run(30)
    assert driver.names("RoleBasedGroup") == []


@pytest.mark.parametrize("image", [{"a": 1}, ["x"], 1.5])
def test_an_image_that_is_no_name_is_told_and_put_right_later(driver: Driver, image: Any) -> None:
    driver.create(group("g", role("a")))
    driver.run(5)
    before = uids(driver)
    driver.edit("g", set_image(image))
    driver.run(5)
    assert driver.conditions("g")["Progressing"]["status"] == "False" and uids(driver) == before
    driver.edit("g", set_image("engine:2"))
    driver.run(10)
    assert driver.ready("g") and uids(driver) != before
    assert driver.conditions("g")["Progressing"]["reason"] == "Complete"


def test_an_absurd_number_of_pods_is_refused(driver: Driver) -> None:
    driver.create(group("g", role("a", 2_000_000_000)))
    driver.run(5)
    assert "too many" in driver.conditions("g")["Ready"]["message"] and driver.pods() == {}


def test_many_groups_that_come_and_go_leave_nothing_in_memory(driver: Driver) -> None:
    for number in range(MIN_FORGET // 8):
        driver.create(group(f"g{number}", role("a"), role("b")))
        driver.run(3, tick_s=3)
        driver.delete("RoleBasedGroup", f"g{number}")
        driver.run(3, tick_s=3)
    known = [value for value in vars(driver.memory).values() if isinstance(value, dict) and value is not driver.caches]
    assert sum(map(len, known)) <= MIN_FORGET
    reporter = vars(driver.reconcilers["group"])["_reporter"]
    assert vars(reporter)["_since"] == {}
    assert not any(cache.all_keys() for kind, cache in driver.caches.items() if kind.kind != "PodGroup")


def test_a_key_of_nothing_is_nothing(driver: Driver) -> None:
    for controller in ("group", "set", "adapter"):
        driver.queue.add(Key(controller, NAMESPACE, "none"))
    driver.run(1)
    assert driver.api.writes == []


def test_clocks_that_differ_delay_an_update_but_do_not_stop_it() -> None:
    """minReadySeconds compares the operator's clock with the cluster's."""
    driver = Driver()
    skew = {"s": 0.0}
    clock = driver.cluster.clock
    driver.reconcilers["group"]._clock = lambda: clock.now() + skew["s"]  # type: ignore[attr-defined]
    driver.create(group("g", role("a", 2, minReadySeconds=5)))
    driver.run(20)
    skew["s"] = -30.0
    driver.edit("g", set_image("engine:2"))
    driver.run(200)
    assert {image_of(each) for each in driver.pods().values()} == {"engine:2"} and driver.ready("g")
