"""RoleBasedGroupSets: their groups come, are scaled, updated and go; the operator driven by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from driver import Driver, image_of, is_pod_ready, refuse, set_image
from kube_world import NAMESPACE, role

from diptych.group.operator.report import TEMPLATE
from diptych.group.operator.resources import GROUP_SET, Json
from diptych.group.operator.template import EXCLUSIVE_TOPOLOGY
from diptych.testing.kube import Behaviour

PREFIX = "rolebasedgroup.workloads.x-k8s.io"


def group_set(name: str, replicas: int, *roles: Json, **metadata: Any) -> Json:
    spec = {"replicas": replicas, "template": {"roles": list(roles)}}
    return {
        "apiVersion": GROUP_SET.api_version,
        "kind": GROUP_SET.kind,
        "metadata": {"name": name, **metadata},
        "spec": spec,
    }


def edit_set(driver: Driver, image: str) -> None:
    driver.edit("s", lambda each: set_image(image)({"spec": each["spec"]["template"]}), "RoleBasedGroupSet")


def add_metadata(obj: Json, new: Json) -> None:
    obj["metadata"].update(new)


def groups_with_unready_pods(driver: Driver) -> set[str]:
    """Of the set's three groups, each of two pods."""
    ready = [name[:3] for name, pod in driver.pods().items() if is_pod_ready(pod)]
    return {name for name in ("s-0", "s-1", "s-2") if ready.count(name) < 2}


def topology_of(pod: Json) -> str:
    near = (pod["spec"].get("affinity") or {}).get("podAffinity")
    return str(near["requiredDuringSchedulingIgnoredDuringExecution"][0]["topologyKey"]) if near else ""


def test_a_set_makes_groups_scales_and_updates_them(driver: Driver) -> None:
    key = f"{PREFIX}/exclusive-topology"
    driver.create(group_set("s", 2, role("a"), role("b", dependencies=["a"]), annotations={key: "zone"}))
    driver.run(5)
    assert driver.names("RoleBasedGroup") == ["s-0", "s-1"] and driver.ready("s-1")
    assert driver.read("RoleBasedGroup", "s-0")["metadata"]["annotations"][key] == "zone"
    assert driver.pods()["s-0-a-0"]["spec"]["affinity"]
    status = driver.read("RoleBasedGroupSet", "s")["status"]
    assert (status["replicas"], status["readyReplicas"]) == (2, 2)
    assert driver.conditions("s", "RoleBasedGroupSet")["Ready"]["status"] == "True"
    driver.edit("s", lambda each: each["spec"].update(replicas=4), "RoleBasedGroupSet")
    driver.run(5)
    assert driver.names("RoleBasedGroup") == ["s-0", "s-1", "s-2", "s-3"]
    driver.edit("s", lambda each: each["spec"].update(replicas=1), "RoleBasedGroupSet")
    driver.run(5)
    assert driver.names("RoleBasedGroup") == ["s-0"] and len(driver.pods()) == 2
    edit_set(driver, "engine:2")
    driver.run(10)
    assert {image_of(pod) for pod in driver.pods().values()} == {"engine:2"}
    driver.edit("s-0", lambda each: each["spec"]["roles"].pop())
    driver.run(5)
    assert len(driver.read("RoleBasedGroup", "s-0")["spec"]["roles"]) == 2
    driver.delete("RoleBasedGroupSet", "s")
    driver.run(10)
    assert driver.names("RoleBasedGroup") == [] and driver.names("Pod") == []


@pytest.mark.parametrize(("limit", "most"), [(1, 1), ("50%", 2), ("10%", 1), (None, 4)])
def test_a_set_updates_as_many_groups_at_a_time_as_may_be_missing(driver: Driver, limit: Any, most: int) -> None:
    made = group_set("s", 4, role("a", 2), role("b", dependencies=["a"]))
    made["spec"]["rolloutStrategy"] = {"rollingUpdate": {"maxUnavailable": limit}} if limit else {}
    driver.create(made)
    driver.run(5)
    driver.cluster.pods.behaviour = Behaviour(ready_s=2.0)
    missing: list[int] = []
    driver.checks.append(lambda: missing.append(sum(not driver.ready(f"s-{index}") for index in range(4))))
    edit_set(driver, "engine:2")
    driver.run(1)
    first = {pod["metadata"]["name"][:3] for pod in driver.pods().values() if image_of(pod) == "engine:2"}
    assert first == {"s-3", "s-2", "s-1", "s-0"} if most == 4 else first <= {"s-3", "s-2"}
    driver.run(100)
    assert max(missing) == most
    assert {image_of(pod) for pod in driver.pods().values()} == {"engine:2"} and len(driver.pods()) == 12
    status = driver.read("RoleBasedGroupSet", "s")["status"]
    assert (status["readyReplicas"], status["updatedReplicas"]) == (4, 4)


