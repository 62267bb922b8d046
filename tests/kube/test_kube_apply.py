"""Server-side apply: who owns what, what goes when it is no longer declared, conflicts, no write without a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kube_objects import Obj, config_map, crd, service, stateful_set, toy

from diptych.testing.kube import ApiError, Cluster
from diptych.testing.kube.shapes import ATOMIC_MAPS, CONTAINER_PORT, LIST_KEYS, SERVICE_PORT, SETS


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster(clock="manual")
    made.create(crd())
    return made


def apply(cluster: Cluster, obj: Obj, manager: str = "me", **options: Any) -> Obj:
    kind = f"{obj['apiVersion']}/{obj['kind']}"
    return cluster.api.apply(kind, "default", obj["metadata"]["name"], obj, manager=manager, **options)


def fields(obj: Obj, manager: str, operation: str = "Apply") -> Obj:
    for entry in obj["metadata"].get("managedFields", []):
        if (entry["manager"], entry["operation"]) == (manager, operation):
            found: Obj = entry["fieldsV1"]
            return found
    return {}


def test_apply_creates_and_owns_what_it_declares(cluster: Cluster) -> None:
    obj = apply(cluster, stateful_set(replicas=2))
    assert obj["metadata"]["generation"] == 1
    owned = fields(obj, "me")
    containers = owned["f:spec"]["f:template"]["f:spec"]["f:containers"]
    assert containers == {'k:{"name":"main"}': {".": {}, "f:image": {}, "f:name": {}}}
    assert owned["f:spec"]["f:selector"] == {}  # a LabelSelector is one value
    assert owned["f:spec"]["f:template"]["f:metadata"] == {"f:labels": {"f:app": {}}}
    assert "f:revisionHistoryLimit" not in owned["f:spec"]  # a default is nobody's
    assert obj["spec"]["revisionHistoryLimit"] == 10


def test_the_same_declaration_again_writes_nothing(cluster: Cluster) -> None:
    for obj in (stateful_set(), config_map(data={"a": "1"}), service(ports=[{"port": 80}]), toy(size=1, tags=["x"])):
        first = apply(cluster, obj)
        cluster.advance(30)
        live = cluster.api.get(f"{obj['apiVersion']}/{obj['kind']}", "default", obj["metadata"]["name"])
        revision = cluster.store.revision
        again = apply(cluster, obj)
        assert again == live
        assert again["spec" if "spec" in obj else "data"] == first["spec" if "spec" in obj else "data"]
        assert cluster.store.revision == revision


def test_a_dropped_field_without_another_owner_goes(cluster: Cluster) -> None:
    apply(cluster, config_map(data={"a": "1", "b": "2"}, labels={"x": "1", "y": "2"}))
    obj = apply(cluster, config_map(data={"a": "1"}, labels={"x": "1"}))
    assert obj["data"] == {"a": "1"}
    assert obj["metadata"]["labels"] == {"x": "1"}


def test_a_dropped_field_with_another_owner_stays(cluster: Cluster) -> None:
    apply(cluster, config_map(data={"a": "1", "b": "2"}), "one")
    apply(cluster, config_map(data={"b": "2", "c": "3"}), "two")  # b has two owners now, no conflict: equal values
    obj = apply(cluster, config_map(data={"a": "1"}), "one")
    assert obj["data"] == {"a": "1", "b": "2", "c": "3"}
    obj = apply(cluster, config_map(data={"c": "3"}), "two")
    assert obj["data"] == {"a": "1", "c": "3"}


def test_what_one_manager_owns_can_be_made_anothers(cluster: Cluster) -> None:
    """kube-apiserver 1.36.2 does so."""
    obj = apply(cluster, config_map(data={"a": "1", "b": "2"}), "one")
    entries = [{**each, "manager": "two"} for each in obj["metadata"]["managedFields"]]
    patch = {"metadata": {"resourceVersion": obj["metadata"]["resourceVersion"], "managedFields": entries}}
    obj = cluster.api.patch("ConfigMap", "default", "settings", patch, manager="two")
    assert [each["manager"] for each in obj["metadata"]["managedFields"]] == ["two"]
    assert apply(cluster, config_map(data={"b": "2"}), "two")["data"] == {"b": "2"}


def test_fields_that_others_set_survive_an_apply(cluster: Cluster) -> None:
    apply(cluster, config_map(data={"a": "1"}))
    cluster.api.patch("ConfigMap", "default", "settings", {"data": {"z": "9"}}, manager="person")
    obj = apply(cluster, config_map(data={"a": "2"}))
    assert obj["data"] == {"a": "2", "z": "9"}
    assert fields(obj, "person", "Update") == {"f:data": {"f:z": {}}}


def test_a_conflict_names_field_and_manager_and_force_takes_over(cluster: Cluster) -> None:
    apply(cluster, stateful_set(replicas=2), "one")
    with pytest.raises(ApiError) as caught:
        apply(cluster, stateful_set(replicas=5), "two")
    assert caught.value.code == 409 and caught.value.reason == "Conflict"
    causes = caught.value.body()["details"]["causes"]
    assert causes == [
        {"reason": "FieldManagerConflict", "message": 'conflict with "one"', "field": ".spec.replicas"},
    ]
    obj = apply(cluster, stateful_set(replicas=5), "two", force=True)
    assert obj["spec"]["replicas"] == 5
    assert "f:replicas" not in fields(obj, "one")["f:spec"]
    assert "f:replicas" in fields(obj, "two")["f:spec"]
    # the first no longer owns it: that it drops the field changes nothing
    without = stateful_set()
    del without["spec"]["replicas"]
    assert apply(cluster, without, "one")["spec"]["replicas"] == 5


def test_a_conflict_with_an_update_says_so(cluster: Cluster) -> None:
    apply(cluster, config_map(data={"a": "1"}))
    cluster.api.patch("ConfigMap", "default", "settings", {"data": {"a": "9"}}, manager="person")
    assert fields(cluster.api.get("ConfigMap", "default", "settings"), "me") == {}  # an update takes what it changes
    with pytest.raises(ApiError) as caught:
        apply(cluster, config_map(data={"a": "1"}))
    assert 'conflict with "person" using v1: .data.a' in caught.value.message


def test_drift_of_an_owned_field_is_undone_by_force(cluster: Cluster) -> None:
    apply(cluster, stateful_set(replicas=2))
    cluster.api.patch("StatefulSet", "default", "web", {"spec": {"replicas": 7}}, manager="hpa", subresource="scale")
    obj = apply(cluster, stateful_set(replicas=2), force=True)
    assert obj["spec"]["replicas"] == 2
    assert obj["metadata"]["generation"] == 3
    assert [entry["manager"] for entry in obj["metadata"]["managedFields"]] == ["me"]


def test_list_items_merge_by_key(cluster: Cluster) -> None:
    def env(*names: str) -> Obj:
        obj = stateful_set()
        obj["spec"]["template"]["spec"]["containers"][0]["env"] = [{"name": name, "value": "1"} for name in names]
        return obj

    def names(obj: Obj) -> list[str]:
        return [one["name"] for one in obj["spec"]["template"]["spec"]["containers"][0]["env"]]

    assert names(apply(cluster, env("A", "B"))) == ["A", "B"]
    sidecar = stateful_set()
    sidecar["spec"]["template"]["spec"]["containers"] = [{"name": "side", "image": "side:1"}]
    obj = apply(cluster, sidecar, "injector")
    assert [one["name"] for one in obj["spec"]["template"]["spec"]["containers"]] == ["main", "side"]
    assert names(apply(cluster, env("C", "B"))) == ["C", "B"]  # A is gone, the declared order holds
    obj = apply(cluster, env("B"))
    assert [one["name"] for one in obj["spec"]["template"]["spec"]["containers"]] == ["main", "side"]


def test_an_item_that_only_the_applier_owned_goes_with_its_defaults(cluster: Cluster) -> None:
    two = stateful_set()
    two["spec"]["template"]["spec"]["containers"].append({"name": "side", "image": "side:1"})
    assert len(apply(cluster, two)["spec"]["template"]["spec"]["containers"]) == 2
    obj = apply(cluster, stateful_set())
    assert [one["name"] for one in obj["spec"]["template"]["spec"]["containers"]] == ["main"]


def test_an_item_goes_even_if_an_update_changed_part_of_it(cluster: Cluster) -> None:
    two = stateful_set()
    two["spec"]["template"]["spec"]["containers"].append({"name": "side", "image": "side:1"})
    apply(cluster, two)
    patch = {"spec": {"template": {"spec": {"containers": [{"name": "side", "image": "side:2"}]}}}}
    obj = cluster.api.patch("StatefulSet", "default", "web", patch, how="strategic", manager="person")
    assert fields(obj, "person", "Update")
    obj = apply(cluster, stateful_set())
    assert [one["name"] for one in obj["spec"]["template"]["spec"]["containers"]] == ["main"]
    assert fields(obj, "person", "Update") == {}  # nobody owns what is not there


def test_what_held_only_dropped_fields_goes_with_them(cluster: Cluster) -> None:
    apply(cluster, toy(size=1, parts=[{"name": "a", "free": {"x": {"y": 1}}}]))
    assert apply(cluster, toy(size=1, parts=[{"name": "a"}]))["spec"]["parts"] == [{"name": "a", "count": 1}]


def test_an_entry_keeps_its_time_until_its_fields_change(cluster: Cluster) -> None:
    def times(obj: Obj) -> dict[str, str]:
        return {entry["manager"]: entry["time"] for entry in obj["metadata"]["managedFields"]}

    first = times(apply(cluster, config_map(data={"a": "1"}), "one"))
    cluster.advance(60)
    both = times(apply(cluster, config_map(data={"b": "1"}), "two"))
    assert both["one"] == first["one"] < both["two"]


def test_an_atomic_list_is_one_value(cluster: Cluster) -> None:
    first = stateful_set()
    first["spec"]["template"]["spec"]["containers"][0]["args"] = ["a", "b"]
    apply(cluster, first)
    first["spec"]["template"]["spec"]["containers"][0]["args"] = ["b"]
    obj = apply(cluster, first)
    assert obj["spec"]["template"]["spec"]["containers"][0]["args"] == ["b"]
    with pytest.raises(ApiError):
        first["spec"]["template"]["spec"]["containers"][0]["args"] = ["c"]
        apply(cluster, first, "other")


def test_ports_are_told_apart_by_number_and_protocol(cluster: Cluster) -> None:
    obj = apply(cluster, service(ports=[{"name": "t", "port": 53}, {"name": "u", "port": 53, "protocol": "UDP"}]))
    assert set(fields(obj, "me")["f:spec"]["f:ports"]) == {
        'k:{"port":53,"protocol":"TCP"}',
        'k:{"port":53,"protocol":"UDP"}',
    }
    obj = apply(cluster, service(ports=[{"name": "u", "port": 53, "protocol": "UDP"}]))
    assert [port["protocol"] for port in obj["spec"]["ports"]] == ["UDP"]


def test_finalizers_are_a_set_and_owners_go_by_uid(cluster: Cluster) -> None:
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "o", "uid": "u1"}
    apply(cluster, config_map(finalizers=["x.io/a"], ownerReferences=[owner]), "one")
    obj = apply(cluster, config_map(finalizers=["x.io/b"], ownerReferences=[{**owner, "uid": "u2"}]), "two")
    assert obj["metadata"]["finalizers"] == ["x.io/a", "x.io/b"]
    assert [one["uid"] for one in obj["metadata"]["ownerReferences"]] == ["u1", "u2"]
    obj = apply(cluster, config_map(), "one")
    assert obj["metadata"]["finalizers"] == ["x.io/b"]
    assert [one["uid"] for one in obj["metadata"]["ownerReferences"]] == ["u2"]


def test_status_is_owned_through_its_subresource_alone(cluster: Cluster) -> None:
    ready = {"type": "Ready", "status": "True"}
    obj = apply(cluster, {**toy(size=1), "status": {"conditions": [ready]}})
    assert "status" not in obj and "f:status" not in fields(obj, "me")
    changed = apply(cluster, {**toy(size=5), "status": {"phase": "Up"}}, subresource="status")
    assert changed["status"] == {"phase": "Up"} and changed["spec"]["size"] == 1
    assert changed["metadata"]["generation"] == 1
    entries = {entry.get("subresource", ""): entry["fieldsV1"] for entry in changed["metadata"]["managedFields"]}
    assert entries["status"] == {"f:status": {"f:phase": {}}}
    revision = cluster.store.revision
    apply(cluster, {**toy(), "spec": {}, "status": {"phase": "Up"}}, subresource="status")
    assert cluster.store.revision == revision
    gone = apply(cluster, {**toy(), "status": {"other": 1}}, subresource="status")
    assert gone["status"] == {"other": 1}


def test_custom_kinds_merge_by_their_schema(cluster: Cluster) -> None:
    apply(cluster, toy(size=1, parts=[{"name": "a"}], tags=["x"], words=["u"], whole={"a": 1}, limits={"k": 1}), "one")
    with pytest.raises(ApiError) as caught:
        apply(cluster, toy(size=1, words=["v"], whole={"b": 2}), "two")
    assert [cause["field"] for cause in caught.value.details["causes"]] == [".spec.whole", ".spec.words"]
    obj = apply(cluster, toy(size=1, parts=[{"name": "b", "count": 3}], tags=["y"], limits={"l": 2}), "two")
    assert obj["spec"]["parts"] == [{"name": "a", "count": 1}, {"name": "b", "count": 3}]
    assert obj["spec"]["tags"] == ["x", "y"] and obj["spec"]["limits"] == {"k": 1, "l": 2}
    obj = apply(cluster, toy(size=1), "one")
    parts = [{"name": "b", "count": 3}]
    assert obj["spec"] == {"size": 1, "color": "red", "parts": parts, "tags": ["y"], "limits": {"l": 2}}


def test_an_apply_with_an_unknown_field_or_a_double_key_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ApiError) as caught:
        apply(cluster, toy(size=1, sise=2))
    assert ".spec.sise: field not declared in schema" in caught.value.message
    with pytest.raises(ApiError) as caught:
        apply(cluster, toy(size=1, parts=[{"name": "a"}, {"name": "a"}]))
    assert caught.value.code == 500 and "duplicate entries for key" in caught.value.message
    with pytest.raises(ApiError) as caught:
        cluster.api.apply("Toy", "default", "bear", {"spec": {"size": 1}}, manager="me")
    assert caught.value.code == 400


def test_an_apply_with_a_stale_revision_conflicts(cluster: Cluster) -> None:
    obj = apply(cluster, config_map(data={"a": "1"}))
    apply(cluster, config_map(data={"a": "2"}))
    stale = config_map(data={"a": "3"}, resourceVersion=obj["metadata"]["resourceVersion"])
    with pytest.raises(ApiError) as caught:
        apply(cluster, stale)
    assert caught.value.code == 409


def test_max_unavailable_is_dropped_without_its_gate() -> None:
    rolling = {"updateStrategy": {"rollingUpdate": {"maxUnavailable": 2}}}
    closed, open_ = Cluster(clock="manual"), Cluster(clock="manual", gates=["MaxUnavailableStatefulSet"])
    assert apply(closed, stateful_set(**rolling))["spec"]["updateStrategy"]["rollingUpdate"] == {"partition": 0}
    assert apply(open_, stateful_set(**rolling))["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == 2
    closed.settle()
    revision = closed.store.revision
    apply(closed, stateful_set(**rolling))
    assert closed.store.revision == revision


def test_our_list_types_are_those_of_the_published_schemas() -> None:
    """The table of list and map types, against the schemas of Kubernetes 1.37 that kubernetes-validate carries."""
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.37.0-local"
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    workloads = ("api.core.v1.Pod", "api.core.v1.Container", "api.core.v1.Service", "api.core.v1.Volume", "api.apps.v1")
    workloads += (
        "meta.v1.ObjectMeta",
        "api.core.v1.EnvVar",
        "api.policy",
        "api.autoscaling.v2",
        "api.core.v1.Resource",
    )
    for name, definition in definitions.items():
        if not any(part in name for part in workloads):
            continue
        for field, schema in definition.get("properties", {}).items():
            where = f"{name}.{field}"
            keys = tuple(schema.get("x-kubernetes-list-map-keys", ()))
            if schema.get("x-kubernetes-list-type") == "map" and field == "ports":
                assert keys in {tuple(key for key, _ in ports) for ports in (CONTAINER_PORT, SERVICE_PORT)}, where
            elif schema.get("x-kubernetes-list-type") == "map" and "Status" not in name and "Health" not in name:
                assert tuple(key for key, _ in LIST_KEYS[field]) == keys, where
            elif schema.get("x-kubernetes-list-type") == "set" and "Status" not in name and "Rule" not in name:
                assert field in SETS or field == "bindMountOptions", where
            elif schema.get("type") == "array" and schema.get("x-kubernetes-list-type") == "atomic":
                assert field not in LIST_KEYS and field not in SETS, where
            reference = schema.get("$ref", "").rpartition("/")[2]
            if definitions.get(reference, {}).get("x-kubernetes-map-type") == "atomic" and field != "scopeSelector":
                known = ATOMIC_MAPS | {"required", "configMapRef"}  # the latter two hold one field each
                assert field in known or "Volume" in name or "EnvFrom" in name, where


NAMES = st.sampled_from(["a", "b", "c", "d"])
SPECS = st.fixed_dictionaries(
    {"size": st.integers(0, 3)},
    optional={
        "parts": st.lists(
            st.fixed_dictionaries({"name": NAMES}, optional={"count": st.integers(0, 3)}),
            unique_by=lambda part: part["name"],
            max_size=4,
        ),
        "tags": st.lists(NAMES, unique=True, max_size=3),
        "words": st.lists(NAMES, max_size=3),
        "limits": st.dictionaries(NAMES, st.integers(0, 2), max_size=3),
        "color": st.sampled_from(["red", "blue"]),
    },
)
STEPS = st.lists(st.tuples(st.sampled_from(["one", "two", "three"]), SPECS), min_size=1, max_size=8)


def declared(spec: Obj) -> Obj:
    """What an apply promises: everything declared is there."""
    return {key: value for key, value in spec.items() if value not in ({}, [])}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(STEPS)
def test_any_sequence_of_applies(steps: list[tuple[str, Obj]]) -> None:
    """Declared fields hold their declared values; a repeated apply writes nothing; managers that leave take all that
    only they owned.
    """
    cluster = Cluster(clock="manual")
    cluster.create(crd())
    for manager, spec in steps:
        obj = apply(cluster, toy(**spec), manager, force=True)
        for key, value in declared(spec).items():
            got = obj["spec"][key]
            if key == "parts":
                items = {part["name"]: part for part in got}
                assert all(part.items() <= items[part["name"]].items() for part in value)
            elif key == "tags":
                assert set(value) <= set(got)
            elif key == "limits":
                assert value.items() <= got.items()
            else:
                assert got == value
        revision = cluster.store.revision
        assert apply(cluster, toy(**spec), manager, force=True) == obj
        assert apply(cluster, toy(**spec), manager) == obj  # nor is there a conflict left
        assert cluster.store.revision == revision
    for manager in ("one", "two", "three"):
        obj = apply(cluster, toy(size=0), manager, force=True)
    assert obj["spec"]["size"] == 0
    assert not obj["spec"].get("parts") and not obj["spec"].get("tags") and not obj["spec"].get("limits")
    assert "words" not in obj["spec"] and obj["spec"]["color"] == "red"
