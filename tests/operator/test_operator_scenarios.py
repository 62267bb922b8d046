"""What RoleBasedGroup's authors test and no other test here shows; docs/kubernetes-scenarios.md lists all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from driver import Driver, image_of, is_pod_ready, set_image
from kube_world import group, role

from diptych.group.operator import view
from diptych.group.operator.observe import REVISION
from diptych.group.operator.resources import Json
from diptych.group.revision import restore
from diptych.testing.kube import ApiError, Behaviour

STATEFUL_SET = {"apiVersion": "apps/v1", "kind": "StatefulSet"}
DEPLOYMENT = {"apiVersion": "apps/v1", "kind": "Deployment"}
LWS = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet"}
INSTANCE, WHOLE = "RecreateRoleInstanceOnPodRestart", "RecreateRBGOnPodRestart"

every_kind = pytest.mark.parametrize("workload", [STATEFUL_SET, DEPLOYMENT, LWS], ids=lambda each: each["kind"])


def uids(driver: Driver, of_role: str = "") -> dict[str, str]:
    return {name: pod["metadata"]["uid"] for name, pod in driver.pods(of_role).items()}


def renewed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Pods that are no longer what they were."""
    return {name for name, uid in before.items() if after.get(name) != uid}


def images(driver: Driver) -> dict[str, str]:
    return {name: image_of(pod) for name, pod in driver.pods().items()}


def restarting(driver: Driver) -> str:
    return str(driver.conditions("g")["RestartInProgress"]["status"])


def first_role(**fields: Any) -> Callable[[Json], None]:
    return lambda obj: obj["spec"]["roles"][0].update(fields)


# ---- updates -----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("limits", [{}, {"maxUnavailable": 2, "maxSurge": 2}], ids=["default", "two"])
def test_replicas_and_a_label_of_the_template_change_at_once(driver: Driver, workload: Json, limits: Json) -> None:
    driver.create(group("g", role("a", 2, workload=workload, rolloutStrategy={"rollingUpdate": limits})))
    driver.run(10)

    def change(obj: Json) -> None:
        obj["spec"]["roles"][0]["replicas"] = 3
        obj["spec"]["roles"][0]["template"]["metadata"] = {"labels": {"build": "2"}}

    driver.edit("g", change)
    driver.run(60)
    assert driver.ready("g") and driver.read(workload["kind"], "g-a")["spec"]["replicas"] == 3
    assert [pod["metadata"]["labels"].get("build") for pod in driver.pods().values()] == ["2"] * 3


@pytest.mark.parametrize("part", ["Leader", "Worker"])
def test_the_templates_of_leaders_and_workers_change_one_without_the_other(driver: Driver, part: str) -> None:
    driver.create(group("g", role("a", workload=LWS, leaderWorkerSet={"size": 2})))
    driver.run(10)
    patch = {"spec": {"containers": [{"name": "engine", "image": "patched:1"}]}}
    driver.edit("g", first_role(leaderWorkerSet={"size": 2, f"patch{part}Template": patch}))
    driver.run(30)
    assert driver.ready("g")
    assert [name for name, image in images(driver).items() if image == "patched:1"] == [
        "g-a-0" if part == "Leader" else "g-a-0-1"
    ]


def test_one_edit_of_one_replica_is_one_change_of_its_workload(driver: Driver) -> None:
    driver.create(group("g", role("a")))
    driver.run(5)
    before = driver.read("StatefulSet", "g-a")["metadata"]["generation"]
    driver.edit("g", set_image("engine:2"))
    driver.run(60)
    assert images(driver) == {"g-a-0": "engine:2"}
    assert driver.read("StatefulSet", "g-a")["metadata"]["generation"] == before + 1


@pytest.mark.parametrize(
    "fields",
    [
        {"restartPolicy": INSTANCE},
        {"dependencies": ["b"]},
        {"labels": {"team": "x"}, "annotations": {"note": "y"}},
        {"minReadySeconds": 1},
        {"rolloutStrategy": {"rollingUpdate": {"maxUnavailable": 2}}},
    ],
    ids=lambda each: next(iter(each)),
)
def test_an_edit_that_no_pod_sees_is_a_revision_and_rolls_nothing(driver: Driver, fields: Json) -> None:
    driver.create(group("g", role("a", 2), role("b")))
    driver.run(5)
    before, other = uids(driver), driver.read("StatefulSet", "g-b")["metadata"]["generation"]
    driver.edit("g", first_role(**fields))
    driver.run(20)
    assert uids(driver) == before and driver.ready("g")
    assert driver.read("StatefulSet", "g-b")["metadata"]["generation"] == other
    assert sorted(each["revision"] for each in driver.cluster.objects("ControllerRevision") if owned(each)) == [1, 2]


