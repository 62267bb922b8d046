"""Workload kinds, adapters, sets, gangs, profiles, history: one feature at a time, the operator driven by hand."""

from __future__ import annotations

import copy

import pytest
import yaml
from driver import Driver, image_of, set_image
from kube_world import NAMESPACE, group, role

from diptych.group.operator.history import KEEP
from diptych.group.operator.resources import GROUP, PROFILE, Json
from diptych.testing.kube import Behaviour

PREFIX = "rolebasedgroup.workloads.x-k8s.io"
LWS = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet"}
DEPLOYMENT = {"apiVersion": "apps/v1", "kind": "Deployment"}
GANG_LABEL = "pod-group.scheduling.sigs.k8s.io/name"


def replicas_of(driver: Driver, name: str = "g") -> dict[str, int]:
    return {each["name"]: each.get("replicas", 1) for each in driver.read("RoleBasedGroup", name)["spec"]["roles"]}


def uids(driver: Driver, of_role: str = "") -> dict[str, str]:
    return {name: pod["metadata"]["uid"] for name, pod in driver.pods(of_role).items()}


# ---- workloads ---------------------------------------------------------------------------------------------------


def test_a_group_of_all_three_kinds_comes_and_goes(driver: Driver) -> None:
    size = {"workload": LWS, "leaderWorkerSet": {"size": 2}}
    driver.create(group("g", role("sts", 2), role("dep", 2, workload=DEPLOYMENT), role("lws", 2, **size)))
    driver.run(10)
    assert driver.ready("g")
    assert len(driver.pods("sts")) == 2 and len(driver.pods("dep")) == 2 and len(driver.pods("lws")) == 4
    status = {each["name"]: each for each in driver.read("RoleBasedGroup", "g")["status"]["roleStatuses"]}
    assert {name: each["readyReplicas"] for name, each in status.items()} == {"sts": 2, "dep": 2, "lws": 2}
    file = yaml.safe_load(driver.read("ConfigMap", "g")["data"]["config.yaml"])
    assert file["roles"]["dep"]["instances"] == []
    for address in (one["address"] for name in ("sts", "lws") for one in file["roles"][name]["instances"]):
        assert driver.cluster.resolve(address) == [address.partition(".")[0]]
    driver.delete("RoleBasedGroup", "g")
    driver.run(10)
    for kind in ("RoleBasedGroup", "StatefulSet", "Deployment", "LeaderWorkerSet", "Pod", "Service", "ConfigMap"):
        assert driver.names(kind) == []


@pytest.mark.parametrize("workload", [DEPLOYMENT, LWS])
def test_other_kinds_are_scaled_and_updated(driver: Driver, workload: Json) -> None:
    strategy = {"rollingUpdate": {"maxUnavailable": 1, "maxSurge": 1}}
    driver.create(group("g", role("a", 2, workload=workload, rolloutStrategy=strategy)))
    driver.run(10)

    def change(obj: Json) -> None:
        set_image("engine:2")(obj)
        obj["spec"]["roles"][0]["replicas"] = 3

    driver.edit("g", change)
    driver.run(60)
    assert [image_of(pod) for pod in driver.pods().values()] == ["engine:2"] * 3
    assert driver.ready("g")


def test_leaders_and_workers_have_templates_of_their_own(driver: Driver) -> None:
    def patched(image: str) -> Json:
        return {"spec": {"containers": [{"name": "engine", "image": image}]}}

    patches = {"size": 2, "patchLeaderTemplate": patched("leader:1"), "patchWorkerTemplate": patched("worker:1")}
    driver.create(group("g", role("a", workload=LWS, leaderWorkerSet=patches)))
    driver.run(10)
    assert {name: image_of(pod) for name, pod in driver.pods().items()} == {"g-a-0": "leader:1", "g-a-0-1": "worker:1"}

    def change(obj: Json) -> None:
        obj["spec"]["roles"][0]["leaderWorkerSet"]["patchWorkerTemplate"] = patched("worker:2")

    driver.edit("g", change)
    driver.run(30)
    assert {name: image_of(pod) for name, pod in driver.pods().items()} == {"g-a-0": "leader:1", "g-a-0-1": "worker:2"}
    assert driver.ready("g")


