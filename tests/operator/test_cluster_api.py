"""What an API server makes of our definitions, on any cluster (see cluster_place): refusals, defaults, pruning, scale.

Every rule of the definitions is broken once. The API server refuses with the text that `diptych validate` has too.
"""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
from cluster_place import Place, role

from diptych.errors import DiptychError
from diptych.group.crds import crds
from diptych.group.operator.api import ApiError
from diptych.group.operator.resources import ADAPTER, GROUP, GROUP_SET, PROFILE, Json, Kind
from diptych.group.validate import object_problems

LWS = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet"}
TEMPLATE = role("a")["template"]
SHARED = {"roleTemplates": [{"name": "t", "template": TEMPLATE}]}


def without_template(**more: Any) -> Json:
    return {"name": "a", **more}


def rolling(**settings: object) -> Json:
    return {"rolloutStrategy": {"rollingUpdate": settings}}


# the spec, the field as the API server names it, the rule's message
RULES: list[tuple[Json, str, str]] = [
    ({"roles": [role("a", dependencies=["x"])]}, "spec", "a role depends on a role that is not there"),
    ({"roles": [without_template()]}, "spec.roles[0]", "needs either template or templateRef"),
    (
        {"roles": [role("a", templateRef={"name": "t"}, templatePatch={})], **SHARED},
        "spec.roles[0]",
        "needs either template or templateRef",
    ),
    (
        {"roles": [without_template(templateRef={"name": "t"})], **SHARED},
        "spec.roles[0]",
        "templatePatch goes with templateRef; write templatePatch: {} to change nothing",
    ),
    (
        {"roles": [without_template(templateRef={"name": "t"}, templatePatch={}, workload=LWS)], **SHARED},
        "spec.roles[0]",
        "templateRef is not possible with the workload LeaderWorkerSet; write the template into the role",
    ),
    (
        {"roles": [role("a", components=[])]},
        "spec.roles[0]",
        "components needs the workload InstanceSet, which is not supported",
    ),
    (
        {"roles": [role("a", workload={"apiVersion": "apps/v1", "kind": "DaemonSet"})]},
        "spec.roles[0].workload",
        "must be one of apps/v1/StatefulSet, apps/v1/Deployment, leaderworkerset.x-k8s.io/v1/LeaderWorkerSet",
    ),
    (
        {"roles": [role("a", podDisruptionBudget={})]},
        "spec.roles[0].podDisruptionBudget",
        "needs either minAvailable or maxUnavailable",
    ),
    (
        {"roles": [role("a", podDisruptionBudget={"minAvailable": 1, "maxUnavailable": "50%"})]},
        "spec.roles[0].podDisruptionBudget",
        "needs either minAvailable or maxUnavailable",
    ),
    (
        {"roles": [role("a", rolloutStrategy={"rollbackOnFailure": True})]},
        "spec.roles[0].rolloutStrategy",
        "rollbackOnFailure needs progressDeadlineSeconds: it says when an update has failed",
    ),
    *(
        (
            {"roles": [role("a", **rolling(**zeros))]},
            "spec.roles[0].rolloutStrategy.rollingUpdate",
            "maxUnavailable and maxSurge must not both be 0: no pod could ever be replaced",
        )
        for zeros in ({"maxUnavailable": 0}, {"maxUnavailable": "0%", "maxSurge": "0%"})
    ),
    (
        {"roles": [role("a")], "podGroupPolicy": {"kubeScheduling": {}, "volcanoScheduling": {}}},
        "spec.podGroupPolicy",
        "kubeScheduling and volcanoScheduling exclude each other",
    ),
]
UNCHECKED = "some validation rules were not checked because the object was invalid"
# the spec, what the API server says, part of what `diptych validate` says
SHAPES: list[tuple[Json, str, str]] = [
    ({"roles": []}, "spec.roles: Invalid value: 0: spec.roles in body should have at least 1 items", "spec.roles"),
    ({"roles": [role("a"), role("a")]}, 'spec.roles[1]: Duplicate value: {"name":"a"}', "a is already used"),
    (
        {"roles": [role("A_b")]},
        'spec.roles[0].name: Invalid value: "A_b": spec.roles[0].name in body should match '
        "'^[a-z0-9]([-a-z0-9]*[a-z0-9])?$'",
        "spec.roles[0].name",
    ),
    (
        {"roles": [role("a", -1)]},
        "spec.roles[0].replicas: Invalid value: -1: spec.roles[0].replicas in body should be greater than or equal to "
        "0",
        "spec.roles[0].replicas",
    ),
    (
        {"roles": [{**role("a"), "replicas": "3"}]},
        '[spec.roles[0].replicas: Invalid value: "string": spec.roles[0].replicas in body must be of type integer: '
        f'"string", <nil>: Invalid value: null: {UNCHECKED}',
        "spec.roles[0].replicas",
    ),
    (
        {"roles": [role("a", restartPolicy="Sometimes")]},
        '[spec.roles[0].restartPolicy: Unsupported value: "Sometimes": supported values: "None", '
        f'"RecreateRBGOnPodRestart", "RecreateRoleInstanceOnPodRestart", <nil>: Invalid value: null: {UNCHECKED}',
        "spec.roles[0].restartPolicy",
    ),
    (
        {"roles": [role("a", **rolling(maxUnavailable="1000%"))]},
        "[spec.roles[0].rolloutStrategy.rollingUpdate.maxUnavailable: Too long: may not be more than 4 bytes, <nil>: ",
        "spec.roles[0].rolloutStrategy.rollingUpdate.maxUnavailable",
    ),
    (
        {"roles": [{"name": "a", "template": {"spec": {}}}]},
        "[spec.roles[0].template.spec.containers: Required value, <nil>: Invalid value: null: ",
        "spec.roles[0].template.spec.containers: is required",
    ),
    (
        {"roles": [role("a", drain={"path": "x"})]},
        "spec.roles[0].drain.path: Invalid value: \"x\": spec.roles[0].drain.path in body should match '^/'",
        "spec.roles[0].drain.path",
    ),
    (
        {"roles": [role(f"r{i}") for i in range(33)]},
        "[spec.roles: Too many: 33: must have at most 32 items, <nil>: Invalid value: null: ",
        "spec.roles",
    ),
]