WRITTEN_DEFAULTS = {
    "restartPolicy": "Always",
    "terminationGracePeriodSeconds": 30,
    "containers": [{"name": "engine", "image": "engine:1", "imagePullPolicy": "IfNotPresent", "resources": {}}],
}


@pytest.mark.parametrize("workload", [STATEFUL_SET, DEPLOYMENT], ids=lambda each: each["kind"])
def test_writing_out_defaults_of_a_pod_rolls_nothing_and_what_follows_does(driver: Driver, workload: Json) -> None:
    """Neither does leaving them out again. (A LeaderWorkerSet's own controller would roll for it.)"""
    driver.create(group("g", role("a", 2, workload=workload), role("b")))
    driver.run(5)
    before = uids(driver)
    driver.edit("g", first_role(template={"spec": WRITTEN_DEFAULTS}))
    driver.run(20)
    assert uids(driver) == before and driver.ready("g")
    driver.edit("g", first_role(template=role("a")["template"]))
    driver.run(20)
    assert uids(driver) == before and driver.ready("g")
    driver.edit("g", first_role(template={"spec": {**WRITTEN_DEFAULTS, "terminationGracePeriodSeconds": 31}}))
    driver.run(60)
    assert renewed(before, uids(driver)) == {name for name in before if name.startswith("g-a-")}