def test_a_set_whose_topology_alone_changes_updates_one_group_at_a_time(driver: Driver) -> None:
    made = group_set("s", 3, role("a", 2))
    made["spec"]["rolloutStrategy"] = {"rollingUpdate": {"maxUnavailable": 1}}
    driver.create(made)
    driver.run(5)
    driver.cluster.pods.behaviour = Behaviour(ready_s=2.0)
    missing: list[set[str]] = []
    driver.checks.append(lambda: missing.append(groups_with_unready_pods(driver)))
    for topology in ("zone", "rack", ""):
        new = {"annotations": {EXCLUSIVE_TOPOLOGY: topology} if topology else {}}
        driver.edit("s", partial(add_metadata, new=new), "RoleBasedGroupSet")
        driver.run(30)
        assert [topology_of(pod) for pod in driver.pods().values()] == [topology] * 6
        assert driver.read("RoleBasedGroupSet", "s")["status"]["updatedReplicas"] == 3
    assert max(map(len, missing)) == 1 and set.union(*missing) == {"s-0", "s-1", "s-2"}


def test_a_bad_update_of_a_set_stops_at_its_first_group_and_the_next_begins_there(driver: Driver) -> None:
    made = group_set("s", 3, role("a"))
    made["spec"]["rolloutStrategy"] = {"rollingUpdate": {"maxUnavailable": 1}}
    driver.create(made)
    driver.run(5)
    broken = driver.cluster.pods.rule(name="s-2-*", ready_s=None)
    edit_set(driver, "broken:1")
    driver.run(60)
    assert {name: image_of(pod) for name, pod in driver.pods().items()} == {
        "s-0-a-0": "engine:1",
        "s-1-a-0": "engine:1",
        "s-2-a-0": "broken:1",
    }
    assert driver.conditions("s", "RoleBasedGroupSet")["Ready"]["message"] == (
        "2 of 3 groups are ready, 1 have the template of now"
    )
    broken()
    edit_set(driver, "engine:2")
    driver.run(60)
    assert {image_of(pod) for pod in driver.pods().values()} == {"engine:2"}


def test_a_set_leaves_a_group_that_went_back_as_it_is_until_it_has_another_template(driver: Driver) -> None:
    strategy = {"progressDeadlineSeconds": 20, "rollbackOnFailure": True}
    made = group_set("s", 3, role("a", 2, rolloutStrategy=strategy))
    made["spec"]["rolloutStrategy"] = {"rollingUpdate": {"maxUnavailable": 1}}
    driver.create(made)
    driver.run(5)
    fixed = driver.cluster.pods.rule(name="s-2-a-1", ready_s=None)
    edit_set(driver, "broken:1")
    driver.run(25)
    fixed()  # only once it has gone back
    driver.run(60)
    assert len(driver.events("RolledBack")) == 1
    assert {image_of(pod) for pod in driver.pods().values()} == {"engine:1"} and driver.ready("s-2")
    assert driver.conditions("s", "RoleBasedGroupSet")["Ready"]["message"] == (
        "3 of 3 groups are ready, 0 have the template of now, 1 went back to the one before: correct the template"
    )
    driver.edit("s", lambda each: each["spec"].update(replicas=2), "RoleBasedGroupSet")
    driver.run(30)  # without that group the next one is tried
    assert {image_of(pod) for pod in driver.pods().values()} == {"broken:1"}
    edit_set(driver, "engine:2")
    driver.run(60)
    assert {image_of(pod) for pod in driver.pods().values()} == {"engine:2"}
    assert driver.read("RoleBasedGroupSet", "s")["status"]["updatedReplicas"] == 2