def test_a_deployment_that_is_paused_and_released(driver: Driver) -> None:
    driver.create(group("g", role("a", 2, workload=DEPLOYMENT)))
    driver.run(5)
    driver.edit("g", lambda each: each["spec"].update(paused=True))
    driver.edit("g", set_image("engine:2"))
    driver.run(10)
    assert {image_of(pod) for pod in driver.pods().values()} == {"engine:1"}
    driver.edit("g", lambda each: each["spec"].update(paused=False))
    driver.run(20)
    assert [image_of(pod) for pod in driver.pods().values()] == ["engine:2"] * 2


def test_a_role_that_changes_its_kind(driver: Driver) -> None:
    driver.create(group("g", role("a", 2), role("b")))
    driver.run(5)
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(workload=DEPLOYMENT))
    driver.run(20)
    assert driver.names("StatefulSet") == ["g-b"] and driver.names("Deployment") == ["g-a"]
    assert driver.names("Service") == ["g-b"] and driver.ready("g") and len(driver.pods("a")) == 2
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(workload=LWS))
    driver.run(20)
    driver.edit("g", lambda each: each["spec"]["roles"][0].pop("workload"))
    driver.run(20)
    assert driver.names("StatefulSet") == ["g-a", "g-b"] and not driver.names("Deployment")
    assert driver.names("Service") == ["g-a", "g-b"] and driver.ready("g")


def test_renaming_every_role_leaves_nothing_of_the_old_ones(driver: Driver) -> None:
    driver.create(group("g", role("a", podDisruptionBudget={"maxUnavailable": 1}), role("b", workload=DEPLOYMENT)))
    driver.run(5)

    def rename(obj: Json) -> None:
        for each in obj["spec"]["roles"]:
            each["name"] = f"{each['name']}2"

    driver.edit("g", rename)
    driver.run(20)
    assert driver.names("StatefulSet") == ["g-a2"] and driver.names("Deployment") == ["g-b2"]
    assert driver.names("Service") == ["g-a2"] and driver.names("PodDisruptionBudget") == ["g-a2"]
    assert driver.ready("g")


def test_a_role_template_changes_every_role_made_from_it(driver: Driver) -> None:
    template = role("x")["template"]
    patch = {"spec": {"containers": [{"name": "engine", "env": [{"name": "A", "value": "1"}]}]}}
    spec = group("g", role("own"), roleTemplates=[{"name": "base", "template": template}])
    for name, change in (("one", patch), ("two", {})):
        spec["spec"]["roles"].append(
            {"name": name, "replicas": 1, "templateRef": {"name": "base"}, "templatePatch": change}
        )
    driver.create(spec)
    driver.run(5)
    names = [
        each["name"] for each in driver.read("StatefulSet", "g-one")["spec"]["template"]["spec"]["containers"][0]["env"]
    ]
    assert names == ["GROUP_NAME", "ROLE_NAME", "ROLE_INDEX", "A"]
    old = uids(driver)

    def change_base(obj: Json) -> None:
        obj["spec"]["roleTemplates"][0]["template"]["spec"]["containers"][0]["image"] = "engine:2"

    driver.edit("g", change_base)
    driver.run(10)
    assert {name: image_of(pod) for name, pod in driver.pods().items()} == {
        "g-own-0": "engine:1",
        "g-one-0": "engine:2",
        "g-two-0": "engine:2",
    }
    assert uids(driver)["g-own-0"] == old["g-own-0"]


# ---- adapters ----------------------------------------------------------------------------------------------------


def scale(driver: Driver, name: str, replicas: int) -> None:
    """As an autoscaler does."""
    kind = "RoleBasedGroupScalingAdapter"
    driver.cluster.api.patch(
        kind, NAMESPACE, name, {"spec": {"replicas": replicas}}, subresource="scale", manager="hpa"
    )