def test_an_operator_that_leaves_defaults_out_rolls_nothing_of_one_that_did_not(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Revisions were once named after templates as written. Those in use keep their names, on the way back too."""
    with monkeypatch.context() as patch:
        patch.setattr(view, "without_defaults", lambda template: template)
        driver.create(group("g", role("a", 2, rolloutStrategy={"rollingUpdate": {"partition": 1}})))
        driver.edit("g", first_role(template={"spec": WRITTEN_DEFAULTS}))
        driver.run(5)
        named = {pod["metadata"]["labels"][REVISION] for pod in driver.pods().values()}
    driver.restart()
    before = uids(driver)
    driver.run(20)
    assert uids(driver) == before and driver.ready("g")
    driver.edit("g", set_image("engine:2"))
    driver.run(30)
    assert renewed(before, uids(driver)) == {"g-a-1"}
    driver.edit("g", set_image("engine:1"))
    driver.run(30)
    assert renewed(before, uids(driver)) == {"g-a-1"} and driver.ready("g")
    assert {pod["metadata"]["labels"][REVISION] for pod in driver.pods().values()} == named


def owned(revision: Json) -> bool:
    """By the group; StatefulSets have revisions of their own."""
    return bool(revision["metadata"]["ownerReferences"][0]["kind"] == "RoleBasedGroup")


def test_roles_of_one_template_are_patched_updated_and_brought_back(driver: Driver) -> None:
    cpu = {"spec": {"containers": [{"name": "engine", "resources": {"limits": {"cpu": "2"}}}]}}
    made = group("g", role("own"), roleTemplates=[{"name": "base", "template": role("x")["template"]}])
    for name, patch in (("one", cpu), ("two", {})):
        made["spec"]["roles"].append({"name": name, "templateRef": {"name": "base"}, "templatePatch": patch})
    driver.create(made)
    driver.run(5)
    limits = {
        name: pod["spec"]["containers"][0].get("resources", {}).get("limits") for name, pod in driver.pods().items()
    }
    assert limits == {"g-one-0": {"cpu": "2"}, "g-own-0": None, "g-two-0": None}
    spec = driver.read("RoleBasedGroup", "g")["spec"]
    (first,) = [each for each in driver.cluster.objects("ControllerRevision") if owned(each)]

    def change(obj: Json) -> None:
        obj["spec"]["roleTemplates"][0]["template"]["spec"]["containers"][0]["image"] = "engine:2"

    driver.edit("g", change)
    driver.run(20)
    assert images(driver) == {"g-one-0": "engine:2", "g-own-0": "engine:1", "g-two-0": "engine:2"}
    assert max(each["revision"] for each in driver.cluster.objects("ControllerRevision") if owned(each)) == 2
    driver.edit("g", lambda obj: obj.update(spec=restore(obj["spec"], first["data"])))
    driver.run(20)
    assert set(images(driver).values()) == {"engine:1"} and driver.read("RoleBasedGroup", "g")["spec"] == spec


def test_a_partition_is_lowered_step_by_step(driver: Driver) -> None:
    driver.create(group("g", role("a", 4, rolloutStrategy={"rollingUpdate": {"partition": 4}})))
    driver.run(5)
    driver.edit("g", set_image("engine:2"))
    for partition in (4, 3, 2, 0):
        driver.edit("g", first_role(rolloutStrategy={"rollingUpdate": {"partition": partition}}))
        driver.run(20)
        assert list(images(driver).values()) == ["engine:1"] * partition + ["engine:2"] * (4 - partition)
        assert driver.ready("g")


# ---- coordination ------------------------------------------------------------------------------------------------


def test_a_coordinated_partition_is_lowered(driver: Driver) -> None:
    def policy(partition: str) -> list[Json]:
        strategy = {"rollingUpdate": {"maxSkew": "50%", "partition": partition, "maxUnavailable": "50%"}}
        return [{"name": "pd", "roles": ["p", "d"], "strategy": strategy}]

    driver.create(group("g", role("p", 4), role("d", 4), coordination=policy("50%")))
    driver.run(5)
    driver.edit("g", set_image("engine:2"))
    driver.run(30)
    old = {name for name, image in images(driver).items() if image == "engine:1"}
    assert old == {"g-p-0", "g-p-1", "g-d-0", "g-d-1"} and driver.ready("g")
    driver.edit("g", lambda obj: obj["spec"].update(coordination=policy("0%")))
    driver.run(30)
    assert set(images(driver).values()) == {"engine:2"} and driver.ready("g")


def test_coordinated_scaling_keeps_the_ready_pods_of_both_roles_within_one(driver: Driver) -> None:
    strategy = {"scaling": {"maxSkew": "33%", "progression": "OrderReady"}}
    coordination = [{"name": "pd", "roles": ["p", "d"], "strategy": strategy}]
    driver.create(group("g", role("p"), role("d"), coordination=coordination))
    driver.run(5)
    for index in (1, 2):  # the others are ready already
        driver.cluster.pods.rule(name=f"g-p-{index}", ready_s=2.0)
        driver.cluster.pods.rule(name=f"g-d-{index}", ready_s=9.0)
    skews: list[int] = []

    def note() -> None:
        ready = [sum(map(is_pod_ready, driver.pods(name).values())) for name in ("p", "d")]
        skews.append(abs(ready[0] - ready[1]))

    driver.checks.append(note)
    driver.edit("g", lambda obj: [each.update(replicas=3) for each in obj["spec"]["roles"]])
    driver.run(60)
    assert len(driver.pods()) == 6 and driver.ready("g") and max(skews) == 1


# ---- restarts ----------------------------------------------------------------------------------------------------


@every_kind
def test_the_group_restarts_as_one_when_a_pod_fails_and_not_when_one_is_deleted(driver: Driver, workload: Json) -> None:
    driver.cluster.pods.behaviour = Behaviour(ended_s=1.0)  # long enough to be seen as it ends
    driver.create(group("g", role("a", 2, workload=workload, restartPolicy="RecreateRBGOnPodRestart"), role("b")))
    driver.run(10)
    before, deleted = uids(driver), min(driver.pods("a"))
    driver.delete("Pod", deleted)
    driver.run(20)
    between = uids(driver)
    assert renewed(before, between) == {deleted} and len(between) == 3
    assert driver.ready("g") and restarting(driver) == "False"
    driver.cluster.pods.crash(min(driver.pods("a")))
    driver.run(30)
    after = uids(driver)
    assert not set(between.values()) & set(after.values()) and len(after) == 3
    assert driver.ready("g") and restarting(driver) == "False"


@every_kind
@pytest.mark.parametrize("policy", ["None", INSTANCE])
def test_a_pod_that_ended_for_good_is_replaced_and_no_other(driver: Driver, workload: Json, policy: str) -> None:
    """Evicted, say."""
    driver.create(group("g", role("a", 3, workload=workload, restartPolicy=policy), role("b")))
    driver.run(10)
    before, failed = uids(driver), sorted(driver.pods("a"))[1]
    driver.cluster.pods.fail(failed)
    driver.run(20)
    assert renewed(before, uids(driver)) == {failed} and len(driver.pods("a")) == 3
    assert driver.ready("g") and restarting(driver) == "False"


@pytest.mark.parametrize("policy", [None, INSTANCE, "None"])
def test_a_worker_that_restarts_takes_its_instance_along_unless_the_policy_is_none(
    driver: Driver, policy: str | None
) -> None:
    more = {"restartPolicy": policy} if policy else {}
    driver.create(group("g", role("a", 2, workload=LWS, leaderWorkerSet={"size": 3}, **more), role("b")))
    driver.run(10)
    before = uids(driver)
    driver.cluster.pods.crash("g-a-1-2")
    driver.run(20)
    after = uids(driver)
    assert renewed(before, after) == (set() if policy == "None" else {"g-a-1", "g-a-1-1", "g-a-1-2"})
    assert after.keys() == before.keys() and driver.ready("g")
    driver.run(60)
    assert uids(driver) == after


def test_an_instance_that_fails_again_keeps_its_logs_for_a_while_and_its_siblings_for_good(driver: Driver) -> None:
    driver.create(group("g", role("a", 3, restartPolicy=INSTANCE)))
    driver.run(5)
    driver.cluster.pods.crash("g-a-1")
    driver.run(5)
    driver.cluster.pods.crash("g-a-1")  # the second in a row: a pause of 10 s
    waiting = uids(driver)
    driver.run(8)
    assert uids(driver) == waiting and restarting(driver) == "True"
    driver.run(5)
    assert renewed(waiting, uids(driver)) == {"g-a-1"} and restarting(driver) == "False" and driver.ready("g")


def test_an_update_of_a_role_goes_on_while_an_instance_of_it_waits(driver: Driver) -> None:
    driver.create(group("g", role("a", 3, restartPolicy=INSTANCE)))
    driver.run(5)
    for _ in range(4):  # the next pause is 40 s
        driver.cluster.pods.crash("g-a-1")
        driver.run(25)
    driver.cluster.pods.crash("g-a-1")
    driver.run(1)
    driver.edit("g", set_image("engine:2"))
    driver.run(10)
    assert set(images(driver).values()) == {"engine:2"} and driver.ready("g")


@pytest.mark.parametrize("policy", [INSTANCE, WHOLE])
def test_a_pod_that_fails_before_it_was_ever_ready_is_left_to_its_kubelet(driver: Driver, policy: str) -> None:
    broken = driver.cluster.pods.rule(name="g-a-1", ready_s=None, crash_s=20.0)
    driver.create(group("g", role("a", 2, restartPolicy=policy)))
    driver.run(5)
    before = uids(driver)
    driver.run(90)
    assert uids(driver) == before and restarting(driver) == "False"
    broken()
    driver.run(30)  # it comes up in the end: the restarts of before are no failures of today
    assert driver.ready("g") and uids(driver) == before
    driver.cluster.pods.crash("g-a-1")
    driver.run(30)
    assert driver.ready("g") and renewed(before, uids(driver)) == ({"g-a-1"} if policy == INSTANCE else set(before))


def test_an_update_that_cannot_start_takes_no_other_pod_along(driver: Driver) -> None:
    driver.create(group("g", role("a", 3, restartPolicy=WHOLE), role("b")))
    driver.run(5)
    before = uids(driver)
    fixed = driver.cluster.pods.rule(name="g-a-2", ready_s=None, crash_s=10.0)
    driver.edit("g", set_image("broken:1", "a"))
    driver.run(120)
    assert renewed(before, uids(driver)) == {"g-a-2"}
    driver.edit("g", set_image("engine:1", "a"))
    fixed()
    driver.run(30)
    assert renewed(before, uids(driver)) == {"g-a-2"} and driver.ready("g")


# ---- names, variables, adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.b", "1a", "g" * 64])
def test_a_group_whose_name_is_no_label_is_refused(driver: Driver, name: str) -> None:
    with pytest.raises(ApiError, match=r"metadata\.name") as refused:
        driver.create(group(name, role("a")))
    assert refused.value.code == 422 and driver.names("RoleBasedGroup") == []


def test_every_pod_of_a_leader_worker_set_knows_its_group_and_role(driver: Driver) -> None:
    driver.create(group("g", role("a", 2, workload=LWS, leaderWorkerSet={"size": 2})))
    driver.run(10)
    assert len(driver.pods()) == 4
    for pod in driver.pods().values():
        known = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
        assert known["GROUP_NAME"] == "g" and known["ROLE_NAME"] == "a" and "ROLE_INDEX" in known


def test_an_adapter_that_is_no_longer_mentioned_goes_and_its_replicas_stay(driver: Driver) -> None:
    driver.create(group("g", role("a", scalingAdapter={"enable": True})))
    driver.run(5)
    driver.edit("g-a", lambda obj: obj["spec"].update(replicas=3), "RoleBasedGroupScalingAdapter")
    driver.run(5)
    driver.edit("g", lambda obj: obj["spec"]["roles"][0].pop("scalingAdapter"))
    driver.run(5)
    assert driver.names("RoleBasedGroupScalingAdapter") == [] and len(driver.pods()) == 3 and driver.ready("g")
