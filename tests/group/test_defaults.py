"""What a pod template says beyond the API server's defaults."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from diptych.group.defaults import without_defaults

# What kube-apiserver 1.36.2 stored of a StatefulSet's template that writes out every default; of the same template
# without them it stored the same.
RECORDED = json.loads((Path(__file__).parent / "stored_template.json").read_text())
TEMPLATE = {"spec": {"containers": [{"name": "c", "image": "x:1"}]}}


def leaves(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(leaves, value.values()))
    return sum(map(leaves, value)) if isinstance(value, list) else 1


def test_as_written_and_as_stored_is_the_same_and_all_of_it_was_defaults() -> None:
    said = without_defaults(RECORDED["written"])
    assert said == without_defaults(RECORDED["stored"]) == without_defaults(said)
    assert (leaves(RECORDED["written"]), leaves(RECORDED["stored"]), leaves(said)) == (238, 153, 85)


def test_the_argument_stays_as_it_is() -> None:
    written = copy.deepcopy(RECORDED["written"])
    without_defaults(written)
    assert written == RECORDED["written"]


@pytest.mark.parametrize(
    "said",
    [
        {"automountServiceAccountToken": False},
        {"enableServiceLinks": True},
        {"hostNetwork": True},
        {"terminationGracePeriodSeconds": 31},
        {"securityContext": {"runAsNonRoot": False}},
        {"containers": [{"name": "c", "image": "x:1", "imagePullPolicy": "Always"}]},
        {"containers": [{"name": "c", "image": "x", "imagePullPolicy": "IfNotPresent"}]},
        {"containers": [{"name": "c", "image": "x:1", "securityContext": {}}]},
        {"containers": [{"name": "c", "image": "x:1", "ports": [{"containerPort": 1, "protocol": "UDP"}]}]},
        {"volumes": [{"name": "v", "emptyDir": {"medium": "Memory"}}]},
        {"affinity": {"podAffinity": {}}},
    ],
    ids=str,
)
def test_what_is_no_default_of_a_template_stays(said: dict[str, Any]) -> None:
    template = {"spec": {**TEMPLATE["spec"], **said}}
    assert without_defaults(template) == template