def test_an_autoscaler_scales_a_role_and_helm_does_not_undo_it(driver: Driver) -> None:
    manifest = group("g", role("a", 2, scalingAdapter={"enable": True}), role("b"))
    driver.create(manifest)
    driver.run(5)
    adapter = driver.read("RoleBasedGroupScalingAdapter", "g-a")
    assert adapter["spec"]["replicas"] == 2 and adapter["status"]["phase"] == "Bound"
    selected = dict(each.split("=") for each in adapter["status"]["selector"].split(","))
    assert selected.items() <= next(iter(driver.pods("a").values()))["metadata"]["labels"].items()
    scale(driver, "g-a", 4)
    driver.run(5)
    assert replicas_of(driver) == {"a": 4, "b": 1} and len(driver.pods("a")) == 4
    status = driver.read("RoleBasedGroupScalingAdapter", "g-a")["status"]
    assert status["replicas"] == 4 and status["lastScaleTime"]
    before = uids(driver)
    low: list[int] = []
    driver.checks.append(lambda: low.append(len(driver.pods("a"))))
    driver.edit("g", lambda each: each.update(spec=copy.deepcopy(manifest["spec"])))
    driver.run(5)
    assert min(low) == 4 and uids(driver) == before and replicas_of(driver)["a"] == 4


def test_adapters_come_and_go_with_their_role(driver: Driver) -> None:
    on = {"scalingAdapter": {"enable": True}}
    driver.create(group("g", role("a", **on), role("b", **on)))
    driver.run(5)
    assert driver.names("RoleBasedGroupScalingAdapter") == ["g-a", "g-b"]
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(scalingAdapter={"enable": False}))
    driver.run(5)
    assert driver.names("RoleBasedGroupScalingAdapter") == ["g-b"]
    driver.edit("g", lambda each: each["spec"]["roles"].append(role("c", **on)))
    driver.run(5)
    assert driver.names("RoleBasedGroupScalingAdapter") == ["g-b", "g-c"]
    driver.edit("g", lambda each: each["spec"]["roles"].pop(1))
    driver.run(5)
    assert driver.names("RoleBasedGroupScalingAdapter") == ["g-c"]
    driver.delete("RoleBasedGroup", "g")
    driver.run(5)
    assert driver.names("RoleBasedGroupScalingAdapter") == []


def test_prefill_and_decode_are_scaled_in_their_ratio(driver: Driver) -> None:
    scaling = {"name": "pd", "replicas": 1, "roles": {"p": 2, "d": 1}, "scalingAdapter": {"enable": True}}
    driver.create(group("g", role("p"), role("d"), role("router"), scalingGroups=[scaling]))
    driver.run(5)
    assert (len(driver.pods("p")), len(driver.pods("d"))) == (2, 1)
    scale(driver, "g-pd", 3)
    driver.run(5)
    assert (len(driver.pods("p")), len(driver.pods("d")), len(driver.pods("router"))) == (6, 3, 1)
    assert driver.read("RoleBasedGroup", "g")["spec"]["scalingGroups"][0]["replicas"] == 3 and driver.ready("g")
    scale(driver, "g-pd", 0)
    driver.run(5)
    assert list(driver.pods()) == ["g-router-0"]


def test_an_adapter_that_is_not_the_groups_own_scales_nothing(driver: Driver) -> None:
    driver.create(group("g", role("a", scalingAdapter={"enable": True})))
    driver.run(5)
    target = {"scaleTargetRef": {"name": "g", "role": "a"}, "replicas": 9}
    labels = driver.read("RoleBasedGroupScalingAdapter", "g-a")["metadata"]["labels"]
    made = {"apiVersion": GROUP.api_version, "kind": "RoleBasedGroupScalingAdapter", "spec": target}
    driver.create({**made, "metadata": {"name": "forged", "labels": labels}})
    driver.run(5)
    assert len(driver.pods()) == 1
    assert driver.read("RoleBasedGroupScalingAdapter", "forged")["status"]["phase"] == "NotBound"


def test_an_autoscaler_that_wants_too_much_is_refused(driver: Driver) -> None:
    driver.create(group("g", role("a", scalingAdapter={"enable": True})))
    driver.run(5)
    scale(driver, "g-a", 2_000_000_000)
    driver.run(5)
    assert "too many" in driver.conditions("g")["Ready"]["message"] and len(driver.pods()) == 1
    scale(driver, "g-a", 2)
    driver.run(5)
    assert driver.ready("g") and len(driver.pods()) == 2


