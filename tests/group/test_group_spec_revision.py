"""Revisions: what makes a new one, what does not, and the way back."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from diptych.group.crds import crds
from diptych.group.resolve import resolve_spec
from diptych.group.revision import restore, spec_revision

GROUPS = [
    each
    for each in yaml.safe_load_all((Path(__file__).parent / "every_field.yaml").read_text())
    if each["kind"] == "RoleBasedGroup"
]
TEMPLATE = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "x:1"}]}}


def role(**fields: Any) -> dict[str, Any]:
    return {"name": "a", "template": copy.deepcopy(TEMPLATE), **fields}


def role_hash(each: dict[str, Any]) -> str:
    return spec_revision({"roles": [each]}).hash


def test_a_hash_fits_into_labels_and_names() -> None:
    assert re.fullmatch("[0-9a-f]{10}", role_hash(role()))
    assert re.fullmatch("[0-9a-f]{10}", spec_revision({"roles": [role()]}).hash)


@pytest.mark.parametrize(
    "same",
    [
        role(replicas=7),
        role(replicas=None),
        role(minReadySeconds=0),
        role(workload={"apiVersion": "apps/v1", "kind": "StatefulSet"}),
        role(workload={}),
        role(dependencies=[]),
        role(labels={}, restartPolicy=None),
        dict(reversed(role().items())),
    ],
)
def test_replicas_defaults_and_order_are_no_change(same: dict[str, Any]) -> None:
    assert role_hash(same) == role_hash(role())
    assert spec_revision({"roles": [same]}).hash == spec_revision({"roles": [role()]}).hash


@pytest.mark.parametrize(
    "other",
    [
        role(name="b"),
        role(minReadySeconds=1),
        role(dependencies=["b"]),
        role(restartPolicy="None"),
        role(workload={"kind": "Deployment"}),
        role(template={"spec": {"containers": [{"name": "c", "image": "x:2"}]}}),
        role(template={**TEMPLATE, "spec": {**TEMPLATE["spec"], "hostNetwork": False}}),
        role(rolloutStrategy={"rollingUpdate": {"maxSurge": 1}}),
    ],
)
def test_anything_else_is(other: dict[str, Any]) -> None:
    assert role_hash(other) != role_hash(role())
    assert spec_revision({"roles": [other]}).hash != spec_revision({"roles": [role()]}).hash


def test_nested_defaults_are_no_change() -> None:
    written = role(rolloutStrategy={"rollingUpdate": {"maxSurge": "10%"}})
    strategy = {"partition": 0, "maxUnavailable": 1, "maxSurge": "10%", "paused": False}
    stored = role(rolloutStrategy={"type": "RollingUpdate", "rollbackOnFailure": False, "rollingUpdate": strategy})
    assert role_hash(stored) == role_hash(written)


@pytest.mark.parametrize("group", GROUPS)
def test_what_the_api_server_stores_is_the_revision_that_was_written(group: dict[str, Any]) -> None:
    definition = next(each for each in crds() if each["spec"]["names"]["kind"] == "RoleBasedGroup")
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    stored = copy.deepcopy(group["spec"])
    _default(stored, schema)
    assert spec_revision(stored) == spec_revision(group["spec"])
    for written, kept in zip(resolve_spec(group["spec"])["roles"], resolve_spec(stored)["roles"], strict=True):
        assert role_hash(kept) == role_hash(written)


def _default(value: Any, schema: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for name, each in schema.get("properties", {}).items():
            if name not in value and "default" in each:
                value[name] = copy.deepcopy(each["default"])
        for name, each in value.items():
            _default(each, schema.get("properties", {}).get(name, {}))
    elif isinstance(value, list):
        for each in value:
            _default(each, schema.get("items", {}))


def test_policies_of_the_group_are_no_revision() -> None:
    spec = GROUPS[0]["spec"]
    other = {**spec, "paused": True, "coordination": [], "scalingGroups": [], "podGroupPolicy": None}
    assert spec_revision(other) == spec_revision(spec)


def test_the_way_back_keeps_replicas() -> None:
    old = {
        "roles": [role(replicas=2), role(name="gone", replicas=5)],
        "roleTemplates": [{"name": "t", "template": TEMPLATE}],
        "paused": True,
    }
    revision = spec_revision(old)
    changed = role(replicas=8, minReadySeconds=9)
    now = {"roles": [changed, role(name="new")], "coordination": [{"name": "c", "roles": ["a"]}], "paused": False}
    back = restore(now, revision.data)
    assert back == {
        "coordination": [{"name": "c", "roles": ["a"]}],
        "paused": False,
        "roles": [role(replicas=8), role(name="gone")],
        "roleTemplates": [{"name": "t", "template": TEMPLATE}],
    }
    assert spec_revision(back) == revision


def test_the_way_back_takes_templates_away_that_were_not_there() -> None:
    revision = spec_revision({"roles": [role()]})
    now = {"roles": [role()], "roleTemplates": [{"name": "t", "template": TEMPLATE}]}
    assert restore(now, revision.data) == {"roles": [role()]}
