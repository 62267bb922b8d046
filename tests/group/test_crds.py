"""The custom resource definitions: what an API server demands of them, and that they accept what we ship.

The schemas are judged here by other programs (kubernetes_validate, jsonschema) and by rules written down from
Kubernetes' documentation of structural schemas.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import msgspec
import pytest
import yaml
from group_manifests import EXAMPLES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.group.crds import RESOURCES, crds, crds_yaml
from diptych.group.kinds import KINDS
from diptych.group.reader import Reading
from diptych.group.validate import object_problems

EVERY_FIELD = list(yaml.safe_load_all((Path(__file__).parent / "every_field.yaml").read_text()))
FULL = [
    *EVERY_FIELD,
    *(
        {
            "apiVersion": "workloads.x-k8s.io/v1alpha1",
            "kind": "RoleBasedGroupSet",
            "metadata": {"name": f"set-of-{each['metadata']['name']}"},
            "spec": {
                "replicas": 2,
                "template": each["spec"],
                "rolloutStrategy": {"rollingUpdate": {"maxUnavailable": 1}},
            },
            "status": {
                "observedGeneration": 3,
                "replicas": 2,
                "readyReplicas": 2,
                "updatedReplicas": 1,
                "conditions": EVERY_FIELD[0]["status"]["conditions"],
            },
        }
        for each in EVERY_FIELD
        if each["kind"] == "RoleBasedGroup"
    ),
]
TYPES = {"object", "array", "string", "integer", "boolean"}
PASSES_THROUGH = {"template", "spec", "metadata", "containers", "initContainers", "volumes", "components"} | {
    "templatePatch",
    "patchLeaderTemplate",
    "patchWorkerTemplate",
}
Schema = dict[str, Any]


@cache
def schema_of(kind: str) -> Schema:
    definition = next(each for each in crds() if each["spec"]["names"]["kind"] == kind)
    schema: Schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every schema in a schema, with its path; [] stands for the items of a list, {} for the values of a map."""
    yield path, schema
    for name, each in schema.get("properties", {}).items():
        yield from nodes(each, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


def as_json_schema(schema: Schema) -> Schema:
    """A structural schema for a validator that knows nothing of Kubernetes: unknown fields are wrong unless they
    pass through, and lists with keys are checked by `duplicates`."""
    result = {name: value for name, value in schema.items() if not name.startswith("x-kubernetes-")}
    if "properties" in result:
        result["properties"] = {name: as_json_schema(each) for name, each in result["properties"].items()}
    for name in ("items", "additionalProperties"):
        if name in result:
            result[name] = as_json_schema(result[name])
    if schema.get("type") == "object" and "additionalProperties" not in schema:
        result["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return result


def with_defaults(value: Any, schema: Schema) -> Any:
    """As the API server stores it: nulls dropped where there is no use for them, then defaults."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name, each in properties.items():
            if value.get(name) is None and name in value:
                del value[name]
            if name not in value and "default" in each:
                value[name] = copy.deepcopy(each["default"])
        for name in value:
            with_defaults(value[name], properties.get(name, schema.get("additionalProperties", {})))
    elif isinstance(value, list):
        for each in value:
            with_defaults(each, schema.get("items", {}))
    return value


def errors(document: dict[str, Any]) -> list[str]:
    """What is wrong with an object by its kind's schema, its metadata aside."""
    schema = schema_of(document["kind"])
    stored = with_defaults(copy.deepcopy(document), schema)
    described = schema["properties"]["metadata"].get("properties", {})
    stored["metadata"] = {name: each for name, each in stored["metadata"].items() if name in described}
    found = jsonschema.Draft202012Validator(as_json_schema(schema)).iter_errors(stored)
    return [f"{'.'.join(str(part) for part in each.absolute_path)}: {each.message}" for each in found]


def test_four_definitions_sorted_and_the_same_every_time() -> None:
    names = [each["metadata"]["name"] for each in crds()]
    assert names == sorted(names) and len(names) == 4
    assert list(yaml.safe_load_all(crds_yaml())) == crds()
    assert "&id" not in crds_yaml()
    assert {each.kind.__name__ for each in RESOURCES} == set(KINDS)


@pytest.mark.parametrize("version", ["1.28", "1.36", "1.37"])
def test_they_are_definitions_of_kubernetes(version: str) -> None:
    for each in yaml.safe_load_all(crds_yaml()):
        kubernetes_validate.validate(each, version, strict=True)


def test_how_kinds_are_served() -> None:
    served = {each["spec"]["names"]["kind"]: each["spec"] for each in crds()}
    assert {kind: spec["names"].get("shortNames", []) for kind, spec in served.items()} == {
        "RoleBasedGroup": ["rbg"],
        "RoleBasedGroupSet": ["rbgs"],
        "RoleBasedGroupScalingAdapter": ["rbgsa"],
        "ClusterEngineRuntimeProfile": [],
    }
    assert [kind for kind, spec in served.items() if spec["scope"] == "Cluster"] == ["ClusterEngineRuntimeProfile"]
    scale = {kind: spec["versions"][0]["subresources"].get("scale") for kind, spec in served.items()}
    assert scale["RoleBasedGroup"] is None
    assert scale["RoleBasedGroupSet"] == {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
    }
    assert scale["RoleBasedGroupScalingAdapter"] == {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_paths_of_columns_and_scale_lead_somewhere(kind: str) -> None:
    version = next(each for each in crds() if each["spec"]["names"]["kind"] == kind)["spec"]["versions"][0]
    known = {path for path, _ in nodes(version["schema"]["openAPIV3Schema"])} | {".metadata.creationTimestamp"}
    paths = [each["jsonPath"] for each in version["additionalPrinterColumns"]]
    paths += version["subresources"].get("scale", {}).values()
    for path in paths:
        assert re.sub(r"\[\?\(@\.type==.*?\)\]", "[]", path) in known


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_schemas_are_structural(kind: str) -> None:
    for path, each in nodes(schema_of(kind)):
        if each.get("x-kubernetes-int-or-string"):
            assert each["anyOf"] == [{"type": "integer"}, {"type": "string"}] and "type" not in each, path
        else:
            assert each.get("type") in TYPES, path
            assert not {"anyOf", "oneOf", "allOf", "not", "$ref"} & set(each), path
        assert ("items" in each) == (each.get("type") == "array"), path
        assert not ("properties" in each and "additionalProperties" in each), path
        assert set(each.get("required", ())) <= set(each.get("properties", ())), path
        if "pattern" in each:
            re.compile(each["pattern"])
            assert "(?" not in each["pattern"], path  # RE2 has no look-around
        if keys := each.get("x-kubernetes-list-map-keys"):
            items = each["items"]
            assert each["x-kubernetes-list-type"] == "map", path
            assert all(key in items["required"] or "default" in items["properties"][key] for key in keys), path
        if "default" in each:
            value = copy.deepcopy(each["default"])
            assert with_defaults(value, each) == each["default"], path
            jsonschema.validate(each["default"], as_json_schema(each))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_only_pod_templates_and_patches_pass_through_unread(kind: str) -> None:
    for path, each in nodes(schema_of(kind)):
        if each.get("x-kubernetes-preserve-unknown-fields"):
            assert re.sub(r"\[\]$", "", path).rsplit(".", 1)[-1] in PASSES_THROUGH, path
            assert each["type"] == "object" and path not in ("", ".spec", ".metadata", ".spec.template.metadata")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_cost_of_rules_is_bounded(kind: str) -> None:
    """The API server refuses a definition whose rules might run too often: lists above a rule need maxItems."""
    schema = schema_of(kind)
    every = dict(nodes(schema))
    for path, each in every.items():
        if "x-kubernetes-validations" in each:
            above = [path[: match.start()] for match in re.finditer(r"\[\]", path)]
            assert all(every[name].get("maxItems", 1000) <= 32 for name in above), path
    if kind == "RoleBasedGroup":
        roles = every[".spec.roles"]
        dependencies = every[".spec.roles[].dependencies"]
        # roles × dependencies × roles, with about 34 for the comparison of two names of up to 63 characters
        assert roles["maxItems"] ** 2 * dependencies["maxItems"] * 34 < 10_000_000 / 5


def test_every_field_of_the_api_is_in_the_full_example() -> None:
    """So that what follows means something. `components` is in no valid object."""
    for kind in KINDS:
        written = [each for each in FULL if each["kind"] == kind]
        for path, _ in nodes(schema_of(kind)):
            if not path.startswith(".metadata") and ".components" not in path:
                assert any(_has(each, re.findall(r"\.\w+|\[\]|\{\}", path)) for each in written), f"{kind}{path}"


def _has(value: Any, steps: list[str]) -> bool:
    if not steps:
        return True
    first, *rest = steps
    if first == "[]":
        return isinstance(value, list) and any(_has(each, rest) for each in value)
    if first == "{}":
        return isinstance(value, dict) and any(_has(each, rest) for each in value.values())
    return isinstance(value, dict) and first[1:] in value and _has(value[first[1:]], rest)


def shipped() -> list[Any]:
    files = sorted(EXAMPLES.rglob("*.yaml"))
    documents = [(path, each) for path in files for each in yaml.safe_load_all(path.read_text())]
    return [
        pytest.param(each, id=f"{path.name}:{each['metadata']['name']}")
        for path, each in documents
        if each["kind"] in KINDS
    ]


@pytest.mark.parametrize("document", [*shipped(), *FULL])
def test_manifests_validate(document: dict[str, Any]) -> None:
    assert errors(document) == []
    assert object_problems(document) == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RoleBasedGroup", "spec.roles", []),
        ("RoleBasedGroup", "spec.roles.0.replicas", -1),
        ("RoleBasedGroup", "spec.roles.0.replicas", "2"),
        ("RoleBasedGroup", "spec.roles.0.name", "Prefill"),
        ("RoleBasedGroup", "spec.roles.0.restartPolicy", "Always"),
        ("RoleBasedGroup", "spec.roles.0.replica", 1),
        ("RoleBasedGroup", "spec.roles.0.template.spec.containers", []),
        ("RoleBasedGroup", "spec.roles.0.template.spec.containers.0", {}),
        ("RoleBasedGroup", "spec.roles.0.rolloutStrategy.type", "Recreate"),
        ("RoleBasedGroup", "spec.roles.0.rolloutStrategy.rollingUpdate.maxSurge", "30"),
        ("RoleBasedGroup", "spec.roles.0.drain.path", "drain"),
        ("RoleBasedGroup", "spec.coordination.0.strategy.rollingUpdate.maxSkew", "101%"),
        ("RoleBasedGroup", "spec.coordination.0.strategy.scaling.progression", "Ordered"),
        ("RoleBasedGroup", "spec.scalingGroups.0.roles", {"decode": 0}),
        ("RoleBasedGroup", "metadata.name", "1group"),
        ("RoleBasedGroup", "status.conditions.0.status", True),
        ("RoleBasedGroupSet", "spec.template", {}),
        ("RoleBasedGroupSet", "spec.rolloutStrategy.rollingUpdate.maxUnavailable", 0),
        ("RoleBasedGroupSet", "spec.rolloutStrategy.rollingUpdate.maxUnavailable", "0%"),
        ("RoleBasedGroupScalingAdapter", "spec.scaleTargetRef", {"name": "g"}),
        ("ClusterEngineRuntimeProfile", "spec.updateStrategy", "Never"),
    ],
)
def test_mistakes_are_refused_by_the_schema_and_by_us(kind: str, path: str, value: Any) -> None:
    document = copy.deepcopy(next(each for each in FULL if each["kind"] == kind))
    *parents, last = path.split(".")
    where = document
    for name in parents:
        where = where[int(name)] if isinstance(where, list) else where[name]
    where[int(last) if isinstance(where, list) else last] = value
    assert errors(document)
    assert object_problems(document)


def test_defaults_are_those_of_the_structs() -> None:
    document = {
        "apiVersion": "workloads.x-k8s.io/v1alpha1",
        "kind": "RoleBasedGroup",
        "metadata": {"name": "g"},
        "spec": {"roles": [{"name": "a", "rolloutStrategy": {"rollingUpdate": {}}}]},
    }
    stored = with_defaults(document, schema_of("RoleBasedGroup"))
    assert stored["spec"] == {
        "paused": False,
        "roles": [
            {
                "name": "a",
                "replicas": 1,
                "minReadySeconds": 0,
                "workload": {"apiVersion": "apps/v1", "kind": "StatefulSet"},
                "rolloutStrategy": {
                    "type": "RollingUpdate",
                    "rollbackOnFailure": False,
                    "rollingUpdate": {"partition": 0, "maxUnavailable": 1, "maxSurge": 0, "paused": False},
                },
            }
        ],
    }


@pytest.mark.parametrize("document", FULL)
def test_what_is_stored_reads_back_as_what_was_written(document: dict[str, Any]) -> None:
    """The API server's defaults and ours are the same."""
    kind = KINDS[document["kind"]]
    stored = with_defaults(copy.deepcopy(document), schema_of(document["kind"]))
    assert _read(kind, stored) == _read(kind, document)


def _read(kind: type[Any], document: dict[str, Any]) -> Any:
    reading = Reading()
    value = reading.read(kind, document)
    assert reading.problems == []
    return msgspec.to_builtins(value)


JUNK = [None, True, 0, -1, 2**40, 1.5, "", "x", "Not A Name", "10%", [], [None], ["a"], {}, {"name": "x"}, {"a": None}]


@given(st.sampled_from(FULL), st.data())
@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_the_schema_refuses_we_refuse_too(document: dict[str, Any], data: st.DataObject) -> None:
    """One value somewhere in a valid object is replaced: the offline check never fails itself, nor is it laxer."""
    document = copy.deepcopy(document)
    where: Any = document
    while True:
        names = range(len(where)) if isinstance(where, list) else sorted({*where} - {"kind"})
        name = data.draw(st.sampled_from(names))
        if where[name] in ({}, []) or not isinstance(where[name], dict | list) or data.draw(st.integers(0, 5)) == 0:
            break
        where = where[name]
    where[name] = data.draw(st.sampled_from(JUNK))
    found = object_problems(document)
    if isinstance(document["metadata"], dict) and document["metadata"].get("name") is not None and errors(document):
        assert found


def test_the_guide_tells_of_every_field_of_ours() -> None:
    guide = (EXAMPLES.parent / "docs" / "kubernetes-api.md").read_text()
    ours = {
        path.rsplit(".", 1)[-1].rstrip("[]{}")
        for kind in KINDS
        for path, each in nodes(schema_of(kind))
        if each.get("description", "").startswith("Ours.")
    }
    assert {"scalingGroups", "paused", "drain", "minAvailable", "podDisruptionBudget"} <= ours
    assert [name for name in sorted(ours) if f"{name}`" not in guide and f"`{name}" not in guide] == []
