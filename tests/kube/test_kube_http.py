"""The API as the official client meets it: verbs, errors, discovery, paging, subresources, kinds from CRDs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kube_clients import Clients, connect
from kube_objects import Obj, config_map, crd, deployment, pod, service, stateful_set, toy
from kubernetes import client, dynamic
from kubernetes.client import ApiException

from diptych.testing.kube import Cluster, KubeServer

GROUP = ("example.com", "v1", "default", "toys")


def code(call: object, *args: object, **options: object) -> int:
    with pytest.raises(ApiException) as caught:
        call(*args, **options)  # type: ignore[operator]
    return int(caught.value.status)


def test_create_read_update_delete(clients: Clients) -> None:
    core = clients.core
    made = core.create_namespaced_config_map("default", config_map(data={"a": "1"}))
    assert made.metadata.uid and made.metadata.creation_timestamp and made.metadata.resource_version
    assert code(core.create_namespaced_config_map, "default", config_map()) == 409
    read = core.read_namespaced_config_map("settings", "default")
    assert read.data == {"a": "1"}
    read.data = {"a": "2"}
    changed = core.replace_namespaced_config_map("settings", "default", read)
    assert int(changed.metadata.resource_version) > int(made.metadata.resource_version)
    assert code(core.replace_namespaced_config_map, "settings", "default", read) == 409  # read is stale by now
    assert core.delete_namespaced_config_map("settings", "default")["status"] == "Success"
    assert code(core.read_namespaced_config_map, "settings", "default") == 404
    assert code(core.create_namespaced_config_map, "nowhere", config_map()) == 404


def test_patches(clients: Clients) -> None:
    core, apps = clients.core, clients.apps
    core.create_namespaced_config_map("default", config_map(data={"a": "1", "b": "2"}))
    merged = core.patch_namespaced_config_map("settings", "default", {"data": {"a": None, "c": "3"}})
    assert merged.data == {"b": "2", "c": "3"}
    operations = [{"op": "test", "path": "/data/b", "value": "2"}, {"op": "add", "path": "/data/d", "value": "4"}]
    assert core.patch_namespaced_config_map("settings", "default", operations).data == {"b": "2", "c": "3", "d": "4"}
    operations[0]["value"] = "9"
    assert code(core.patch_namespaced_config_map, "settings", "default", operations) == 422
    apps.create_namespaced_stateful_set("default", stateful_set())
    body = {"spec": {"template": {"spec": {"containers": [{"name": "side", "image": "side:1"}]}}}}
    strategic = apps.patch_namespaced_stateful_set("web", "default", body)  # the client's default for such a body
    assert [one.name for one in strategic.spec.template.spec.containers] == ["side", "main"]
    stale = {"metadata": {"resourceVersion": merged.metadata.resource_version}, "data": {"z": "1"}}
    assert code(core.patch_namespaced_config_map, "settings", "default", stale) == 409


def test_apply_over_http(server: KubeServer, clients: Clients) -> None:
    options = {"field_manager": "me", "_content_type": "application/apply-patch+yaml"}
    made = clients.apps.patch_namespaced_stateful_set("web", "default", stateful_set(), **options)
    assert made.metadata.managed_fields[0].manager == "me"
    mark = server.record.mark()
    again = clients.apps.patch_namespaced_stateful_set("web", "default", stateful_set(), **options)
    assert again.metadata.resource_version == made.metadata.resource_version
    (request,) = server.record.writes(mark)
    assert (request.verb, request.kind, request.name, request.changed) == ("apply", "StatefulSet", "web", False)
    with pytest.raises(ApiException) as caught:
        options["field_manager"] = "you"
        clients.apps.patch_namespaced_stateful_set("web", "default", stateful_set(replicas=9), **options)
    assert caught.value.status == 409 and "FieldManagerConflict" in caught.value.body


def test_generation_counts_changes_of_the_spec_alone(clients: Clients) -> None:
    apps = clients.apps
    assert apps.create_namespaced_stateful_set("default", stateful_set()).metadata.generation == 1
    labelled = apps.patch_namespaced_stateful_set("web", "default", {"metadata": {"labels": {"x": "y"}}})
    assert labelled.metadata.generation == 1
    scaled = apps.patch_namespaced_stateful_set_scale("web", "default", {"spec": {"replicas": 5}})
    assert scaled.spec.replicas == 5
    read = apps.read_namespaced_stateful_set("web", "default")
    assert read.metadata.generation == 2 and read.spec.replicas == 5
    status = {"status": {"replicas": 1}}
    assert apps.patch_namespaced_stateful_set_status("web", "default", status).metadata.generation == 2


def test_a_status_changes_only_through_its_subresource(clients: Clients) -> None:
    apps = clients.apps
    apps.create_namespaced_stateful_set("default", {**stateful_set(), "status": {"replicas": 7}})
    body = {"status": {"replicas": 7}, "spec": {"replicas": 1}}
    read = apps.patch_namespaced_stateful_set("web", "default", body)
    assert (read.spec.replicas, read.status.replicas) == (1, 0)
    read = apps.patch_namespaced_stateful_set_status("web", "default", {**body, "spec": {"replicas": 8}})
    assert (read.spec.replicas, read.status.replicas) == (1, 7)


def test_lists_select_and_page_through_one_snapshot(clients: Clients) -> None:
    core = clients.core
    for i in range(7):
        core.create_namespaced_config_map("default", config_map(f"c{i}", labels={"odd": str(i % 2)}))
    assert len(core.list_namespaced_config_map("default", label_selector="odd=1").items) == 3
    assert len(core.list_namespaced_config_map("default", label_selector="odd notin (1),!even").items) == 4
    assert [
        one.metadata.name for one in core.list_namespaced_config_map("default", field_selector="metadata.name=c3").items
    ] == ["c3"]
    assert core.list_namespaced_config_map("kube-system").items == []
    first = core.list_namespaced_config_map("default", limit=3)
    assert first.metadata.remaining_item_count == 4
    core.create_namespaced_config_map("default", config_map("c9"))
    core.delete_namespaced_config_map("c5", "default")
    rest = core.list_namespaced_config_map("default", limit=9, _continue=first.metadata._continue)
    assert [one.metadata.name for one in rest.items] == ["c3", "c4", "c5", "c6"]
    assert rest.metadata.resource_version == first.metadata.resource_version
    assert code(core.list_namespaced_config_map, "default", label_selector="a=(b") == 400


def test_dry_run_writes_nothing(server: KubeServer, clients: Clients) -> None:
    revision, mark = server.cluster.store.revision, server.record.mark()
    made = clients.apps.create_namespaced_stateful_set("default", stateful_set(), dry_run="All")
    assert made.spec.revision_history_limit == 10
    assert server.cluster.store.revision == revision
    assert server.record.writes(mark) == []
    assert code(clients.apps.read_namespaced_stateful_set, "web", "default") == 404


@pytest.mark.parametrize(
    ("obj", "field"),
    [
        (stateful_set(selector={"matchLabels": {"other": "x"}}), "spec.template.metadata.labels"),
        (stateful_set(name="A_b"), "metadata.name"),
        (service("1st"), "metadata.name"),
        (service(clusterIP="", ports=[]), "spec.ports"),
        (deployment(replicas=-1), "spec.replicas"),
        (pod(labels={"a": "b" * 64}), "metadata.labels"),
        (
            config_map(ownerReferences=[{"apiVersion": "v1", "kind": "Pod", "name": "x"}]),
            "metadata.ownerReferences[0].uid",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_the_field(clients: Clients, obj: Obj, field: str) -> None:
    resource = dynamic.DynamicClient(clients.api).resources.get(api_version=obj["apiVersion"], kind=obj["kind"])
    with pytest.raises(ApiException) as caught:
        resource.create(body=obj, namespace="default")
    assert caught.value.status == 422
    assert field in caught.value.body


def test_what_may_not_change_is_refused(clients: Clients) -> None:
    clients.apps.create_namespaced_stateful_set("default", stateful_set())
    clients.core.create_namespaced_pod("default", pod())
    clients.core.create_namespaced_service("default", service())
    assert code(clients.apps.patch_namespaced_stateful_set, "web", "default", {"spec": {"serviceName": "x"}}) == 422
    assert code(clients.core.patch_namespaced_pod, "one", "default", {"spec": {"hostname": "x"}}) == 422
    assert code(clients.core.patch_namespaced_service, "web", "default", {"spec": {"clusterIP": "10.1.1.1"}}) == 422


def test_delete_checks_preconditions(clients: Clients) -> None:
    made = clients.core.create_namespaced_config_map("default", config_map())
    wrong = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid="other"))
    assert code(clients.core.delete_namespaced_config_map, "settings", "default", body=wrong) == 409
    right = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=made.metadata.uid))
    clients.core.delete_namespaced_config_map("settings", "default", body=right)


def test_finalizers_hold_an_object_until_they_are_gone(clients: Clients) -> None:
    core = clients.core
    core.create_namespaced_config_map("default", config_map(finalizers=["x.io/wait"]))
    core.delete_namespaced_config_map("settings", "default")
    held = core.read_namespaced_config_map("settings", "default")
    assert held.metadata.deletion_timestamp is not None
    add = {"metadata": {"finalizers": ["x.io/wait", "x.io/more"]}}
    assert code(core.patch_namespaced_config_map, "settings", "default", add) == 422
    core.patch_namespaced_config_map("settings", "default", {"metadata": {"finalizers": None}})
    assert code(core.read_namespaced_config_map, "settings", "default") == 404


def test_delete_collection(clients: Clients) -> None:
    for i in range(4):
        clients.core.create_namespaced_config_map("default", config_map(f"c{i}", labels={"odd": str(i % 2)}))
    clients.core.delete_collection_namespaced_config_map("default", label_selector="odd=1")
    assert [one.metadata.name for one in clients.core.list_namespaced_config_map("default").items] == ["c0", "c2"]


def test_discovery_for_the_dynamic_client(server: KubeServer, clients: Clients) -> None:
    server.cluster.create(crd())
    found = dynamic.DynamicClient(clients.api).resources.get(api_version="example.com/v1", kind="Toy")
    assert (found.name, found.namespaced, sorted(found.subresources)) == ("toys", True, ["scale", "status"])
    groups = [group.name for group in client.ApisApi(clients.api).get_api_versions().groups]
    assert {"apps", "policy", "coordination.k8s.io", "example.com"} <= set(groups)
    assert client.VersionApi(clients.api).get_code().minor == "36"


def test_a_crd_serves_its_kind_until_it_is_deleted(clients: Clients) -> None:
    extensions, custom = client.ApiextensionsV1Api(clients.api), clients.custom
    assert code(custom.create_namespaced_custom_object, *GROUP, toy(size=1)) == 404
    made = extensions.create_custom_resource_definition(crd())
    assert {one.type: one.status for one in made.status.conditions}["Established"] == "True"
    obj = custom.create_namespaced_custom_object(*GROUP, {**toy(size=1, sise=2), "status": {"x": 1}})
    assert obj["spec"] == {"size": 1, "color": "red"} and "status" not in obj  # pruned, defaulted
    scale = custom.patch_namespaced_custom_object_scale(*GROUP, "bear", {"spec": {"replicas": 4}})
    assert scale["spec"]["replicas"] == 4
    custom.patch_namespaced_custom_object_status(*GROUP, "bear", {"status": {"size": 3, "selector": "a=b"}})
    scale = custom.get_namespaced_custom_object_scale(*GROUP, "bear")
    assert scale["status"] == {"replicas": 3, "selector": "a=b"}
    assert code(custom.replace_namespaced_custom_object, *GROUP, "bear", toy(size=2)) == 422  # no resourceVersion
    extensions.delete_custom_resource_definition("toys.example.com")
    assert code(custom.list_namespaced_custom_object, *GROUP) == 404


@pytest.mark.parametrize(
    ("spec", "field", "why"),
    [
        ({}, "spec.size", "Required value"),
        ({"size": "1"}, "spec.size", "must be of type integer"),
        ({"size": 10}, "spec.size", "less than or equal to 9"),
        ({"size": -1}, "spec.size", "greater than or equal to 0"),
        ({"size": 1, "color": "green"}, "spec.color", "Unsupported value"),
        ({"size": 1, "code": "A1"}, "spec.code", "should match"),
        ({"size": 1, "code": "toolong"}, "spec.code", "Too long"),
        ({"size": 1, "step": 1.5}, "spec.step", "integer or string"),
        ({"size": 1, "parts": [{"name": "a"}, {"name": "a"}]}, "spec.parts[1]", "Duplicate value"),
        ({"size": 1, "parts": [{}]}, "spec.parts[0].name", "Required value"),
        ({"size": 1, "tags": ["a", "a"]}, "spec.tags[1]", "Duplicate value"),
        ({"size": 1, "limits": {"a": "b"}}, "spec.limits.a", "must be of type integer"),
    ],
)
def test_a_custom_object_is_checked_against_its_schema(
    server: KubeServer, clients: Clients, spec: Obj, field: str, why: str
) -> None:
    server.cluster.create(crd())
    with pytest.raises(ApiException) as caught:
        clients.custom.create_namespaced_custom_object(*GROUP, toy(**spec))
    assert caught.value.status == 422
    assert field in caught.value.body and why in caught.value.body


def test_a_definition_may_restrict_the_names_of_its_objects(server: KubeServer, clients: Clients) -> None:
    definition = crd()
    properties = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    properties["metadata"] = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}}
    server.cluster.create(definition)
    with pytest.raises(ApiException) as caught:
        clients.custom.create_namespaced_custom_object(*GROUP, toy(size=1))
    assert caught.value.status == 422 and "metadata.name" in caught.value.body and "Too long" in caught.value.body


def test_unknown_parts_are_kept_where_the_schema_says_so(server: KubeServer) -> None:
    server.cluster.create(crd())
    free = {"any": [{"thing": 1}]}
    (obj,) = server.cluster.create(toy(size=1, parts=[{"name": "a", "free": free, "bound": 1}]))
    assert obj["spec"]["parts"] == [{"name": "a", "count": 1, "free": free}]


def test_a_token_is_demanded(tmp_path: Path) -> None:
    with KubeServer(Cluster(clock="manual"), token="secret") as server:
        good = connect(server, tmp_path)
        assert good.core.list_namespace().items
        bare = client.CoreV1Api(client.ApiClient(client.Configuration(host=server.url)))
        assert code(bare.list_namespace) == 401


NAMES = st.sampled_from(["a", "b", "c"])
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), NAMES, st.dictionaries(NAMES, NAMES, max_size=2)),
        st.tuples(st.just("patch"), NAMES, st.dictionaries(NAMES, NAMES, max_size=2)),
        st.tuples(st.just("delete"), NAMES, st.just({})),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ACTIONS)
def test_list_and_changes_since_any_revision_make_the_present(actions: list[tuple[str, str, Obj]]) -> None:
    """Revisions only grow, one a write; and the state at any revision, with the changes after it, is the state now."""
    cluster = Cluster(clock="manual")
    resource, start = ("", "configmaps"), cluster.store.revision
    for action, name, data in actions:
        before = cluster.store.revision
        exists = cluster.store.get(resource, "default", name) is not None
        if action == "apply":
            cluster.api.apply("ConfigMap", "default", name, config_map(name, data), manager="me", force=True)
        elif exists and action == "patch":
            cluster.api.patch("ConfigMap", "default", name, {"data": data})
        elif exists:
            cluster.api.delete("ConfigMap", "default", name)
        assert cluster.store.revision - before in (0, 1)
    now = {obj["metadata"]["name"]: obj for obj in cluster.objects("ConfigMap", "default")}
    for revision in range(start, cluster.store.revision + 1):
        state = {
            one["metadata"]["name"]: one for one in cluster.api.list("ConfigMap", "default", revision=revision).items
        }
        versions = [int(one["metadata"]["resourceVersion"]) for one in state.values()]
        assert all(version <= revision for version in versions)
        for change in cluster.store.since(resource, revision):
            assert change.revision > revision and change.obj["metadata"]["resourceVersion"] == str(change.revision)
            if change.type == "DELETED":
                del state[change.key[1]]
            else:
                assert (change.key[1] in state) == (change.type == "MODIFIED")
                state[change.key[1]] = change.obj
        assert state == now
