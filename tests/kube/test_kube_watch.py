"""Watches over HTTP, and what goes wrong with them and with requests."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from kube_clients import Clients, connect
from kube_objects import Obj, config_map, crd, stateful_set, toy
from kubernetes import client, watch
from kubernetes.client import ApiException
from urllib3.exceptions import HTTPError

from diptych.testing.kube import Cluster, KubeServer

WAIT_S = 30


class Follower:
    """A watch in a thread of its own; its events can be waited for."""

    def __init__(self, call: Any, **options: Any) -> None:
        self.events: list[tuple[str, Obj]] = []
        self.error: Exception | None = None
        self._news = threading.Condition()
        self._over = False
        self._watch = watch.Watch()
        options = {"timeout_seconds": WAIT_S, **options}
        self._thread = threading.Thread(target=self._run, args=(call, options), daemon=True)
        self._thread.start()

    def _run(self, call: Any, options: Obj) -> None:
        try:
            for event in self._watch.stream(call, "default", **options):
                with self._news:
                    self.events.append((event["type"], event["raw_object"]))
                    self._news.notify_all()
        except (ApiException, HTTPError) as error:
            self.error = error
        with self._news:
            self._over = True
            self._news.notify_all()

    def until(self, count: int) -> list[tuple[str, str]]:
        """(type, name) of all events, once there are so many."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.events) >= count, WAIT_S), self.events
            return [(kind, obj["metadata"].get("name", "")) for kind, obj in self.events]

    def over(self) -> bool:
        with self._news:
            return self._news.wait_for(lambda: self._over, WAIT_S)


@pytest.fixture
def core(clients: Clients) -> client.CoreV1Api:
    return clients.core


def test_a_watch_continues_where_a_list_ended(core: client.CoreV1Api) -> None:
    core.create_namespaced_config_map("default", config_map("a"))
    listed = core.list_namespaced_config_map("default")
    core.create_namespaced_config_map("default", config_map("b"))
    follower = Follower(core.list_namespaced_config_map, resource_version=listed.metadata.resource_version)
    core.patch_namespaced_config_map("a", "default", {"data": {"x": "1"}})
    core.delete_namespaced_config_map("b", "default")
    assert follower.until(3) == [("ADDED", "b"), ("MODIFIED", "a"), ("DELETED", "b")]
    versions = [int(obj["metadata"]["resourceVersion"]) for _, obj in follower.events]
    assert versions == sorted(set(versions)) and versions[0] > int(listed.metadata.resource_version)


def test_a_watch_without_a_version_starts_with_what_is_there(core: client.CoreV1Api) -> None:
    core.create_namespaced_config_map("default", config_map("a"))
    core.create_namespaced_config_map("kube-system", config_map("elsewhere"))
    follower = Follower(core.list_namespaced_config_map)
    assert follower.until(1) == [("ADDED", "a")]
    core.create_namespaced_config_map("default", config_map("b"))
    assert follower.until(2) == [("ADDED", "a"), ("ADDED", "b")]


def test_a_selector_makes_objects_come_and_go(core: client.CoreV1Api) -> None:
    start = core.list_namespaced_config_map("default").metadata.resource_version
    follower = Follower(core.list_namespaced_config_map, label_selector="on=yes", resource_version=start)
    core.create_namespaced_config_map("default", config_map("a"))
    core.patch_namespaced_config_map("a", "default", {"metadata": {"labels": {"on": "yes"}}})
    core.patch_namespaced_config_map("a", "default", {"data": {"x": "1"}})
    core.patch_namespaced_config_map("a", "default", {"metadata": {"labels": {"on": "no"}}})
    assert follower.until(3) == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]


def test_too_old_a_version_gets_410(server: KubeServer, core: client.CoreV1Api) -> None:
    old = core.list_namespaced_config_map("default").metadata.resource_version
    core.create_namespaced_config_map("default", config_map("a"))
    server.faults.forget_history()
    with pytest.raises(ApiException) as caught:
        for _ in watch.Watch().stream(
            core.list_namespaced_config_map, "default", resource_version=old, timeout_seconds=5
        ):
            pass
    assert caught.value.status == 410 and str(caught.value.reason).startswith("Expired")


def test_history_beyond_its_length_is_forgotten(tmp_path: Path) -> None:
    with KubeServer(Cluster(clock="manual", history=3)) as server:
        core = connect(server, tmp_path).core
        old = core.list_namespaced_config_map("default").metadata.resource_version
        for i in range(4):
            core.create_namespaced_config_map("default", config_map(f"c{i}"))
        follower = Follower(core.list_namespaced_config_map, resource_version=old)
        assert follower.over()
        assert isinstance(follower.error, ApiException) and follower.error.status == 410
        follower = Follower(core.list_namespaced_config_map, resource_version=str(int(old) + 1))
        assert follower.until(3) == [("ADDED", f"c{i}") for i in (1, 2, 3)]


def test_bookmarks_tell_how_far_a_watch_is(tmp_path: Path) -> None:
    with KubeServer(Cluster(clock="manual"), bookmark_s=0.01) as server:
        core = connect(server, tmp_path).core
        core.create_namespaced_secret("default", {"metadata": {"name": "other"}})
        revision = server.cluster.store.revision
        follower = Follower(core.list_namespaced_config_map, allow_watch_bookmarks=True)
        follower.until(1)
        kind, obj = follower.events[0]
        assert (kind, obj["kind"], obj["metadata"]) == ("BOOKMARK", "ConfigMap", {"resourceVersion": str(revision)})


