"""Garbage collection by owner references, and namespaces."""

from __future__ import annotations

import pytest
from kube_objects import Obj, config_map, stateful_set

from diptych.testing.kube import ApiError, Cluster, Deleting


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(clock="manual")


def owner(obj: Obj, **fields: bool) -> Obj:
    metadata = obj["metadata"]
    return {"apiVersion": "v1", "kind": "ConfigMap", "name": metadata["name"], "uid": metadata["uid"], **fields}


def names(cluster: Cluster, kind: str = "ConfigMap") -> list[str]:
    return [one["metadata"]["name"] for one in cluster.objects(kind)]


def family(cluster: Cluster, **fields: bool) -> None:
    """a owns b owns c."""
    for name, parent in (("a", ""), ("b", "a"), ("c", "b")):
        found = [owner(cluster.api.get("ConfigMap", "default", parent), **fields)] if parent else []
        cluster.create(config_map(name, ownerReferences=found))
    cluster.settle()


def test_children_go_after_their_owner(cluster: Cluster) -> None:
    family(cluster)
    cluster.api.delete("ConfigMap", "default", "a")
    assert names(cluster) == ["b", "c"]
    cluster.settle()
    assert names(cluster) == []


def test_in_the_foreground_children_go_first(cluster: Cluster) -> None:
    family(cluster, blockOwnerDeletion=True)
    cluster.api.patch("ConfigMap", "default", "c", {"metadata": {"finalizers": ["x.io/wait"]}})
    left = cluster.api.delete("ConfigMap", "default", "a", Deleting(policy="Foreground"))
    assert left["metadata"]["finalizers"] == ["foregroundDeletion"]
    cluster.settle()
    assert names(cluster) == ["a", "b", "c"]
    assert all("deletionTimestamp" in one["metadata"] for one in cluster.objects("ConfigMap"))
    cluster.api.patch("ConfigMap", "default", "c", {"metadata": {"finalizers": None}})
    cluster.settle()
    assert names(cluster) == []


def test_a_child_that_does_not_block_is_not_waited_for(cluster: Cluster) -> None:
    family(cluster)
    cluster.api.patch("ConfigMap", "default", "b", {"metadata": {"finalizers": ["x.io/wait"]}})
    cluster.api.delete("ConfigMap", "default", "a", Deleting(policy="Foreground"))
    cluster.settle()
    assert names(cluster) == ["b"]


def test_orphans_stay_without_the_reference(cluster: Cluster) -> None:
    family(cluster)
    cluster.api.delete("ConfigMap", "default", "a", Deleting(policy="Orphan"))
    cluster.settle()
    assert names(cluster) == ["b", "c"]
    assert "ownerReferences" not in cluster.api.get("ConfigMap", "default", "b")["metadata"]


def test_one_living_owner_is_enough(cluster: Cluster) -> None:
    one, two = cluster.create(config_map("one"), config_map("two"))
    cluster.create(config_map("child", ownerReferences=[owner(one), owner(two)]))
    cluster.api.delete("ConfigMap", "default", "one")
    cluster.settle()
    assert [ref["name"] for ref in cluster.api.get("ConfigMap", "default", "child")["metadata"]["ownerReferences"]] == [
        "two"
    ]
    cluster.api.delete("ConfigMap", "default", "two")
    cluster.settle()
    assert names(cluster) == []


def test_an_owner_that_never_was_is_gone(cluster: Cluster) -> None:
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "no-such"}
    cluster.create(config_map("child", ownerReferences=[reference]))
    cluster.settle()
    assert names(cluster) == []


def test_an_owner_of_the_same_name_is_another(cluster: Cluster) -> None:
    cluster.create(stateful_set())
    cluster.settle()
    before = {one["metadata"]["name"]: one["metadata"]["uid"] for one in cluster.objects("Pod")}
    cluster.api.delete("StatefulSet", "default", "web")
    cluster.create(stateful_set())
    cluster.settle()
    after = {one["metadata"]["name"]: one["metadata"]["uid"] for one in cluster.objects("Pod")}
    assert before.keys() == after.keys() and not set(before.values()) & set(after.values())


def test_a_namespace_takes_its_content_along(cluster: Cluster) -> None:
    cluster.namespace("team")
    cluster.create(stateful_set(), namespace="team")
    cluster.settle()
    cluster.api.delete("Namespace", "", "team")
    with pytest.raises(ApiError) as caught:
        cluster.create(config_map(), namespace="team")
    assert caught.value.code == 403 and "being terminated" in caught.value.message
    cluster.advance(60)
    assert cluster.objects("Pod") == cluster.objects("StatefulSet") == []
    assert "team" not in names(cluster, "Namespace")
