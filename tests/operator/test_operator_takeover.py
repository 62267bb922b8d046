"""Groups that the upstream controller has made: what it applied, as its field manager, before our operator comes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from driver import Driver, image_of, set_image
from kube_world import NAMESPACE, group, role

from diptych.group import names
from diptych.group.operator.resources import Json
from diptych.group.operator.takeover import runs_the_same, taken_over
from diptych.group.revision import restore, revision_data
from diptych.testing.kube import Behaviour

PREFIX = names.PREFIX
RBG = "rbg"
PROBED = {
    "name": "engine",
    "image": "engine:1",
    "env": [{"name": "Z", "value": "1"}, {"name": "A", "value": "2"}],
    "readinessProbe": {"tcpSocket": {"port": 8000}},
    "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
}
TEMPLATE: Json = {
    "metadata": {"labels": {"team": "x"}},
    "spec": {"containers": [PROBED], "volumes": [{"name": "scratch", "emptyDir": {}}]},
}


def upstream_template(of: Json, labels: dict[str, str], config_map: str) -> Json:
    """As v0.4 makes it of a role's: labels, the role's ConfigMap in every container, variables sorted by name."""
    template = copy.deepcopy(of["template"])
    metadata = template.setdefault("metadata", {})
    metadata["labels"] = {**(metadata.get("labels") or {}), **labels}
    index = {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}
    own: list[Json] = [{"name": "GROUP_NAME", "value": labels[f"{PREFIX}/name"]}]
    own += [{"name": "ROLE_INDEX", "valueFrom": index}, {"name": "ROLE_NAME", "value": of["name"]}]
    for container in template["spec"]["containers"]:
        container["env"] = sorted([*container.get("env", []), *own], key=lambda each: str(each["name"]))
        container.setdefault("volumeMounts", []).append({"name": "rbg-cluster-config", "mountPath": "/etc/rbg"})
    template["spec"].setdefault("volumes", []).append({"name": "rbg-cluster-config", "configMap": {"name": config_map}})
    return template


def made_by_upstream(driver: Driver, made: Json, *, prefix: str = "") -> None:
    """The group and what upstream's controller makes of it; `prefix`: of Services, "s-" since v0.5. Pods come up."""
    driver.create(made)
    name = made["metadata"]["name"]
    uid = driver.read("RoleBasedGroup", name)["metadata"]["uid"]
    owner = {"apiVersion": made["apiVersion"], "kind": "RoleBasedGroup", "name": name, "uid": uid}
    owner |= {"controller": True, "blockOwnerDeletion": True}
    for each in made["spec"]["roles"]:
        workload = f"{name}-{each['name']}"
        labels = names.role_labels(NAMESPACE, name, each["name"])
        metadata = {"name": workload, "labels": labels}
        rolling = {"partition": 0, "maxUnavailable": 1}
        spec = {
            "replicas": each["replicas"],
            "serviceName": prefix + workload,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": rolling},
            "template": upstream_template(each, labels, workload),
        }
        config = {"metadata": {**metadata, "ownerReferences": [owner]}, "data": {"config.yaml": "old: true\n"}}
        apply(driver, "v1/ConfigMap", config)
        sized = {**metadata, "ownerReferences": [owner], "annotations": {f"{PREFIX}/role-size": str(each["replicas"])}}
        stateful = apply(driver, "apps/v1/StatefulSet", {"metadata": sized, "spec": spec})
        of_set = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": workload, "uid": stateful["metadata"]["uid"]}
        service = {"clusterIP": "None", "publishNotReadyAddresses": True}
        service["selector"] = {key: labels[key] for key in (f"{PREFIX}/name", f"{PREFIX}/role")}
        of_service = {"name": prefix + workload, "labels": labels, "ownerReferences": [of_set]}
        apply(driver, "v1/Service", {"metadata": of_service, "spec": service})
    condition = {"type": "Ready", "status": "True", "reason": "AllRolesReady", "message": "All roles are ready"}
    condition["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    old = [{"name": each, "replicas": 1, "readyReplicas": 1} for each in ("a", "gone")]
    status = {"metadata": {"name": name}, "status": {"roleStatuses": old, "conditions": [condition]}}
    apply(driver, f"{made['apiVersion']}/RoleBasedGroup", status, subresource="status")
    while driver.cluster.work.run_one():
        pass


def apply(driver: Driver, kind: str, obj: Json, **options: Any) -> Json:
    body = {**obj, "apiVersion": kind.rpartition("/")[0], "kind": kind.rpartition("/")[2]}
    name = obj["metadata"]["name"]
    return driver.cluster.api.apply(kind, NAMESPACE, name, body, manager=RBG, force=True, **options)


def managers(driver: Driver, kind: str, name: str) -> set[str]:
    return {each["manager"] for each in driver.read(kind, name)["metadata"]["managedFields"]}


def uids(driver: Driver) -> dict[str, str]:
    return {name: pod["metadata"]["uid"] for name, pod in driver.pods().items()}


def engine(name: str, replicas: int = 1, **more: Any) -> Json:
    return {**role(name, replicas, **more), "template": copy.deepcopy(TEMPLATE)}


@pytest.mark.parametrize("prefix", ["", "s-"], ids=["v0.4", "v0.5"])
def test_a_group_is_taken_over_with_its_pods_and_then_it_is_ours(driver: Driver, prefix: str) -> None:
    made_by_upstream(driver, group("g", engine("a", 3), engine("b", dependencies=["a"])), prefix=prefix)
    before = uids(driver)
    assert len(before) == 4
    driver.run(30)
    assert uids(driver) == before and driver.ready("g")
    assert [each["name"] for each in driver.read("RoleBasedGroup", "g")["status"]["roleStatuses"]] == ["a", "b"]
    assert f"g-a-2.{prefix}g-a" in driver.read("ConfigMap", "g-a")["data"]["config.yaml"]  # its pods read that one
    driver.restart()
    driver.run(30)
    assert uids(driver) == before
    # Scaling rolls nothing, and what is new is as the others.
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(replicas=4))
    driver.run(10)
    assert before.items() <= uids(driver).items() and len(driver.pods("a")) == 4
    # A failed one is made anew, alone.
    driver.cluster.pods.fail("g-a-1")
    driver.run(10)
    assert {name for name, uid in before.items() if uids(driver)[name] != uid} == {"g-a-1"} and driver.ready("g")