# ---- gangs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ({"kubeScheduling": {}}, "scheduling.x-k8s.io/v1alpha1/PodGroup"),
        ({"volcanoScheduling": {"queue": "gpu"}}, "scheduling.volcano.sh/v1beta1/PodGroup"),
    ],
)
def test_a_gang_starts_wave_by_wave_and_its_pod_group_goes_when_it_is_not_wanted(
    driver: Driver, policy: Json, kind: str
) -> None:
    roles = role("router", dependencies=["engine"]), role("engine", 3, minAvailable=2)
    driver.create(group("g", *roles, podGroupPolicy=policy))
    driver.run(10)
    assert driver.ready("g")
    spec = driver.cluster.api.get(kind, NAMESPACE, "g")["spec"]
    assert spec["minMember"] == 3 and spec.get("queue", "gpu") == "gpu"
    for pod in driver.pods().values():
        metadata = pod["metadata"]
        marks = metadata["labels"].get(GANG_LABEL), metadata.get("annotations", {}).get("scheduling.k8s.io/group-name")
        assert "g" in marks
    driver.edit("g", lambda each: each["spec"].pop("podGroupPolicy"))
    driver.run(30)
    assert driver.names(kind) == [] and driver.ready("g")
    assert not any(GANG_LABEL in pod["metadata"]["labels"] for pod in driver.pods().values())


def test_changing_the_scheduler_of_a_gang(driver: Driver) -> None:
    driver.create(group("g", role("a", 2), podGroupPolicy={"kubeScheduling": {"scheduleTimeoutSeconds": 30}}))
    driver.run(10)
    driver.edit("g", lambda each: each["spec"]["podGroupPolicy"]["kubeScheduling"].update(scheduleTimeoutSeconds=90))
    driver.run(5)
    kube, volcano = "scheduling.x-k8s.io/v1alpha1/PodGroup", "scheduling.volcano.sh/v1beta1/PodGroup"
    assert driver.cluster.api.get(kube, NAMESPACE, "g")["spec"]["scheduleTimeoutSeconds"] == 90
    driver.edit("g", lambda each: each["spec"].update(podGroupPolicy={"volcanoScheduling": {}}))
    driver.run(30)
    assert driver.names(kube) == [] and driver.names(volcano) == ["g"] and driver.ready("g")


def test_a_role_that_was_a_leader_worker_set_becomes_another_kind(driver: Driver) -> None:
    """Whose controller makes a Service of the name that the role gets."""
    kind = {"apiVersion": "apps/v1", "kind": "StatefulSet"}
    driver.create(group("g", role("a", 0, workload=LWS), role("b", workload=LWS)))
    driver.run(5)
    assert {"g-a", "g-b"} <= set(driver.names("Service"))
    driver.edit("g", lambda each: [one.update(workload=kind, replicas=2) for one in each["spec"]["roles"]])
    driver.run(30)
    assert sorted(driver.pods()) == ["g-a-0", "g-a-1", "g-b-0", "g-b-1"] and driver.ready("g")
    assert driver.events("FailedReconcile") == [] and driver.names("LeaderWorkerSet") == []


def test_a_gang_without_its_scheduler_says_what_is_missing() -> None:
    driver = Driver(without=["scheduling.x-k8s.io", "scheduling.volcano.sh"])
    driver.create(group("g", role("a"), podGroupPolicy={"kubeScheduling": {}}))
    driver.run(5)
    assert any("knows no PodGroup" in each for each in driver.events("FailedReconcile"))


# ---- profiles, drain, topology -----------------------------------------------------------------------------------


def profile(image: str, update: str) -> Json:
    spec = {"updateStrategy": update, "containers": [{"name": "patio-runtime", "image": image}]}
    return {"apiVersion": PROFILE.api_version, "kind": PROFILE.kind, "metadata": {"name": "p"}, "spec": spec}


def sidecars(driver: Driver) -> list[str]:
    return [pod["spec"]["containers"][1]["image"] for pod in driver.pods().values()]