def named(kind: Kind, name: str, spec: Json) -> Json:
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": {"name": name}, "spec": spec}


def refusal(place: Place, kind: Kind, name: str, spec: Json) -> str:
    with pytest.raises(ApiError) as refused:
        place.make(kind, name, spec)
    return refused.value.message


def offline(kind: Kind, name: str, spec: Json) -> list[str]:
    return [str(each) for each in object_problems(named(kind, name, spec), open_pods=False)]


def test_every_rule_is_broken_below() -> None:
    def rules(schema: Any) -> set[str]:
        if isinstance(schema, list):
            return set().union(*map(rules, schema))
        if not isinstance(schema, dict):
            return set()
        own = {each["message"] for each in schema.get("x-kubernetes-validations", [])}
        return own.union(*map(rules, schema.values()))

    assert rules(crds()) == {message for _, _, message in RULES}


def test_rules_refuse(place: Place) -> None:
    for spec, field, message in RULES:
        invalid = 'RoleBasedGroup.workloads.x-k8s.io "g" is invalid'
        assert refusal(place, GROUP, "g", spec).endswith(f"422 {invalid}: {field}: Invalid value: {message}")
        found = offline(GROUP, "g", spec)
        if field == "spec":  # said more exactly offline
            assert found == ["spec.roles[0].dependencies[0]: there is no role x; there is: a"]
        else:
            assert f"{field}: {message}" in found
        below = refusal(place, GROUP_SET, "s", {"template": spec})
        assert below.endswith(f"{field.replace('spec', 'spec.template', 1)}: Invalid value: {message}")


def test_shapes_are_refused(place: Place) -> None:
    for spec, text, said_offline in SHAPES:
        assert f'422 RoleBasedGroup.workloads.x-k8s.io "g" is invalid: {text}' in refusal(place, GROUP, "g", spec)
        assert any(said_offline in each for each in offline(GROUP, "g", spec)), spec