def test_the_first_update_goes_on_within_its_limits_and_leaves_nothing_of_upstreams(driver: Driver) -> None:
    made_by_upstream(driver, group("g", engine("a", 4), engine("b")))
    driver.run(10)
    before = uids(driver)
    driver.cluster.pods.behaviour = Behaviour(ready_s=2.0)
    missing: list[int] = []
    driver.checks.append(
        lambda: missing.append(4 - driver.read("StatefulSet", "g-a")["status"].get("readyReplicas", 0))
    )

    def change(obj: Json) -> None:
        obj["spec"]["roles"][0]["template"]["spec"]["containers"][0]["env"].pop(0)
        set_image("engine:2", "a")(obj)

    driver.edit("g", change)
    driver.run(60)
    assert driver.ready("g") and max(missing) == 1
    assert {image_of(pod) for pod in driver.pods("a").values()} == {"engine:2"}
    assert uids(driver)["g-b-0"] == before["g-b-0"]
    spec = driver.read("StatefulSet", "g-a")["spec"]["template"]["spec"]
    variables = [each["name"] for each in spec["containers"][0]["env"]]
    assert variables == ["GROUP_NAME", "ROLE_NAME", "ROLE_INDEX", "A"]
    assert [each["configMap"]["name"] for each in spec["volumes"] if "configMap" in each] == ["g"]
    assert [each["mountPath"] for each in spec["containers"][0]["volumeMounts"]] == ["/tmp", "/etc/rbg"]
    assert RBG not in managers(driver, "StatefulSet", "g-a") | managers(driver, "Service", "g-a")
    assert [each["kind"] for each in driver.read("Service", "g-a")["metadata"]["ownerReferences"]] == ["RoleBasedGroup"]


def test_a_group_that_was_edited_while_nobody_looked_is_updated(driver: Driver) -> None:
    made_by_upstream(driver, group("g", engine("a", 2), engine("b")))
    before = uids(driver)
    driver.edit("g", set_image("engine:2", "a"))
    driver.run(60)
    assert driver.ready("g")
    assert {name for name, uid in before.items() if uids(driver)[name] != uid} == {"g-a-0", "g-a-1"}


