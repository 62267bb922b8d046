"""The kinds of manifests that RoleBasedGroup's examples show: each comes up, is updated, and goes without a trace."""

from __future__ import annotations

from typing import Any

import pytest
from driver import Driver, image_of, set_image
from kube_world import group, role

from diptych.group.operator.resources import PROFILE, Json
from diptych.group.validate import object_problems

PREFIX = "rolebasedgroup.workloads.x-k8s.io"
DEPLOYMENT: Json = {"workload": {"apiVersion": "apps/v1", "kind": "Deployment"}}
LWS: Json = {"workload": {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet"}}
TWO = {"rolloutStrategy": {"rollingUpdate": {"maxUnavailable": 2, "maxSurge": 2}}}
TOPOLOGY = {f"{PREFIX}/exclusive-topology": "kubernetes.io/hostname"}


def in_step(**strategy: Any) -> Json:
    return {"coordination": [{"name": "pd", "roles": ["prefill", "decode"], "strategy": strategy}]}


def pair(prefill: int, decode: int, **spec: Any) -> Json:
    return group("g", role("prefill", prefill), role("decode", decode), **spec)


def three_kinds(replicas: int = 2, **more: Any) -> list[Json]:
    return [
        role("sts", replicas, **more),
        role("dep", replicas, **DEPLOYMENT, **more),
        role("lws", replicas, leaderWorkerSet={"size": 2}, **LWS, **more),
    ]


def labelled(part: str) -> Json:
    return {"metadata": {"labels": {"part": part}}}


EXAMPLES: dict[str, Json] = {
    "two kinds, one needs the other": group("g", role("a", 2), role("b", 2, dependencies=["a"], **DEPLOYMENT)),
    "leaders and workers patched": group(
        "g",
        role(
            "a",
            2,
            leaderWorkerSet={
                "size": 3,
                "patchLeaderTemplate": labelled("leader"),
                "patchWorkerTemplate": labelled("worker"),
            },
            **LWS,
        ),
    ),
    "rolling update of three kinds": group("g", *three_kinds(4, **TWO)),
    "restart policies": group("g", role("a", 2, restartPolicy="RecreateRBGOnPodRestart"), role("b", 2)),
    "coordinated update": pair(7, 3, **in_step(rollingUpdate={"maxSkew": "1%", "maxUnavailable": "10%"})),
    "coordinated scaling": pair(5, 2, **in_step(scaling={"maxSkew": "10%"})),
    "faster coordinated scaling": pair(5, 2, **in_step(scaling={"maxSkew": "20%", "progression": "OrderScheduled"})),
    "scaling in order of readiness": pair(5, 2, **in_step(scaling={"maxSkew": "5%", "progression": "OrderReady"})),
    "exclusive topology": group("g", *three_kinds(), annotations=TOPOLOGY),
    "gang of scheduler-plugins": group("g", *three_kinds(), podGroupPolicy={"kubeScheduling": {}}),
    "gang of Volcano": group("g", *three_kinds(), podGroupPolicy={"volcanoScheduling": {"queue": "default"}}),
    "prefill and decode with sidecars and adapters": group(
        "g",
        role("router", dependencies=["prefill", "decode"]),
        *(
            role(name, 2, engineRuntimes=[{"profileName": "p"}], scalingAdapter={"enable": True})
            for name in ("prefill", "decode")
        ),
    ),
    "one node of an engine": group("g", role("engine")),
    "several nodes of an engine": group("g", role("engine", leaderWorkerSet={"size": 2}, **LWS)),
}


def pod_count(manifest: Json) -> int:
    roles = manifest["spec"]["roles"]
    return sum(each["replicas"] * (each.get("leaderWorkerSet") or {}).get("size", 1) for each in roles)


@pytest.mark.parametrize("manifest", EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_comes_up_is_updated_and_goes(driver: Driver, manifest: Json) -> None:
    assert object_problems(manifest) == []
    sidecar = {"containers": [{"name": "patio-runtime", "image": "patio:1"}]}
    driver.create({"apiVersion": PROFILE.api_version, "kind": PROFILE.kind, "metadata": {"name": "p"}, "spec": sidecar})
    driver.create(manifest)
    driver.run(30)
    assert driver.ready("g") and len(driver.pods()) == pod_count(manifest)
    driver.edit("g", set_image("engine:2"))
    driver.run(120, tick_s=2.0)
    assert driver.ready("g")
    assert [image_of(pod) for pod in driver.pods().values()] == ["engine:2"] * pod_count(manifest)
    driver.delete("RoleBasedGroup", "g")
    driver.run(20)
    for kind in ("RoleBasedGroup", "StatefulSet", "Deployment", "LeaderWorkerSet", "Pod", "Service", "ConfigMap"):
        assert driver.names(kind) == []
    assert driver.names("RoleBasedGroupScalingAdapter") == driver.names("ControllerRevision") == []
    assert driver.names("scheduling.x-k8s.io/v1alpha1/PodGroup") == []
    assert driver.names("scheduling.volcano.sh/v1beta1/PodGroup") == []