@pytest.mark.parametrize("name", ["a.b", "9a", "a" * 64])
@pytest.mark.parametrize("kind", [GROUP, GROUP_SET], ids=lambda kind: kind.kind)
def test_names_that_services_cannot_have_are_refused(place: Place, kind: Kind, name: str) -> None:
    spec = {"roles": [role("a")]}
    text = refusal(place, kind, name, spec if kind == GROUP else {"template": spec})
    assert "metadata.name" in text and " 422 " in text
    assert offline(kind, name, spec if kind == GROUP else {"template": spec})


def test_defaults_are_filled_in_and_unknown_fields_pruned(place: Place) -> None:
    place.stop_all()
    pods = copy.deepcopy(TEMPLATE)
    pods["spec"]["fieldOfLater"] = {"kept": True}
    spec = {
        "fieldOfNobody": 1,
        "roles": [
            {"name": "a", "replicas": None, "foo": 1, "template": pods, "scalingAdapter": {}, "rolloutStrategy": {}},
            role("b", drain={"path": "/drain"}, **rolling(maxSurge="10%")),
        ],
        "scalingGroups": [{"name": "s", "roles": {"a": 1}}],
    }
    stored = place.make(GROUP, "g", spec)
    assert stored["metadata"]["generation"] == 1
    first, second = stored["spec"].pop("roles")
    assert stored["spec"] == {"paused": False, "scalingGroups": [{"name": "s", "roles": {"a": 1}, "replicas": 1}]}
    both = {"replicas": 1, "minReadySeconds": 0, "workload": {"apiVersion": "apps/v1", "kind": "StatefulSet"}}
    strategy = {"type": "RollingUpdate", "rollbackOnFailure": False}
    update = {"partition": 0, "maxUnavailable": 1, "maxSurge": "10%", "paused": False}
    drain = {"path": "/drain", "port": 8000, "timeoutSeconds": 300}
    assert first == {
        **both,
        "name": "a",
        "template": pods,
        "scalingAdapter": {"enable": False},
        "rolloutStrategy": strategy,
    }
    assert second == {
        **both,
        "name": "b",
        "template": TEMPLATE,
        "drain": drain,
        "rolloutStrategy": {**strategy, "rollingUpdate": update},
    }


def test_the_status_is_a_subresource(place: Place) -> None:
    place.stop_all()
    place.create("g", role("a"))
    answer = place.api.merge(GROUP, place.namespace, "g", {"status": {"observedGeneration": 7}})
    assert "status" not in answer
    patch = {"spec": {"paused": True}, "status": {"observedGeneration": 7}}
    answer = place.api.merge(GROUP, place.namespace, "g", patch, "status")
    assert answer["status"] == {"observedGeneration": 7} and answer["spec"]["paused"] is False
    assert answer["metadata"]["generation"] == 1


def test_scale_of_what_has_no_replicas_yet(place: Place) -> None:
    place.stop_all()
    place.make(ADAPTER, "g-a", {"scaleTargetRef": {"name": "g", "role": "a"}})
    scale = place.api.merge(ADAPTER, place.namespace, "g-a", {"spec": {"replicas": 3}}, "scale")
    assert scale["spec"] == {"replicas": 3} and scale["status"] == {"replicas": 0}
    assert place.read(ADAPTER, "g-a")["spec"]["replicas"] == 3
    with pytest.raises(ApiError, match="replicas"):
        place.api.merge(ADAPTER, place.namespace, "g-a", {"spec": {"replicas": -1}}, "scale")


def test_an_apply_of_an_unknown_field_is_refused(place: Place) -> None:
    metadata = {"name": "g", "namespace": place.namespace}
    with pytest.raises(DiptychError, match=r"500 .*: \.spec\.fieldOfNobody: field not declared in schema"):
        place.api.apply(GROUP, {"metadata": metadata, "spec": {"roles": [role("a")], "fieldOfNobody": 1}})


def test_profiles_keep_what_they_do_not_know_of_containers(place: Place) -> None:
    place.stop_all()
    spec = {"containers": [{"name": "c", "image": "i", "fieldOfLater": 1}]}
    name = f"contract-{place.namespace}"[:63]
    made = place.api.create(PROFILE, {"metadata": {"name": name}, "spec": msgspec.to_builtins(spec)})
    try:
        assert made["spec"] == {**spec, "updateStrategy": "NoUpdate"}
    finally:
        place.api.delete(PROFILE, "", name, made["metadata"]["uid"])