def test_a_set_that_returns_to_a_template_its_groups_once_went_back_from_applies_it(driver: Driver) -> None:
    strategy = {"progressDeadlineSeconds": 20, "rollbackOnFailure": True}
    driver.create(group_set("s", 2, role("a", rolloutStrategy=strategy)))
    driver.run(5)
    fixed = driver.cluster.pods.rule(name="s-*", ready_s=None)
    edit_set(driver, "engine:2")
    driver.run(25)
    fixed()  # what was wrong, once they have gone back
    driver.run(40)
    assert len(driver.events("RolledBack")) == 2
    edit_set(driver, "engine:1")
    driver.run(30)
    edit_set(driver, "engine:2")
    driver.run(30)
    assert {image_of(pod) for pod in driver.pods().values()} == {"engine:2"}
    found = driver.read("RoleBasedGroupSet", "s")
    assert found["status"]["observedGeneration"] == found["metadata"]["generation"]
    assert (found["status"]["readyReplicas"], found["status"]["updatedReplicas"]) == (2, 2)
    assert driver.events("FailedReconcile") == []


def test_a_group_of_which_something_is_refused_is_missing(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    made = group_set("s", 3, role("a", 2))
    made["spec"]["rolloutStrategy"] = {"rollingUpdate": {"maxUnavailable": 1}}
    driver.create(made)
    driver.run(5)
    refuse(driver, monkeypatch, "PodDisruptionBudget")

    def change(each: Json) -> None:
        each["spec"]["template"]["roles"][0]["podDisruptionBudget"] = {"maxUnavailable": 1}
        set_image("engine:2")({"spec": each["spec"]["template"]})

    driver.edit("s", change, "RoleBasedGroupSet")
    driver.run(60)
    assert {name[:3] for name, pod in driver.pods().items() if image_of(pod) == "engine:2"} == {"s-2"}
    assert driver.ready("s-2") and driver.conditions("s-2")["Progressing"]["reason"] == "FailedReconcile"
    monkeypatch.undo()
    driver.run(300)
    assert {image_of(pod) for pod in driver.pods().values()} == {"engine:2"}
    assert len(driver.names("PodDisruptionBudget")) == 3


@pytest.mark.parametrize("replicas", [2, 2_000_000_000])
def test_a_status_that_is_refused_is_told_and_hides_nothing(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, replicas: int
) -> None:
    refuse(driver, monkeypatch, "RoleBasedGroupSet")  # of which only the status is ever applied
    driver.create(group_set("s", replicas, role("a")))
    driver.run(5)
    (told,) = driver.events("FailedReconcile")
    assert "quota of RoleBasedGroupSet" in told and ("too many" in told) == (replicas > 2)


def test_an_operator_that_finds_groups_without_the_mark_of_their_template_changes_nothing_else(driver: Driver) -> None:
    driver.create(group_set("s", 3, role("a")))
    driver.run(5)
    uids = {name: pod["metadata"]["uid"] for name, pod in driver.pods().items()}
    for index in range(3):
        driver.edit(f"s-{index}", lambda each: each["metadata"]["annotations"].pop(TEMPLATE))
    driver.restart()
    driver.run(20)
    assert {name: pod["metadata"]["uid"] for name, pod in driver.pods().items()} == uids
    assert driver.read("RoleBasedGroupSet", "s")["status"]["updatedReplicas"] == 3


def test_a_set_leaves_what_an_autoscaler_decided(driver: Driver) -> None:
    driver.create(group_set("s", 1, role("a", 1, scalingAdapter={"enable": True})))
    driver.run(5)
    scaled = {"spec": {"replicas": 3}}
    adapter = "RoleBasedGroupScalingAdapter"
    driver.cluster.api.patch(adapter, NAMESPACE, "s-0-a", scaled, subresource="scale", manager="hpa")
    driver.run(5)
    assert len(driver.pods()) == 3
    edit_set(driver, "engine:2")
    driver.run(20)
    assert [image_of(pod) for pod in driver.pods().values()] == ["engine:2"] * 3


def test_a_set_of_too_many_groups_says_so(driver: Driver) -> None:
    driver.create(group_set("s", 2_000_000_000, role("a")))
    driver.run(5)
    assert driver.names("RoleBasedGroup") == []
    assert any("too many" in each for each in driver.events("FailedReconcile"))
    assert driver.conditions("s", "RoleBasedGroupSet")["Ready"]["status"] == "False"
