"""Strategic merge patches: what `templatePatch` makes of a template is what an API server makes of it (see
cluster_place)."""

from __future__ import annotations

from typing import Any

import pytest
from cluster_place import Place
from kubernetes.client import AppsV1Api

from diptych.group.merge import merge_pod_template
from diptych.group.operator.resources import DEPLOYMENT, Json

Part = dict[str, Any]


def container(name: str, **more: Any) -> Part:
    return {"name": name, "image": "i", **more}


def env(*names: str) -> list[Part]:
    return [{"name": name, "value": name} for name in names]


def pod(*containers: Part, **more: Any) -> Json:
    return {"spec": {"containers": list(containers), **more}}


CASES: dict[str, tuple[Json, Json]] = {
    "a new container": (pod(container("a")), pod(container("b"))),
    "the patch's order, and what it does not name": (
        pod(container("a"), container("b"), container("c")),
        pod(container("d"), {"name": "c", "tty": True}, {"name": "a", "tty": True}),
    ),
    "a new one behind one that is there": (pod(container("a"), container("b")), pod({"name": "a"}, container("c"))),
    "environment": (pod(container("a", env=env("A", "B", "C"))), pod({"name": "a", "env": env("X", "C", "Y", "B")})),
    "one of the environment": (pod(container("a", env=env("A", "B"))), pod({"name": "a", "env": env("Z")})),
    "one goes": (
        pod(container("a", env=env("A", "B")), container("b")),
        pod({"name": "a", "env": [{"name": "A", "$patch": "delete"}]}, {"name": "b", "$patch": "delete"}),
    ),
    "the list is replaced": (pod(container("a"), container("b")), pod({"$patch": "replace"}, container("c"))),
    "an item that replaces is none": (
        pod(container("a"), container("b")),
        pod(container("a", **{"$patch": "replace"}), container("c"), {"name": "b", "$patch": "delete"}),
    ),
    "an object is replaced": (
        pod(container("a"), nodeSelector={"disk": "ssd", "zone": "a"}),
        {"spec": {"nodeSelector": {"$patch": "replace", "gpu": "h100"}}},
    ),
    "one goes and comes again": (
        pod(container("a", env=env("A", "B"))),
        pod({"name": "a", "env": [{"name": "A", "$patch": "delete"}, {"name": "A", "value": "new"}]}),
    ),
    "a port gets another protocol": (
        pod(container("a", ports=[{"containerPort": 53, "protocol": "TCP"}, {"containerPort": 80}])),
        pod({"name": "a", "ports": [{"containerPort": 53, "protocol": "UDP"}]}),
    ),
    "ports of one number stay": (
        pod(container("a", ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}])),
        pod({"name": "a", "ports": [{"containerPort": 80}]}),
    ),
    "the first of them is changed": (
        pod(container("a", ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}])),
        pod({"name": "a", "ports": [{"containerPort": 53, "protocol": "UDP", "name": "dns"}]}),
    ),
    "both of them go": (
        pod(container("a", ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}])),
        pod({"name": "a", "ports": [{"containerPort": 53, "$patch": "delete"}, {"containerPort": 80}]}),
    ),
    "ports of one number where there were none": (
        pod(container("a")),
        pod({"name": "a", "ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "name": "t"}]}),
    ),
    "volumes": (
        pod(container("a"), volumes=[{"name": "v", "hostPath": {"path": "/x"}}, {"name": "w", "emptyDir": {}}]),
        {
            "spec": {
                "volumes": [
                    {"name": "u", "emptyDir": {}},
                    {"name": "v", "$retainKeys": ["name", "emptyDir"], "emptyDir": {}},
                ]
            }
        },
    ),
    "lists without a key, and nulls": (
        pod(
            container("a", command=["x"], args=["y"], resources={"limits": {"cpu": "1", "memory": "1Gi"}}),
            tolerations=[{"key": "a", "operator": "Exists"}],
        ),
        {
            "spec": {
                "tolerations": [{"key": "b", "operator": "Exists"}],
                "containers": [{"name": "a", "command": ["z"], "args": None, "resources": {"limits": {"cpu": None}}}],
            }
        },
    ),
}


def deployment(name: str, namespace: str, template: Json) -> Json:
    labels = {"app": name}
    template = {**template, "metadata": {"labels": labels}}
    spec = {"replicas": 0, "selector": {"matchLabels": labels}, "template": template}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def test_ports_of_one_number_that_the_api_server_would_lose_stay(place: Place) -> None:
    """The only case in which `merge` differs: if a server no longer does so, it need not either."""
    where = place.namespace
    both = [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "protocol": "TCP"}]
    template, patch = pod(container("a", ports=[{"containerPort": 80}])), pod({"name": "a", "ports": both})
    place.api.create(DEPLOYMENT, deployment("by-server", where, template))
    with place.core() as core:
        AppsV1Api(core.api_client).patch_namespaced_deployment("by-server", where, {"spec": {"template": patch}})
    (server,) = place.read(DEPLOYMENT, "by-server")["spec"]["template"]["spec"]["containers"]
    assert server["ports"] == [both[1], {"containerPort": 80, "protocol": "TCP"}]
    (merged,) = merge_pod_template(template, patch)["spec"]["containers"]
    assert merged["ports"] == [*both, {"containerPort": 80}]


@pytest.mark.parametrize(("template", "patch"), CASES.values(), ids=CASES)
def test_templates_are_patched_as_the_api_server_patches_them(place: Place, template: Json, patch: Json) -> None:
    where = place.namespace
    place.api.create(DEPLOYMENT, deployment("by-server", where, template))
    place.api.create(DEPLOYMENT, deployment("by-us", where, merge_pod_template(template, patch)))
    with place.core() as core:
        apps = AppsV1Api(core.api_client)
        apps.patch_namespaced_deployment("by-server", where, {"spec": {"template": patch}})
    by_server, by_us = (place.read(DEPLOYMENT, name)["spec"]["template"]["spec"] for name in ("by-server", "by-us"))
    assert by_server == by_us