def test_an_update_that_upstream_had_begun_is_ended(driver: Driver) -> None:
    """Its StatefulSet has the new template, and two of three pods are of the old one."""
    made = group("g", engine("a", 3))
    made_by_upstream(driver, made)
    labels = names.role_labels(NAMESPACE, "g", "a")
    driver.edit("g", set_image("engine:2"))
    stateful = driver.read("StatefulSet", "g-a")
    stateful["spec"]["template"] = upstream_template(
        driver.read("RoleBasedGroup", "g")["spec"]["roles"][0], labels, "g-a"
    )
    stateful["spec"]["updateStrategy"]["rollingUpdate"]["partition"] = 2
    metadata = {field: stateful["metadata"][field] for field in ("name", "labels", "annotations", "ownerReferences")}
    apply(driver, "apps/v1/StatefulSet", {"metadata": metadata, "spec": stateful["spec"]})
    while driver.cluster.work.run_one():
        pass
    begun = uids(driver)
    assert sorted(image_of(pod) for pod in driver.pods().values()) == ["engine:1", "engine:1", "engine:2"]
    driver.run(60)
    assert {image_of(pod) for pod in driver.pods().values()} == {"engine:2"} and driver.ready("g")
    assert uids(driver)["g-a-2"] == begun["g-a-2"]


def test_upstreams_revisions_can_be_gone_back_to(driver: Driver) -> None:
    made = group("g", engine("a"))
    made_by_upstream(driver, made)
    uid = driver.read("RoleBasedGroup", "g")["metadata"]["uid"]
    old = engine("a")
    old["template"]["spec"]["containers"][0]["image"] = "engine:0"
    del old["replicas"]
    owner = {"apiVersion": made["apiVersion"], "kind": "RoleBasedGroup", "name": "g", "uid": uid, "controller": True}
    metadata = {"name": "g-5d9c7b-1", "labels": {f"{PREFIX}/name": "g"}, "ownerReferences": [owner]}
    data = {"spec": {"roles": [{"$patch": "replace"}, {**old, "$patch": "replace"}], "roleTemplates": []}}
    apply(driver, "apps/v1/ControllerRevision", {"metadata": metadata, "data": data, "revision": 7})
    driver.run(10)
    revisions = [each for each in driver.cluster.objects("ControllerRevision") if each["metadata"]["name"] != "g-a"]
    ours = {each["revision"]: each for each in revisions if each["metadata"]["ownerReferences"][0]["uid"] == uid}
    assert sorted(ours) == [7, 8]
    kept = revision_data(ours[7]["data"])
    assert kept == {"roles": [old]}
    driver.edit("g", lambda each: each.update(spec=restore(each["spec"], kept)))
    driver.run(20)
    assert {image_of(pod) for pod in driver.pods().values()} == {"engine:0"} and driver.ready("g")


def test_entries_of_both_are_joined() -> None:
    def entry(manager: str, operation: str = "Apply", **fields: Any) -> Json:
        return {"manager": manager, "operation": operation, "fieldsV1": fields}

    theirs = entry(RBG, **{"f:spec": {"f:a": {}, "f:b": {"f:x": {}}}})
    ours = entry("diptych", **{"f:spec": {"f:b": {"f:y": {}}}, "f:metadata": {}})
    others = entry("kubectl", "Update", **{"f:spec": {"f:c": {}}})
    status = {**entry(RBG, **{"f:status": {}}), "subresource": "status"}
    assert taken_over([theirs, others, ours, status]) == [
        entry("diptych", **{"f:spec": {"f:a": {}, "f:b": {"f:x": {}, "f:y": {}}}, "f:metadata": {}}),
        others,
        {**status, "manager": "diptych"},
    ]


def test_what_operators_add_makes_no_other_program() -> None:
    labels = names.role_labels(NAMESPACE, "g", "a")
    one = upstream_template(engine("a"), labels, "g-a")
    assert runs_the_same([one], [TEMPLATE])
    other = copy.deepcopy(TEMPLATE)
    other["spec"]["containers"][0]["env"][0]["value"] = "2"
    assert not runs_the_same([one], [other]) and not runs_the_same([one, one], [TEMPLATE])
