"""What is applied for a group: names, labels, environment, mounts, owners; checked by the schemas of Kubernetes."""

from __future__ import annotations

import copy
from typing import Any

import kubernetes_validate
import pytest
import yaml

from diptych.group.actions import Target
from diptych.group.operator import objects
from diptych.group.operator.discovery import config_yaml
from diptych.group.operator.resources import (
    CONFIG_MAP,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    SERVICE,
    STATEFUL_SET,
    Json,
    Kind,
)
from diptych.group.operator.template import pod_template

KEY = "rolebasedgroup.workloads.x-k8s.io/group-unique-key"
TEMPLATE: Json = {
    "metadata": {"labels": {"app": "engine"}},
    "spec": {
        "initContainers": [{"name": "wait", "image": "wait:1"}],
        "containers": [
            {
                "name": "engine",
                "image": "engine:1",
                "env": [
                    {"name": "ADDRESS", "value": "$(ROLE_NAME)-$(ROLE_INDEX)"},
                    {"name": "GROUP_NAME", "value": "x"},
                ],
                "volumeMounts": [{"name": "model", "mountPath": "/model"}],
            }
        ],
        "volumes": [{"name": "model", "emptyDir": {}}],
    },
}


def group(**spec: Any) -> Json:
    metadata = {"name": "pd", "namespace": "serving", "uid": "u-1", "annotations": {}}
    return {"apiVersion": "workloads.x-k8s.io/v1alpha1", "kind": "RoleBasedGroup", "metadata": metadata, "spec": spec}


def role(**more: Any) -> Json:
    return {"name": "prefill", "template": TEMPLATE, "replicas": 2, **more}


def made(of: Json, profiles: dict[str, Json] | None = None, owner: Json | None = None, **more: Any) -> Json:
    before = copy.deepcopy(of)
    template = pod_template(owner or group(), of, of["template"], profiles or {}, indexed=True, **more)
    assert of == before
    return template


def valid(kind: Kind, obj: Json) -> None:
    kubernetes_validate.validate({"apiVersion": kind.api_version, "kind": kind.kind, **obj}, "1.33", strict=True)


def test_the_groups_variables_come_first_so_that_others_can_refer_to_them() -> None:
    spec = made(role())["spec"]
    for container in (spec["initContainers"][0], spec["containers"][0]):
        assert [each["name"] for each in container["env"][:3]] == ["GROUP_NAME", "ROLE_NAME", "ROLE_INDEX"]
        assert [each.get("value") for each in container["env"][:2]] == ["pd", "prefill"]
    assert [each["name"] for each in spec["containers"][0]["env"]] == [
        "GROUP_NAME",
        "ROLE_NAME",
        "ROLE_INDEX",
        "ADDRESS",
    ]


