"""Strategic merge patches of pod templates: the cases of Kubernetes' documentation, and role templates with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from diptych.errors import ConfigError
from diptych.group.merge import merge_pod_template
from diptych.group.resolve import leader_worker_templates, resolve_role, resolve_spec, role_replicas


def pod(**spec: Any) -> dict[str, Any]:
    return {"spec": spec}


def container(**fields: Any) -> dict[str, Any]:
    return pod(containers=[{"name": "c", **fields}])


HARD = {"topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "maxSkew": 1}
SOFT = {**HARD, "whenUnsatisfiable": "ScheduleAnyway"}


@pytest.mark.parametrize(
    ("original", "patch", "expected"),
    [
        pytest.param(
            pod(containers=[{"name": "demo", "image": "nginx"}]),
            pod(containers=[{"name": "redis", "image": "redis"}]),
            pod(containers=[{"name": "redis", "image": "redis"}, {"name": "demo", "image": "nginx"}]),
            id="a container is added before those that are there",
        ),
        pytest.param(
            pod(containers=[{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]),
            pod(containers=[{"name": "b", "image": "2"}]),
            pod(containers=[{"name": "a", "image": "1"}, {"name": "b", "image": "2"}]),
            id="a container of that name is merged",
        ),
        pytest.param(
            pod(tolerations=[{"key": "dedicated", "value": "a"}]),
            pod(tolerations=[{"key": "disktype", "value": "ssd"}]),
            pod(tolerations=[{"key": "disktype", "value": "ssd"}]),
            id="tolerations are replaced: they have no merge key",
        ),
        pytest.param(
            container(command=["a", "b"], args=["x"]),
            container(command=["c"]),
            container(command=["c"], args=["x"]),
            id="lists of plain values are replaced",
        ),
        pytest.param(
            container(env=[{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]),
            container(env=[{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]),
            container(env=[{"name": "A", "value": "1"}, {"name": "B", "value": "3"}, {"name": "C", "value": "4"}]),
            id="env merges by name, in its order",
        ),
        pytest.param(
            container(env=[{"name": "A", "value": "1"}]),
            container(env=[{"name": "A", "value": None, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]),
            container(env=[{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]),
            id="null deletes a field of an item",
        ),
        pytest.param(
            container(ports=[{"containerPort": 80, "name": "web"}]),
            container(ports=[{"containerPort": 80, "name": "http"}, {"containerPort": 81}]),
            container(ports=[{"containerPort": 80, "name": "http"}, {"containerPort": 81}]),
            id="ports merge by containerPort",
        ),
        pytest.param(
            container(ports=[{"containerPort": 53}, {"containerPort": 80}]),
            container(ports=[{"containerPort": 53, "protocol": "UDP"}]),
            container(ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 80}]),
            id="a port's protocol is changed",
        ),
        pytest.param(
            container(image="a"),
            container(ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "name": "t"}]),
            container(
                image="a",
                ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "name": "t"}],
            ),
            id="two ports of one number are added",
        ),
        pytest.param(
            container(ports=[{"containerPort": 53}]),
            container(ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "protocol": "TCP"}]),
            container(ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "protocol": "TCP"}]),
            id="one is added beside the one that is there",
        ),
        pytest.param(
            container(ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "protocol": "TCP"}]),
            container(ports=[{"containerPort": 80}]),
            container(
                ports=[
                    {"containerPort": 80},
                    {"containerPort": 53, "protocol": "UDP"},
                    {"containerPort": 53, "protocol": "TCP"},
                ]
            ),
            id="two ports of one number stay",
        ),
        pytest.param(
            container(ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53, "protocol": "TCP"}]),
            container(ports=[{"containerPort": 53, "name": "t"}]),
            container(
                ports=[
                    {"containerPort": 53, "protocol": "UDP"},
                    {"containerPort": 53, "protocol": "TCP", "name": "t"},
                ]
            ),
            id="without a protocol TCP is meant",
        ),
        pytest.param(
            container(ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}, {"containerPort": 80}]),
            container(ports=[{"containerPort": 53, "protocol": "UDP", "$patch": "delete"}]),
            container(ports=[{"containerPort": 53}, {"containerPort": 80}]),
            id="one of two ports of one number goes",
        ),
        pytest.param(
            container(ports=[{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}, {"containerPort": 80}]),
            container(ports=[{"containerPort": 53, "$patch": "delete"}]),
            container(ports=[{"containerPort": 80}]),
            id="both ports of one number go",
        ),
        pytest.param(
            pod(topologySpreadConstraints=[SOFT, HARD]),
            pod(topologySpreadConstraints=[{**HARD, "maxSkew": 3}]),
            pod(topologySpreadConstraints=[SOFT, {**HARD, "maxSkew": 3}]),
            id="one of two spread constraints of one topology is changed",
        ),
        pytest.param(
            pod(topologySpreadConstraints=[HARD]),
            pod(topologySpreadConstraints=[{"topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}]),
            pod(topologySpreadConstraints=[SOFT]),
            id="a spread constraint is made softer",
        ),
        pytest.param(
            pod(topologySpreadConstraints=[SOFT, HARD]),
            pod(topologySpreadConstraints=[{"topologyKey": "zone", "maxSkew": 3}]),
            pod(topologySpreadConstraints=[{**SOFT, "maxSkew": 3}, HARD]),
            id="without more than the topology the first is meant",
        ),
        pytest.param(
            pod(imagePullSecrets=[{"name": "a"}, {"name": "a"}], hostAliases=[{"ip": "1", "hostnames": ["a"]}] * 2),
            pod(imagePullSecrets=[{"name": "b"}], hostAliases=[{"ip": "1", "hostnames": ["b"]}]),
            pod(
                imagePullSecrets=[{"name": "b"}, {"name": "a"}, {"name": "a"}],
                hostAliases=[{"ip": "1", "hostnames": ["b"]}, {"ip": "1", "hostnames": ["a"]}],
            ),
            id="what is there twice stays twice, and the first is changed",
        ),
        pytest.param(
            container(env=[{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]),
            container(env=[{"name": "A", "$patch": "delete"}, {"name": "A", "valueFrom": {}}]),
            container(env=[{"name": "A", "valueFrom": {}}, {"name": "B", "value": "2"}]),
            id="one goes and comes again",
        ),
        pytest.param(
            container(volumeMounts=[{"name": "a", "mountPath": "/m"}]),
            container(volumeMounts=[{"name": "b", "mountPath": "/m"}, {"name": "a", "mountPath": "/n"}]),
            container(volumeMounts=[{"name": "b", "mountPath": "/m"}, {"name": "a", "mountPath": "/n"}]),
            id="volumeMounts merge by mountPath",
        ),
        pytest.param(
            container(resources={"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1"}}),
            container(resources={"limits": {"cpu": "2"}, "requests": None}),
            container(resources={"limits": {"cpu": "2", "memory": "1Gi"}}),
            id="objects merge, null deletes",
        ),
        pytest.param(
            pod(containers=[{"name": "a"}, {"name": "b"}]),
            pod(containers=[{"name": "a", "$patch": "delete"}]),
            pod(containers=[{"name": "b"}]),
            id="$patch delete takes an item away",
        ),
        pytest.param(
            pod(containers=[{"name": "a"}, {"name": "b"}]),
            pod(containers=[{"$patch": "replace"}, {"name": "c"}]),
            pod(containers=[{"name": "c"}]),
            id="$patch replace as an item of its own replaces the list",
        ),
        pytest.param(
            pod(containers=[{"name": "a", "image": "1", "tty": True}]),
            pod(containers=[{"name": "a", "image": "2", "$patch": "replace"}, {"name": "b"}]),
            pod(containers=[{"name": "b"}]),
            id="$patch replace in an item replaces the list, and the item is none",
        ),
        pytest.param(
            pod(nodeSelector={"disk": "ssd", "zone": "a"}),
            pod(nodeSelector={"$patch": "replace", "gpu": "h100"}),
            pod(nodeSelector={"gpu": "h100"}),
            id="$patch replace replaces an object",
        ),
        pytest.param(
            pod(nodeSelector={"disk": "ssd"}, hostNetwork=True),
            pod(nodeSelector={"$patch": "delete"}),
            pod(nodeSelector={}, hostNetwork=True),
            id="$patch delete empties an object",
        ),
        pytest.param(
            pod(volumes=[{"name": "v", "hostPath": {"path": "/x"}}]),
            pod(volumes=[{"name": "v", "$retainKeys": ["name", "emptyDir"], "emptyDir": {}}]),
            pod(volumes=[{"name": "v", "emptyDir": {}}]),
            id="$retainKeys keeps only the fields it lists",
        ),
        pytest.param(
            pod(containers=[{"name": "a"}, {"name": "b"}, {"name": "c"}]),
            pod(containers=[{"name": "d"}, {"name": "c", "image": "2"}, {"name": "a", "image": "2"}]),
            pod(containers=[{"name": "d"}, {"name": "b"}, {"name": "c", "image": "2"}, {"name": "a", "image": "2"}]),
            id="items of the patch keep the patch's order",
        ),
        pytest.param(
            {"metadata": {"labels": {"a": "1"}}},
            {"metadata": {"labels": {"b": "2"}, "annotations": {"c": None, "d": "3"}}},
            {"metadata": {"labels": {"a": "1", "b": "2"}, "annotations": {"d": "3"}}},
            id="a null in what is added deletes nothing",
        ),
        pytest.param(
            pod(hostAliases=[{"ip": "1", "hostnames": ["a"]}]),
            {},
            pod(hostAliases=[{"ip": "1", "hostnames": ["a"]}]),
            id="an empty patch",
        ),
        pytest.param(
            pod(initContainers=[{"name": "i", "env": [{"name": "A", "value": "1"}]}]),
            pod(
                initContainers=[{"name": "i", "env": [{"name": "A", "$patch": "delete"}, {"name": "B", "value": "2"}]}]
            ),
            pod(initContainers=[{"name": "i", "env": [{"name": "B", "value": "2"}]}]),
            id="lists in init containers merge too",
        ),
    ],
)
def test_merge(original: dict[str, Any], patch: dict[str, Any], expected: dict[str, Any]) -> None:
    before = copy.deepcopy((original, patch))
    assert merge_pod_template(original, patch) == expected
    assert (original, patch) == before


def test_the_result_shares_nothing_with_its_parts() -> None:
    original, patch = container(env=[{"name": "A", "value": "1"}]), pod(tolerations=[{"key": "a"}])
    merged = merge_pod_template(original, patch)
    merged["spec"]["containers"][0]["env"][0]["value"] = "2"
    merged["spec"]["tolerations"][0]["key"] = "b"
    assert original == container(env=[{"name": "A", "value": "1"}]) and patch == pod(tolerations=[{"key": "a"}])


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (pod(containers=[{"image": "x"}]), r"^spec.containers\[0\]: needs name, by which the items of containers"),
        (pod(containers=["c"]), r"^spec.containers\[0\]: needs name"),
        (pod(containers=[{"name": {}}]), r"^spec.containers\[0\]: needs name"),
        (container(env=[{"value": "x"}]), r"^spec.containers\[0\].env\[0\]: needs name"),
        (pod(nodeSelector={"$patch": "drop"}), r"^spec.nodeSelector.\$patch: must be merge, replace or delete"),
        ({"$setElementOrder/x": []}, r"^\$setElementOrder/x: this directive is not supported"),
        (pod(nodeSelector={"$retainKeys": ["a"], "b": "c"}), r"^spec.nodeSelector.\$retainKeys: must list every field"),
    ],
)
def test_mistakes_of_a_patch_name_the_field(patch: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge_pod_template(container(image="a"), patch)


SERVER = container(image="server:1", args=["--port", "8000"])


def test_a_role_takes_its_template_from_the_group() -> None:
    patch = container(env=[{"name": "MODE", "value": "decode"}])
    role = {"name": "decode", "templateRef": {"name": "server"}, "templatePatch": patch, "dependencies": ["a"]}
    assert resolve_role(role, {"server": SERVER}) == {
        "name": "decode",
        "dependencies": ["a"],
        "template": container(image="server:1", args=["--port", "8000"], env=[{"name": "MODE", "value": "decode"}]),
    }


def test_an_unknown_template_and_a_wrong_patch_name_the_role() -> None:
    with pytest.raises(
        ConfigError, match=r"^spec.roles\[2\].templateRef.name: there is no role template x; there is: "
    ):
        resolve_role({"name": "a", "templateRef": {"name": "x"}}, {"server": SERVER}, "spec.roles[2]")
    wrong = {"name": "a", "templateRef": {"name": "server"}, "templatePatch": pod(containers=[{}])}
    with pytest.raises(ConfigError, match=r"^spec.roles\[2\].templatePatch.spec.containers\[0\]: needs name"):
        resolve_role(wrong, {"server": SERVER}, "spec.roles[2]")


def test_leaders_and_workers_get_their_patches() -> None:
    patches = {"size": 2, "patchLeaderTemplate": {"metadata": {"labels": {"part": "leader"}}}}
    leader, worker = leader_worker_templates({"name": "a", "template": SERVER, "leaderWorkerSet": patches})
    assert leader == {**SERVER, "metadata": {"labels": {"part": "leader"}}}
    assert worker == SERVER
    assert leader_worker_templates({"name": "a", "template": SERVER}) == (SERVER, SERVER)


def test_a_resolved_spec_has_neither_references_nor_ratios() -> None:
    spec = {
        "roleTemplates": [{"name": "server", "template": SERVER}],
        "scalingGroups": [{"name": "pd", "replicas": 3, "roles": {"prefill": 2, "decode": 1}}],
        "paused": True,
        "roles": [
            {"name": "prefill", "replicas": 9, "template": SERVER},
            {"name": "decode", "templateRef": {"name": "server"}, "templatePatch": {}},
            {"name": "router", "template": SERVER},
        ],
    }
    before = copy.deepcopy(spec)
    assert resolve_spec(spec) == {
        "paused": True,
        "roles": [
            {"name": "prefill", "replicas": 6, "template": SERVER},
            {"name": "decode", "replicas": 3, "template": SERVER},
            {"name": "router", "replicas": 1, "template": SERVER},
        ],
    }
    assert role_replicas(spec) == {"prefill": 6, "decode": 3, "router": 1}
    assert spec == before


def test_a_group_scaled_to_zero_has_no_pods() -> None:
    spec = {
        "roles": [{"name": "a"}, {"name": "b", "replicas": 0}],
        "scalingGroups": [{"name": "g", "replicas": 0, "roles": {"a": 2}}],
    }
    assert role_replicas(spec) == {"a": 0, "b": 0}