def test_a_watch_ends_when_its_time_is_over(core: client.CoreV1Api) -> None:
    follower = Follower(core.list_namespaced_config_map, timeout_seconds=1)
    assert follower.over() and follower.error is None


def test_dropped_watches_end(server: KubeServer, core: client.CoreV1Api) -> None:
    core.create_namespaced_config_map("default", config_map("a"))
    follower = Follower(core.list_namespaced_config_map)
    follower.until(1)
    server.faults.drop_watches()
    assert follower.over()
    core.create_namespaced_config_map("default", config_map("b"))
    assert follower.until(1) == [("ADDED", "a")]


def test_lost_events_reach_nobody_but_the_objects_are_there(server: KubeServer, core: client.CoreV1Api) -> None:
    core.create_namespaced_config_map("default", config_map("zero"))
    follower = Follower(core.list_namespaced_config_map)
    follower.until(1)
    server.faults.lose_events(2, kind="ConfigMap")
    for name in ("a", "b", "c"):
        core.create_namespaced_config_map("default", config_map(name))
    assert follower.until(2) == [("ADDED", "zero"), ("ADDED", "c")]
    assert len(core.list_namespaced_config_map("default").items) == 4
    assert server.faults.left() == 0


def status_of(call: Any, *args: Any) -> tuple[int, Any]:
    with pytest.raises(ApiException) as caught:
        call(*args)
    return int(caught.value.status), caught.value.headers


def test_answers_to_order(server: KubeServer, core: client.CoreV1Api) -> None:
    server.faults.answer(429, times=1, retry_after_s=3, verb="write", kind="ConfigMap")
    assert core.list_namespaced_config_map("default").items == []  # a read is not meant
    code, headers = status_of(core.create_namespaced_config_map, "default", config_map("a"))
    assert (code, headers["Retry-After"]) == (429, "3")
    core.create_namespaced_config_map("default", config_map("a"))
    server.faults.answer(500, times=2, verb="get")
    assert [status_of(core.read_namespaced_config_map, "a", "default")[0] for _ in range(2)] == [500, 500]
    assert core.read_namespaced_config_map("a", "default").metadata.name == "a"
    server.faults.forbid("delete", "ConfigMap")
    assert status_of(core.delete_namespaced_config_map, "a", "default")[0] == 403
    server.faults.clear()
    core.delete_namespaced_config_map("a", "default")


def test_a_reset_comes_before_the_write_and_a_lost_answer_after(server: KubeServer, core: client.CoreV1Api) -> None:
    server.faults.reset(verb="create")
    with pytest.raises(HTTPError):
        core.create_namespaced_config_map("default", config_map("a"))
    assert core.list_namespaced_config_map("default").items == []
    server.faults.lose_answer(verb="create")
    with pytest.raises(HTTPError):
        core.create_namespaced_config_map("default", config_map("a"))
    assert [one.metadata.name for one in core.list_namespaced_config_map("default").items] == ["a"]


def test_an_outage_ends_watches_and_refuses_requests(server: KubeServer, core: client.CoreV1Api) -> None:
    core.create_namespaced_config_map("default", config_map("a"))
    follower = Follower(core.list_namespaced_config_map)
    follower.until(1)
    with server.faults.unreachable():
        assert follower.over()
        with pytest.raises(HTTPError):
            core.list_namespaced_config_map("default")
    assert len(core.list_namespaced_config_map("default").items) == 1


def test_a_lease_can_be_stolen(server: KubeServer, clients: Clients) -> None:
    leases = client.CoordinationV1Api(clients.api)
    body = {"metadata": {"name": "leader"}, "spec": {"holderIdentity": "me", "leaseDurationSeconds": 15}}
    mine = leases.create_namespaced_lease("default", body)
    server.faults.steal_lease("leader")
    stolen = leases.read_namespaced_lease("leader", "default")
    assert (stolen.spec.holder_identity, stolen.spec.lease_transitions) == ("thief", 1)
    mine.spec.renew_time = stolen.spec.renew_time
    assert status_of(leases.replace_namespaced_lease, "leader", "default", mine)[0] == 409


def test_writes_are_counted_from_a_mark(server: KubeServer, clients: Clients) -> None:
    server.cluster.create(crd())
    clients.core.create_namespaced_config_map("default", config_map("before"))
    mark = server.record.mark()
    clients.core.create_namespaced_config_map("default", config_map("a"))
    clients.core.list_namespaced_config_map("default")
    clients.custom.create_namespaced_custom_object("example.com", "v1", "default", "toys", toy(size=1))
    status_of(clients.core.create_namespaced_config_map, "default", config_map("a"))
    clients.apps.create_namespaced_stateful_set("default", stateful_set())
    clients.apps.patch_namespaced_stateful_set_status("web", "default", {"status": {"replicas": 1}})
    writes = [(one.verb, one.kind, one.name, one.subresource) for one in server.record.writes(mark)]
    assert writes == [
        ("create", "ConfigMap", "a", ""),
        ("create", "Toy", "bear", ""),
        ("create", "StatefulSet", "web", ""),
        ("patch", "StatefulSet", "web", "status"),
    ]
    assert [one.code for one in server.record.requests(mark, kind="ConfigMap")] == [201, 200, 409]


async def test_the_server_works_within_a_loop() -> None:
    async with KubeServer(Cluster(clock="manual")) as server:
        assert server.url.startswith("http://127.0.0.1:")
