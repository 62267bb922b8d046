"""The simulated controllers: StatefulSet, Deployment, LeaderWorkerSet, pods, gangs, budgets."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
from kube_objects import LABELS, Obj, config_map, deployment, pod, service, stateful_set, template

from diptych.testing.kube import ApiError, Behaviour, Cluster, Deleting
from diptych.testing.kube.disruption import evict


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(clock="manual")


def pods(cluster: Cluster, field: str = "") -> dict[str, Any]:
    """name → uid, or image, phase, ready."""
    views = {
        "": lambda one: one["metadata"]["uid"],
        "image": lambda one: one["spec"]["containers"][0]["image"],
        "phase": lambda one: one["status"]["phase"],
        "ready": lambda one: (
            {c["type"]: c["status"] for c in one["status"].get("conditions", [])}.get("Ready") == "True"
        ),
    }
    return {one["metadata"]["name"]: views[field](one) for one in cluster.objects("Pod")}


def status(cluster: Cluster, kind: str = "StatefulSet", name: str = "web") -> Obj:
    found: Obj = cluster.api.get(kind, "default", name)["status"]
    return found


def set_image(cluster: Cluster, image: str, kind: str = "StatefulSet") -> None:
    cluster.api.patch(kind, "default", "web", {"spec": {"template": template(image)}}, how="strategic")


def test_a_parallel_set_starts_all_its_pods_at_once(cluster: Cluster) -> None:
    cluster.pods.behaviour = Behaviour(scheduled_s=1, running_s=2, ready_s=3)
    cluster.create(stateful_set())
    cluster.settle()
    assert pods(cluster, "phase") == {f"web-{i}": "Pending" for i in range(3)}
    cluster.advance(3)
    assert pods(cluster, "phase") == {f"web-{i}": "Running" for i in range(3)}
    assert not any(pods(cluster, "ready").values())
    cluster.advance(3)
    assert all(pods(cluster, "ready").values())
    found = status(cluster)
    assert (found["replicas"], found["readyReplicas"], found["availableReplicas"]) == (3, 3, 3)
    assert found["currentRevision"] == found["updateRevision"] and found["observedGeneration"] == 1
    one = cluster.api.get("Pod", "default", "web-1")
    assert one["metadata"]["labels"] == {
        **LABELS,
        "apps.kubernetes.io/pod-index": "1",
        "statefulset.kubernetes.io/pod-name": "web-1",
        "controller-revision-hash": found["updateRevision"],
    }
    assert (one["spec"]["hostname"], one["spec"]["subdomain"]) == ("web-1", "web")
    assert one["metadata"]["ownerReferences"][0]["controller"] is True


def test_an_ordered_set_starts_and_stops_one_after_the_other(cluster: Cluster) -> None:
    cluster.pods.behaviour = Behaviour(ready_s=1, ended_s=1)
    cluster.create(stateful_set(podManagementPolicy="OrderedReady"))
    for count in (1, 2, 3):
        cluster.settle()
        assert len(pods(cluster)) == count
        cluster.advance(1)
    cluster.api.patch("StatefulSet", "default", "web", {"spec": {"replicas": 1}})
    cluster.settle()
    assert sum("deletionTimestamp" in one["metadata"] for one in cluster.objects("Pod")) == 1
    cluster.advance(1)
    assert len(pods(cluster)) == 2
    cluster.advance(1)
    assert list(pods(cluster)) == ["web-0"]


@pytest.mark.parametrize(("gates", "most"), [([], 1), (["MaxUnavailableStatefulSet"], 2)])
def test_a_rolling_update_keeps_to_its_limit(gates: list[str], most: int) -> None:
    """One pod at a time whatever maxUnavailable says, unless the gate is on; from the highest ordinal down."""
    cluster = Cluster(clock="manual", gates=gates)
    cluster.pods.behaviour = Behaviour(ready_s=1, ended_s=1)
    cluster.create(stateful_set(replicas=5, updateStrategy={"rollingUpdate": {"maxUnavailable": 2}}))
    cluster.advance(1)
    set_image(cluster, "web:2")
    worst, order = 0, []
    for _ in range(40):
        cluster.advance(0.25)
        ready = pods(cluster, "ready")
        worst = max(worst, 5 - sum(ready.values()))
        for name, image in pods(cluster, "image").items():
            if image == "web:2" and name not in order:
                order.append(name)
    assert worst == most
    assert order == (
        ["web-4", "web-3", "web-2", "web-1", "web-0"] if most == 1 else ["web-3", "web-4", "web-1", "web-2", "web-0"]
    )
    found = status(cluster)
    assert found["currentRevision"] == found["updateRevision"] and found["updatedReplicas"] == 5


def test_a_partition_holds_the_lower_pods_back_also_when_they_are_made_anew(cluster: Cluster) -> None:
    cluster.create(stateful_set(updateStrategy={"rollingUpdate": {"partition": 2}}))
    cluster.settle()
    set_image(cluster, "web:2")
    cluster.settle()
    assert pods(cluster, "image") == {"web-0": "web:1", "web-1": "web:1", "web-2": "web:2"}
    before = pods(cluster)
    cluster.api.delete("Pod", "default", "web-0")
    cluster.api.delete("Pod", "default", "web-2")
    cluster.settle()
    assert pods(cluster, "image") == {"web-0": "web:1", "web-1": "web:1", "web-2": "web:2"}
    assert {name for name in before if before[name] != pods(cluster)[name]} == {"web-0", "web-2"}
    found = status(cluster)
    assert (found["updatedReplicas"], found["currentReplicas"]) == (1, 2)
    assert found["currentRevision"] != found["updateRevision"]
    body = {"spec": {"updateStrategy": {"rollingUpdate": {"partition": 0}}}}
    cluster.api.patch("StatefulSet", "default", "web", body)
    cluster.settle()
    assert set(pods(cluster, "image").values()) == {"web:2"}


def test_going_back_to_an_old_template_reuses_its_revision(cluster: Cluster) -> None:
    cluster.create(stateful_set())
    cluster.settle()
    first = status(cluster)["updateRevision"]
    for image in ("web:2", "web:1"):
        set_image(cluster, image)
        cluster.settle()
    assert status(cluster)["updateRevision"] == first
    revisions = {one["metadata"]["name"]: one["revision"] for one in cluster.objects("ControllerRevision")}
    assert sorted(revisions.values()) == [2, 3] and revisions[first] == 3


def test_on_delete_makes_new_pods_at_the_new_revision_and_completes_nothing(cluster: Cluster) -> None:
    """The current revision stays behind: with a partition again, lost pods below it come back as they once were."""
    cluster.create(stateful_set())
    cluster.settle()
    strategy = {"updateStrategy": {"type": "OnDelete", "rollingUpdate": None}}
    cluster.api.patch("StatefulSet", "default", "web", {"spec": strategy})
    set_image(cluster, "web:2")
    cluster.settle()
    assert set(pods(cluster, "image").values()) == {"web:1"}
    for name in pods(cluster):
        cluster.api.delete("Pod", "default", name)
    cluster.settle()
    assert set(pods(cluster, "image").values()) == {"web:2"}
    found = status(cluster)
    assert found["updatedReplicas"] == 3 and found["currentRevision"] != found["updateRevision"]
    strategy = {"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}}
    cluster.api.patch("StatefulSet", "default", "web", {"spec": strategy})
    cluster.settle()
    assert status(cluster)["currentRevision"] == found["updateRevision"]


def test_on_delete_goes_with_no_rolling_update(cluster: Cluster) -> None:
    cluster.create(stateful_set())
    with pytest.raises(ApiError) as caught:
        cluster.api.patch("StatefulSet", "default", "web", {"spec": {"updateStrategy": {"type": "OnDelete"}}})
    assert caught.value.code == 422 and "only allowed for updateStrategy 'RollingUpdate'" in caught.value.message


def test_max_unavailable_has_a_default_only_behind_its_gate() -> None:
    for gates, rolling in (
        ([], {"partition": 0}),
        (["MaxUnavailableStatefulSet"], {"partition": 0, "maxUnavailable": 1}),
    ):
        (made,) = Cluster(clock="manual", gates=gates).create(stateful_set())
        assert made["spec"]["updateStrategy"]["rollingUpdate"] == rolling


def test_a_broken_update_stops_a_set(cluster: Cluster) -> None:
    cluster.create(stateful_set())
    cluster.settle()
    cluster.pods.rule(name="web-2", ready_s=None)
    set_image(cluster, "web:2")
    cluster.advance(60)
    assert pods(cluster, "image") == {"web-0": "web:1", "web-1": "web:1", "web-2": "web:2"}
    set_image(cluster, "web:3")  # a repair replaces the broken pod first
    cluster.advance(60)
    assert pods(cluster, "image") == {"web-0": "web:1", "web-1": "web:1", "web-2": "web:3"}


def test_pods_fail_crash_flap_and_wait(cluster: Cluster) -> None:
    cluster.create(stateful_set())
    cluster.settle()
    uid = pods(cluster)["web-0"]
    cluster.pods.fail("web-0")
    cluster.settle()
    assert pods(cluster)["web-0"] != uid  # a failed pod is made anew
    cluster.pods.behaviour = Behaviour(ready_s=5)
    cluster.pods.crash("web-1")
    cluster.settle()
    one = cluster.api.get("Pod", "default", "web-1")
    assert one["status"]["containerStatuses"][0]["restartCount"] == 1
    assert pods(cluster, "ready") == {"web-0": True, "web-1": False, "web-2": True}
    cluster.advance(5)
    assert all(pods(cluster, "ready").values())
    cluster.pods.set_ready("web-2", False)
    cluster.advance(60)
    assert pods(cluster, "ready")["web-2"] is False and status(cluster)["readyReplicas"] == 2
    cluster.pods.set_ready("web-2", None)
    cluster.settle()
    assert status(cluster)["readyReplicas"] == 3
    undo = cluster.pods.rule(labels=LABELS, scheduled_s=None)
    cluster.api.patch("StatefulSet", "default", "web", {"spec": {"replicas": 4}})
    cluster.advance(60)
    assert pods(cluster, "phase")["web-3"] == "Pending"
    undo()
    cluster.advance(5)
    assert pods(cluster, "phase")["web-3"] == "Running"
    cluster.pods.rule(name="web-0", crash_s=10)
    cluster.advance(35)
    count = cluster.api.get("Pod", "default", "web-0")["status"]["containerStatuses"][0]["restartCount"]
    assert count >= 3


def test_a_pod_waits_for_its_config_map_and_its_readiness_gate(cluster: Cluster) -> None:
    volume = {"name": "v", "configMap": {"name": "settings"}}
    spec = {"volumes": [volume], "readinessGates": [{"conditionType": "x.io/in"}]}
    body = {**pod(), "spec": {**pod()["spec"], **spec}}
    cluster.create(body)
    cluster.settle()
    assert pods(cluster, "phase") == {"one": "Pending"}
    cluster.create(config_map())
    cluster.settle()
    assert pods(cluster, "phase") == {"one": "Running"} and pods(cluster, "ready") == {"one": False}
    live = cluster.api.get("Pod", "default", "one")
    live["status"]["conditions"].append({"type": "x.io/in", "status": "True"})
    cluster.api.update("Pod", "default", "one", live, subresource="status")
    cluster.settle()
    assert pods(cluster, "ready") == {"one": True}


def test_a_pod_ends_within_its_grace_period(cluster: Cluster) -> None:
    cluster.pods.behaviour = Behaviour(ended_s=None)
    cluster.create(pod())
    cluster.settle()
    cluster.api.delete("Pod", "default", "one")
    cluster.advance(29)
    assert "deletionTimestamp" in cluster.api.get("Pod", "default", "one")["metadata"]
    cluster.advance(1)
    assert pods(cluster) == {}


def test_a_gang_waits_for_its_minimum(cluster: Cluster) -> None:
    label = {"pod-group.scheduling.sigs.k8s.io/name": "gang"}
    for i in range(2):
        cluster.create(pod(f"p{i}", labels=label))
    cluster.settle()
    assert set(pods(cluster, "phase").values()) == {"Pending"}  # there is no PodGroup yet
    group = {"apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup", "metadata": {"name": "gang"}}
    cluster.create({**group, "spec": {"minMember": 3}})
    cluster.settle()
    assert set(pods(cluster, "phase").values()) == {"Pending"}
    cluster.create(pod("p2", labels=label))
    cluster.settle()
    assert pods(cluster, "phase") == {"p0": "Running", "p1": "Running", "p2": "Running"}


def test_volcano_knows_its_gang_by_annotation(cluster: Cluster) -> None:
    cluster.create(pod("p0", annotations={"scheduling.k8s.io/group-name": "gang"}))
    group = {"apiVersion": "scheduling.volcano.sh/v1beta1", "kind": "PodGroup", "metadata": {"name": "gang"}}
    cluster.create({**group, "spec": {"minMember": 2}})
    cluster.settle()
    assert pods(cluster, "phase") == {"p0": "Pending"}
    cluster.api.patch("scheduling.volcano.sh/v1beta1/PodGroup", "default", "gang", {"spec": {"minMember": 1}})
    cluster.settle()
    assert pods(cluster, "phase") == {"p0": "Running"}


def test_names_resolve_as_in_a_cluster(cluster: Cluster) -> None:
    cluster.create(stateful_set(replicas=2), service(), service("all", publishNotReadyAddresses=True))
    cluster.create(service("front", clusterIP="10.1.2.3", ports=[{"port": 80}]))
    assert cluster.resolve("web") == []
    cluster.settle()
    assert cluster.resolve("web") == cluster.resolve("web.default.svc.cluster.local") == ["web-0", "web-1"]
    assert cluster.resolve("web-1.web") == cluster.resolve("web-1.web.default.svc") == ["web-1"]
    assert cluster.resolve("web-1.front") == cluster.resolve("web-2.web") == cluster.resolve("1.web") == []
    assert (
        cluster.resolve("web.default", "kube-system") == ["web-0", "web-1"]
        and cluster.resolve("web", "kube-system") == []
    )
    cluster.pods.set_ready("web-0", False)
    cluster.settle()
    assert cluster.resolve("web") == cluster.resolve("front") == ["web-1"]
    assert cluster.resolve("all") == ["web-0", "web-1"]
    assert cluster.resolve("web-0.web") == []
    assert cluster.select("front") == ["web-0", "web-1"]


def test_variables_refer_to_those_before_them(cluster: Cluster) -> None:
    env = [
        {"name": "LATE", "value": "$(INDEX)"},
        {"name": "INDEX", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}},
        {"name": "NAME", "value": "web-$(INDEX).$$(X)"},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    obj = stateful_set()
    obj["spec"]["template"]["spec"]["containers"][0] |= {
        "env": env,
        "command": ["sh", "-c"],
        "args": ["run $(NAME) $(NO)"],
    }
    cluster.create(obj)
    cluster.settle()
    known = cluster.environment("web-1")
    assert (known["LATE"], known["INDEX"], known["NAME"]) == ("$(INDEX)", "1", "web-1.$(X)")
    assert known["IP"] == cluster.api.get("Pod", "default", "web-1")["status"]["podIP"]
    assert cluster.command_line("web-2") == ["sh", "-c", "run web-2.$(X) $(NO)"]


@pytest.mark.parametrize(("surge", "unavailable"), [(1, 0), (0, 1), (2, 1), ("50%", "25%"), (0, 4)])
def test_a_deployment_rolls_within_its_limits(cluster: Cluster, surge: Any, unavailable: Any) -> None:
    cluster.pods.behaviour = Behaviour(ready_s=1, ended_s=1)
    strategy = {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}
    cluster.create(deployment(replicas=4, strategy=strategy))
    cluster.advance(1)
    assert status(cluster, "Deployment")["readyReplicas"] == 4
    most = 4 + {"50%": 2}.get(surge, surge)
    least = 4 - {"25%": 1}.get(unavailable, unavailable)
    set_image(cluster, "web:2", "Deployment")
    for _ in range(40):
        cluster.advance(0.25)
        alive = [one for one in cluster.objects("Pod") if "deletionTimestamp" not in one["metadata"]]
        assert len(alive) <= most
        assert status(cluster, "Deployment").get("readyReplicas", 0) >= least
    assert set(pods(cluster, "image").values()) == {"web:2"} and len(pods(cluster)) == 4
    found = status(cluster, "Deployment")
    assert found["updatedReplicas"] == found["readyReplicas"] == found["replicas"] == 4
    assert {one["type"]: one["status"] for one in found["conditions"]} == {"Available": "True", "Progressing": "True"}
    assert cluster.api.get("Deployment", "default", "web")["metadata"]["annotations"] == {
        "deployment.kubernetes.io/revision": "2"
    }


def test_a_deployment_recreates_scales_and_pauses(cluster: Cluster) -> None:
    cluster.create(deployment(strategy={"type": "Recreate"}))
    cluster.settle()
    before = set(pods(cluster))
    cluster.api.patch("Deployment", "default", "web", {"spec": {"paused": True}})
    set_image(cluster, "web:2", "Deployment")
    cluster.settle()
    assert set(pods(cluster)) == before
    cluster.api.patch("Deployment", "default", "web", {"spec": {"paused": False, "replicas": 2}})
    cluster.settle()
    assert list(pods(cluster, "image").values()) == ["web:2"] * 2 and not before & set(pods(cluster))


def lws(**spec: Any) -> Obj:
    worker = {"workerTemplate": template(), "size": 3, **spec.pop("group", {})}
    body = {"replicas": 2, "leaderWorkerTemplate": worker, **spec}
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": "big"},
        "spec": body,
    }


def test_a_leader_worker_set_makes_groups(cluster: Cluster) -> None:
    cluster.create(lws())
    cluster.settle()
    assert sorted(pods(cluster)) == ["big-0", "big-0-1", "big-0-2", "big-1", "big-1-1", "big-1-2"]
    found = status(cluster, "LeaderWorkerSet", "big")
    assert (found["replicas"], found["readyReplicas"], found["updatedReplicas"]) == (2, 2, 2)
    assert {one["type"]: one["status"] for one in found["conditions"]}["Available"] == "True"
    worker, leader = cluster.environment("big-1-2"), cluster.environment("big-1")
    assert worker["LWS_LEADER_ADDRESS"] == leader["LWS_LEADER_ADDRESS"] == "big-1.big.default"
    assert (worker["LWS_WORKER_INDEX"], leader["LWS_WORKER_INDEX"], worker["LWS_GROUP_SIZE"]) == ("2", "0", "3")
    assert cluster.resolve("big-1.big.default") == ["big-1"] and cluster.resolve("big-1-2.big") == ["big-1-2"]
    cluster.api.patch("LeaderWorkerSet", "default", "big", {"spec": {"replicas": 1}})
    cluster.settle()
    assert sorted(pods(cluster)) == ["big-0", "big-0-1", "big-0-2"]


@pytest.mark.parametrize(("policy", "renewed"), [("RecreateGroupOnPodRestart", 3), ("None", 0)])
def test_a_restart_in_a_group_recreates_it_or_not(cluster: Cluster, policy: str, renewed: int) -> None:
    cluster.create(lws(group={"restartPolicy": policy}))
    cluster.settle()
    before = pods(cluster)
    cluster.pods.crash("big-0-1")
    cluster.advance(5)
    after = pods(cluster)
    assert after.keys() == before.keys()
    assert sum(before[name] != after[name] for name in before) == renewed
    assert all(before[name] == after[name] for name in before if name.startswith("big-1"))


def test_an_update_of_a_leader_worker_set_replaces_whole_groups(cluster: Cluster) -> None:
    cluster.create(lws(rolloutStrategy={"rollingUpdateConfiguration": {"partition": 1}}))
    cluster.settle()
    patch = {"spec": {"leaderWorkerTemplate": {"workerTemplate": template("web:2")}}}
    cluster.api.patch("LeaderWorkerSet", "default", "big", patch)
    cluster.settle()
    images = pods(cluster, "image")
    assert {images[name] for name in images if name.startswith("big-1")} == {"web:2"}
    assert {images[name] for name in images if name.startswith("big-0")} == {"web:1"}


def test_a_budget_refuses_evictions(cluster: Cluster) -> None:
    cluster.create(stateful_set())
    body = {"spec": {"maxUnavailable": 1, "selector": {"matchLabels": LABELS}}, "metadata": {"name": "b"}}
    cluster.create({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", **body})
    cluster.pods.behaviour = Behaviour(ready_s=10)
    cluster.advance(10)
    assert status(cluster, "PodDisruptionBudget", "b")["disruptionsAllowed"] == 1
    evict(cluster.api, "default", "web-0", Deleting())
    cluster.settle()
    with pytest.raises(ApiError) as caught:
        evict(cluster.api, "default", "web-1", Deleting())
    assert caught.value.code == 429
    cluster.advance(10)
    evict(cluster.api, "default", "web-1", Deleting())


def test_a_settled_cluster_writes_nothing(cluster: Cluster) -> None:
    cluster.create(stateful_set(), deployment("dep"), lws(), service())
    cluster.settle()
    revision = cluster.store.revision
    cluster.advance(3600)
    assert cluster.store.revision == revision


def test_what_the_controllers_write_is_valid(cluster: Cluster) -> None:
    """By the published schemas, strictly: no field that Kubernetes does not know."""
    cluster.create(stateful_set(), deployment("dep"), service(), config_map())
    budget = {"metadata": {"name": "b"}, "spec": {"maxUnavailable": 1, "selector": {"matchLabels": LABELS}}}
    cluster.create({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", **budget})
    cluster.settle()
    cluster.pods.crash("web-0")
    cluster.pods.fail("web-1")
    checked = 0
    for kind in (
        "StatefulSet",
        "Deployment",
        "ReplicaSet",
        "Pod",
        "Service",
        "ControllerRevision",
        "PodDisruptionBudget",
    ):
        for obj in cluster.objects(kind):
            kubernetes_validate.validate(obj, "1.36", strict=True)
            checked += 1
    assert checked == 12


def test_an_ordered_set_with_an_unready_pod_updates_nothing(cluster: Cluster) -> None:
    """The known trap of OrderedReady, which Parallel avoids."""
    cluster.create(stateful_set(podManagementPolicy="OrderedReady"))
    cluster.settle()
    cluster.pods.set_ready("web-0", False)
    cluster.settle()
    set_image(cluster, "web:2")
    cluster.advance(60)
    assert set(pods(cluster, "image").values()) == {"web:1"}
    cluster.pods.set_ready("web-0", None)
    cluster.advance(1)
    assert set(pods(cluster, "image").values()) == {"web:2"}