@pytest.mark.parametrize("update", ["NoUpdate", "RollingUpdate"])
def test_a_change_of_a_profile_reaches_pods_that_run_if_it_says_so(driver: Driver, update: str) -> None:
    driver.create(profile("s:1", update), group("g", role("a", 2, engineRuntimes=[{"profileName": "p"}])))
    driver.run(5)
    assert sidecars(driver) == ["s:1", "s:1"]
    kind = "ClusterEngineRuntimeProfile"
    driver.cluster.api.patch(kind, "", "p", {"spec": {"containers": [{"name": "patio-runtime", "image": "s:2"}]}})
    driver.run(10)
    assert set(sidecars(driver)) == {"s:1" if update == "NoUpdate" else "s:2"}
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(replicas=3))
    driver.run(5)
    assert len(set(sidecars(driver))) == 1 and driver.ready("g")
    driver.edit("g", set_image("engine:2"))
    driver.run(20)
    assert sidecars(driver) == ["s:2"] * 3 and driver.ready("g")


def test_a_profile_goes_into_leaders_only(driver: Driver) -> None:
    runtime = {"engineRuntimes": [{"profileName": "p"}], "workload": LWS, "leaderWorkerSet": {"size": 2}}
    driver.create(profile("s:1", "NoUpdate"), group("g", role("a", **runtime)))
    driver.run(5)
    names = {name: [each["name"] for each in pod["spec"]["containers"]] for name, pod in driver.pods().items()}
    assert names == {"g-a-0": ["engine", "patio-runtime"], "g-a-0-1": ["engine"]}


def test_a_profile_that_comes_later_lets_the_group_begin(driver: Driver) -> None:
    driver.create(group("g", role("a", engineRuntimes=[{"profileName": "p"}])))
    driver.run(5)
    assert driver.conditions("g")["Ready"]["reason"] == "InvalidSpec"
    driver.create(profile("s:1", "NoUpdate"))
    driver.run(5)
    assert driver.ready("g")


def test_exclusive_topology_can_be_switched_on_later(driver: Driver) -> None:
    driver.create(group("g", role("a"), role("b", workload=DEPLOYMENT), role("c", workload=LWS)))
    driver.run(5)
    key = f"{PREFIX}/exclusive-topology"
    driver.edit(
        "g", lambda each: each["metadata"].setdefault("annotations", {}).update({key: "kubernetes.io/hostname"})
    )
    driver.run(60)
    assert driver.ready("g")
    for pod in driver.pods().values():
        assert pod["spec"]["affinity"]["podAffinity"] and pod["spec"]["affinity"]["podAntiAffinity"]


def test_a_pod_that_drains_holds_up_the_update_until_it_has_gone(driver: Driver) -> None:
    driver.create(group("g", role("a", 2, drain={"path": "/drain", "timeoutSeconds": 120})))
    driver.run(5)
    driver.cluster.pods.behaviour = Behaviour(ended_s=30.0)
    driver.edit("g", set_image("engine:2"))
    driver.run(20)
    pods = driver.cluster.objects("Pod")
    assert [("deletionTimestamp" in pod["metadata"]) for pod in pods] == [False, True]
    assert pods[1]["metadata"]["deletionGracePeriodSeconds"] >= 120
    driver.run(60)
    assert {image_of(pod) for pod in driver.pods().values()} == {"engine:2"}


# ---- history -----------------------------------------------------------------------------------------------------


def revisions(driver: Driver) -> dict[int, str]:
    uid = driver.read("RoleBasedGroup", "g")["metadata"]["uid"]
    own = [
        each
        for each in driver.cluster.objects("ControllerRevision")
        if each["metadata"]["ownerReferences"][0]["uid"] == uid
    ]
    return {each["revision"]: each["metadata"]["name"] for each in own}


def test_history_keeps_the_newest_and_numbers_a_spec_that_returns_anew(driver: Driver) -> None:
    driver.create(group("g", role("a")))
    driver.run(5)
    first = revisions(driver)[1]
    for number in range(2, 4):
        driver.edit("g", set_image(f"engine:{number}"))
        driver.run(5)
    assert sorted(revisions(driver)) == [1, 2, 3]
    driver.edit("g", set_image("engine:1"))
    driver.run(5)
    assert sorted(revisions(driver)) == [2, 3, 4] and revisions(driver)[4] == first
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(replicas=3))
    driver.run(5)
    assert sorted(revisions(driver)) == [2, 3, 4]  # scaling is no revision
    for number in range(5, 12):
        driver.edit("g", set_image(f"engine:{number}"))
        driver.run(5)
    assert sorted(revisions(driver)) == list(range(11, 11 - KEEP, -1))[::-1]