def test_a_variable_that_is_given_twice_is_applied_once() -> None:
    twice = copy.deepcopy(TEMPLATE)
    engine = twice["spec"]["containers"][0]
    engine["env"] = [{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)"}, {"name": "A", "value": "2"}]
    sidecar = {"name": "patio-runtime", "image": "s:1", "env": [{"name": "ONE", "value": "1"}]}
    runtime = {
        "profileName": "p",
        "containers": [{"name": "patio-runtime", "env": [{"name": "ONE", "value": "mine"}]}],
    }
    of = {**role(engineRuntimes=[runtime]), "template": twice}
    first, second = made(of, {"p": {"containers": [sidecar]}})["spec"]["containers"]
    assert first["env"][3:] == [{"name": "A", "value": "2"}, {"name": "B", "value": "$(A)"}]
    assert second["env"][3:] == [{"name": "ONE", "value": "mine"}]


def test_what_a_manifest_mounts_at_our_place_stays() -> None:
    own = copy.deepcopy(TEMPLATE)
    volume = {"name": "rbg-cluster-config", "configMap": {"name": "mine"}}
    mount = {"name": "rbg-cluster-config", "mountPath": "/etc/rbg"}
    own["spec"]["containers"][0]["volumeMounts"] = [mount]
    own["spec"]["volumes"] = [volume]
    spec = made({**role(), "template": own})["spec"]
    assert spec["containers"][0]["volumeMounts"] == [mount] and spec["volumes"] == [volume]


def test_labels_select_and_the_users_own_stay() -> None:
    labels = made(role())["metadata"]["labels"]
    assert labels["app"] == "engine"
    assert labels["rolebasedgroup.workloads.x-k8s.io/name"] == "pd"
    assert labels["rolebasedgroup.workloads.x-k8s.io/role"] == "prefill"
    assert len(labels[KEY]) == 40


def test_the_discovery_file_is_mounted_in_every_container() -> None:
    spec = made(role())["spec"]
    mounts = spec["containers"][0]["volumeMounts"]
    assert {"name": "rbg-cluster-config", "mountPath": "/etc/rbg", "readOnly": True} in mounts
    assert {"name": "rbg-cluster-config", "configMap": {"name": "pd"}} in spec["volumes"]


def test_sidecars_of_a_profile_with_the_roles_additions() -> None:
    sidecar = {"name": "patio-runtime", "image": "s:1", "args": ["--a"], "env": [{"name": "ONE", "value": "1"}]}
    profile = {
        "containers": [sidecar],
        "volumes": [{"name": "model", "emptyDir": {}}, {"name": "more", "emptyDir": {}}],
    }
    runtime = {"profileName": "p", "containers": [{"name": "patio-runtime", "args": ["--b"]}]}
    spec = made(role(engineRuntimes=[runtime]), {"p": profile})["spec"]
    assert [each["name"] for each in spec["containers"]] == ["engine", "patio-runtime"]
    assert spec["containers"][1]["args"] == ["--a", "--b"]
    assert [each["name"] for each in spec["volumes"]] == ["model", "rbg-cluster-config", "more"]
    assert sidecar["args"] == ["--a"]


def test_exclusive_topology_attracts_the_group_and_repels_others() -> None:
    owner = group()
    owner["metadata"]["annotations"]["rolebasedgroup.workloads.x-k8s.io/exclusive-topology"] = "kubernetes.io/hostname"
    template = made(role(), owner=owner)
    affinity = template["spec"]["affinity"]
    key = template["metadata"]["labels"][KEY]
    near = affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    far = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert [each["topologyKey"] for each in (*near, *far)] == ["kubernetes.io/hostname"] * 2
    assert near[0]["labelSelector"]["matchExpressions"] == [{"key": KEY, "operator": "In", "values": [key]}]
    assert far[0]["labelSelector"]["matchExpressions"][1] == {"key": KEY, "operator": "NotIn", "values": [key]}


def test_a_pod_that_opts_out_of_exclusive_topology() -> None:
    owner = group()
    owner["metadata"]["annotations"]["rolebasedgroup.workloads.x-k8s.io/exclusive-topology"] = "kubernetes.io/hostname"
    template = copy.deepcopy(TEMPLATE)
    template["metadata"]["annotations"] = {"rolebasedgroup.workloads.x-k8s.io/disable-exclusive-topology": "true"}
    assert "affinity" not in made(role(template=template), owner=owner)["spec"]


def test_gang_marks() -> None:
    assert made(role(), gang="scheduler-plugins")["metadata"]["labels"]["pod-group.scheduling.sigs.k8s.io/name"] == "pd"
    assert made(role(), gang="volcano")["metadata"]["annotations"]["scheduling.k8s.io/group-name"] == "pd"


def test_a_pod_drains_before_it_ends() -> None:
    spec = made(role(drain={"path": "/drain", "port": 8000, "timeoutSeconds": 120}))["spec"]
    hook = spec["containers"][0]["lifecycle"]["preStop"]["httpGet"]
    assert hook == {"path": "/drain", "port": 8000}
    assert spec["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize("on_delete", [False, True])
def test_objects_pass_the_schemas_of_kubernetes(on_delete: bool) -> None:
    of = role(podDisruptionBudget={"maxUnavailable": 1}, minReadySeconds=5, labels={"team": "a"})
    template = made(of)
    stateful = objects.stateful_set(group(), of, template, Target(2, 1, "r", on_delete=on_delete))
    valid(STATEFUL_SET, stateful)
    assert stateful["metadata"]["name"] == "pd-prefill"
    assert stateful["spec"]["serviceName"] == "pd-prefill"
    assert stateful["spec"]["podManagementPolicy"] == "Parallel"
    assert stateful["metadata"]["labels"]["team"] == "a"
    selector = stateful["spec"]["selector"]["matchLabels"]
    assert selector.items() <= template["metadata"]["labels"].items()
    valid(DEPLOYMENT, objects.deployment(group(), of, template, Target(2, 0, "r")))
    service = objects.headless_service(group(), of)
    valid(SERVICE, service)
    assert service["metadata"]["name"] == "pd-prefill"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    valid(CONFIG_MAP, objects.config_map(group(), "pd", "x"))
    budget = objects.disruption_budget(group(), of)
    assert budget is not None
    valid(DISRUPTION_BUDGET, budget)
    for each in (stateful, service, budget):
        assert each["metadata"]["ownerReferences"][0]["uid"] == "u-1"


def test_the_discovery_file_names_addresses_that_resolve() -> None:
    roles = [
        role(servicePorts=[{"name": "http-api", "port": 8000}, {"port": 9000}]),
        {"name": "front", "workload": {"kind": "Deployment"}},
    ]
    assert yaml.safe_load(config_yaml("pd", roles, {"prefill": 2, "front": 3}, {})) == {
        "group": {"name": "pd", "size": 2, "roles": ["prefill", "front"]},
        "roles": {
            "prefill": {
                "size": 2,
                "instances": [
                    {"address": f"pd-prefill-{i}.pd-prefill", "ports": {"http_api": 8000, "port9000": 9000}}
                    for i in (0, 1)
                ],
            },
            "front": {"size": 3, "instances": []},
        },
    }
