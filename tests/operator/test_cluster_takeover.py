"""What must not roll pods, on any cluster (see cluster_place)."""

from __future__ import annotations

import pytest
from cluster_place import IMAGE, SECOND_IMAGE, Place, num_ready, role, set_image
from test_operator_takeover import RBG, upstream_template

from diptych.group import names
from diptych.group.operator import api
from diptych.group.operator.resources import CONFIG_MAP, GROUP, POD, SERVICE, STATEFUL_SET


def test_writing_out_the_defaults_of_a_pod_rolls_nothing(place: Place) -> None:
    place.create("g", role("a", 2))
    place.wait_ready("g")
    before = place.uids("g")
    spec = {
        "restartPolicy": "Always",
        "dnsPolicy": "ClusterFirst",
        "hostNetwork": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {},
        "containers": [
            {
                "name": "c",
                "image": IMAGE,
                "imagePullPolicy": "IfNotPresent",
                "terminationMessagePath": "/dev/termination-log",
                "resources": {},
                "env": [],
            }
        ],
    }
    generation = place.read(STATEFUL_SET, "g-a")["metadata"]["generation"]
    place.edit("g", lambda obj: obj["spec"]["roles"][0].update(template={"spec": spec}))
    place.wait_observed("g")
    place.wait_ready("g")
    assert place.uids("g") == before
    assert place.read(STATEFUL_SET, "g-a")["metadata"]["generation"] == generation


def test_what_the_upstream_controller_made_is_taken_over(idle: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place = idle
    uid = place.make(GROUP, "g", {"roles": [role("a", 2)]})["metadata"]["uid"]
    labels = names.role_labels(place.namespace, "g", "a")
    owner = {"apiVersion": GROUP.api_version, "kind": "RoleBasedGroup", "name": "g", "uid": uid, "controller": True}
    metadata = {"namespace": place.namespace, "name": "g-a", "labels": labels, "ownerReferences": [owner]}
    spec = {
        "replicas": 2,
        "serviceName": "g-a",
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": labels},
        "template": upstream_template(role("a"), labels, "g-a"),
    }
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels}
    with monkeypatch.context() as patch:
        patch.setattr(api, "FIELD_MANAGER", RBG)
        place.api.apply(CONFIG_MAP, {"metadata": metadata, "data": {"config.yaml": "old: true\n"}})
        made = place.api.apply(STATEFUL_SET, {"metadata": metadata, "spec": spec})
        of_set = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "g-a", "uid": made["metadata"]["uid"]}
        place.api.apply(SERVICE, {"metadata": {**metadata, "ownerReferences": [of_set]}, "spec": service})
    place.until(lambda: num_ready(place.objects(POD, "g")) == 2, "upstream's pods")
    before = place.uids("g")
    place.start()
    place.wait_ready("g")
    assert place.uids("g") == before
    place.edit("g", set_image())
    place.until(lambda: set(place.images("g").values()) == {SECOND_IMAGE}, "the new pods")
    place.wait_ready("g")
    for kind in (STATEFUL_SET, SERVICE, CONFIG_MAP):
        assert RBG not in {each["manager"] for each in place.read(kind, "g-a")["metadata"]["managedFields"]}
    template = place.read(STATEFUL_SET, "g-a")["spec"]["template"]["spec"]
    assert [each["configMap"]["name"] for each in template["volumes"]] == ["g"]
