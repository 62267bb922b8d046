"""What an API server and the network do to an operator: watches that end, answers that are lost, refusals, outages."""

from __future__ import annotations

import errno
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from kube_world import NAMESPACE, World, group, role, until
from kubernetes.client import Configuration

from diptych.errors import NotFound, Overloaded, Unavailable
from diptych.group.operator.api import Api, ApiError, Conflict, Forbidden, Gone
from diptych.group.operator.cache import MAX_DELETED, Cache
from diptych.group.operator.informer import Informer
from diptych.group.operator.metrics import Metrics
from diptych.group.operator.resources import CONFIG_MAP, GROUP, LEADER_WORKER_SET, PROFILE, SERVICE, Json, Kind


def config_map(name: str, **data: str) -> Json:
    return {"metadata": {"namespace": NAMESPACE, "name": name}, "data": data}


# ---- calls -------------------------------------------------------------------------------------------------------


def test_the_servers_refusals_are_errors_that_say_what_to_do(world: World) -> None:
    api = world.api
    with pytest.raises(NotFound, match="not found"):
        api.get(CONFIG_MAP, NAMESPACE, "none")
    made = api.create(CONFIG_MAP, config_map("c", a="1"))
    with pytest.raises(Conflict):
        api.create(CONFIG_MAP, config_map("c"))
    api.merge(CONFIG_MAP, NAMESPACE, "c", {"data": {"a": "2"}})
    with pytest.raises(Conflict):
        api.replace(CONFIG_MAP, made)
    with pytest.raises(ApiError, match="spec"):
        api.apply(GROUP, {"metadata": {"namespace": NAMESPACE, "name": "g"}, "spec": {"roles": []}})
    twice = {"clusterIP": "None", "ports": [{"port": 1}, {"port": 1}]}
    with pytest.raises(ApiError, match=r"500 failed to create typed patch object.*duplicate entries"):
        api.apply(SERVICE, {"metadata": {"namespace": NAMESPACE, "name": "s"}, "spec": twice})
    assert api.delete(CONFIG_MAP, NAMESPACE, "c", "another-uid") is None
    assert api.delete(CONFIG_MAP, NAMESPACE, "c", made["metadata"]["uid"]) is not None
    world.server.faults.answer(429, retry_after_s=7)
    with pytest.raises(Overloaded) as caught:
        api.get(CONFIG_MAP, NAMESPACE, "c")
    assert caught.value.retry_after_s == 7
    world.server.faults.answer(500)
    with pytest.raises(Unavailable, match="500"):
        api.get(CONFIG_MAP, NAMESPACE, "c")
    world.server.faults.reset()
    with pytest.raises(Unavailable):
        api.get(CONFIG_MAP, NAMESPACE, "c")
    world.server.faults.forbid(verb="get", kind="ConfigMap")
    with pytest.raises(Forbidden):
        api.get(CONFIG_MAP, NAMESPACE, "c")
    world.server.faults.clear()
    world.server.faults.delay(5.0)
    with pytest.raises(Unavailable):
        api.within(0.2).get(CONFIG_MAP, NAMESPACE, "c")


@pytest.mark.parametrize(("listens", "words"), [(False, os.strerror(errno.ECONNREFUSED)), (True, "timed out")])
def test_that_the_server_is_away_is_said_in_words(listens: bool, words: str) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        if listens:
            sock.listen()
        configuration = Configuration(host=f"http://127.0.0.1:{sock.getsockname()[1]}")
        api = Api(configuration, Metrics()).within(0.2)
        with pytest.raises(Unavailable) as caught:
            api.get(CONFIG_MAP, NAMESPACE, "c")
        api.close()
    assert caught.value.message == f"the API server does not answer: {words}"


def test_long_lists_come_in_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.group.operator.api.PAGE", 3)
    world.create(*({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"c{i}"}} for i in range(8)))
    items, version = world.api.list(CONFIG_MAP, NAMESPACE)
    assert [each["metadata"]["name"] for each in items] == [f"c{i}" for i in range(8)]
    assert int(version) > 0


def test_watches_from_the_past_are_gone(world: World) -> None:
    version = world.api.list(CONFIG_MAP, NAMESPACE)[1]
    world.api.create(CONFIG_MAP, config_map("c"))
    world.server.faults.forget_history()
    with pytest.raises(Gone):
        list(world.api.watch(CONFIG_MAP, NAMESPACE, "", version, 5))


BROKEN = {
    "text": b"<html>a proxy's page</html>\n",
    "list": b"[1, 2]\n",
    "half": b'{"items": [\n',
    "empty": b"",
}


class Nonsense(BaseHTTPRequestHandler):
    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_nonsense_is_no_answer(kind: str) -> None:
    handler = type("Handler", (Nonsense,), {"body": BROKEN[kind]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        configuration = Configuration()
        configuration.host = f"http://127.0.0.1:{server.server_address[1]}"
        api = Api(configuration, Metrics())
        with pytest.raises(Unavailable):
            api.get(CONFIG_MAP, NAMESPACE, "c")
        if kind != "empty":
            with pytest.raises(Unavailable):
                list(api.watch(CONFIG_MAP, NAMESPACE, "", "1", 5))
        api.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ---- the cache ---------------------------------------------------------------------------------------------------


def seen(version: int, name: str = "c", **metadata: Any) -> Json:
    return {"metadata": {"namespace": "n", "name": name, "resourceVersion": str(version), **metadata}}


def test_what_comes_late_is_ignored() -> None:
    changes: list[str] = []
    cache = Cache(CONFIG_MAP, lambda obj: changes.append(obj["metadata"]["resourceVersion"]))
    cache.put(seen(5))
    cache.put(seen(3))  # the watch shows what was before our write
    cache.put(seen(5))
    assert (cache.get("n", "c") or {})["metadata"]["resourceVersion"] == "5" and changes == ["5"]
    cache.drop(("n", "c"), "7")
    cache.put(seen(6))  # the answer to a write that came before the end
    assert cache.get("n", "c") is None
    cache.put(seen(8))
    cache.drop(("n", "c"), "7")  # the end of the one before
    assert cache.has("n", "c")


def test_a_list_puts_everything_right_but_what_is_later_than_it() -> None:
    cache = Cache(CONFIG_MAP, lambda obj: None)
    owner = {"uid": "u", "controller": True}
    cache.put(seen(5, "gone", ownerReferences=[owner]))
    cache.put(seen(90, "restored"))
    cache.begin_list()
    cache.put(seen(12, "made"))  # while the list is on its way
    cache.drop(("n", "ended"), "13")
    cache.replace([seen(10, "restored"), seen(9, "ended"), seen(4, "new", ownerReferences=[owner])], "11")
    assert sorted(cache.all_keys()) == [("n", "made"), ("n", "new"), ("n", "restored")]
    assert (cache.get("n", "restored") or {})["metadata"]["resourceVersion"] == "10"
    assert [each["metadata"]["name"] for each in cache.owned("u")] == ["new"]


def test_memory_of_the_deleted_is_bounded() -> None:
    cache = Cache(CONFIG_MAP, lambda obj: None)
    for i in range(2 * MAX_DELETED):
        cache.put(seen(2 * i, f"c{i}"))
        cache.drop(("n", f"c{i}"), str(2 * i + 1))
    assert len(vars(cache)["_deleted"]) == MAX_DELETED
    assert not any(vars(cache)[each] for each in ("_objects", "_versions"))


# ---- the informer ------------------------------------------------------------------------------------------------


class Followed:
    """An informer of one kind and its cache."""

    def __init__(self, world: World, kind: Kind, **options: Any) -> None:
        self.api = Api(world.configuration(), Metrics())
        self.cache = Cache(kind, lambda obj: None)
        self.informer = Informer(self.api, self.cache, NAMESPACE if kind.namespaced else "", "", Metrics(), **options)
        self.informer.start()

    def names(self) -> set[str]:
        return {name for _, name in self.cache.all_keys()}

    def close(self) -> None:
        self.informer.stop()
        self.informer.join(10)
        self.api.close()


@pytest.fixture
def followed(world: World) -> Any:
    made = Followed(world, CONFIG_MAP)
    until(made.informer.synced.is_set, "a first list")
    yield made
    made.close()


@pytest.mark.parametrize("how", ["drop", "gone", "outage", "errors", "throttled"])
def test_changes_during_a_disturbance_are_seen_after_it(world: World, followed: Followed, how: str) -> None:
    world.api.create(CONFIG_MAP, config_map("old"))
    until(lambda: followed.names() == {"old"}, "it is seen")
    faults = world.server.faults
    if how == "errors":
        faults.answer(500, times=3, verb="watch", kind="ConfigMap")
    elif how == "throttled":
        faults.answer(429, times=2, verb="watch", kind="ConfigMap")
    faults.begin_outage()
    world.cluster.api.delete("ConfigMap", NAMESPACE, "old")
    world.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "new"}})
    if how == "gone":
        faults.forget_history()
    faults.end_outage()
    until(lambda: followed.names() == {"new"}, "the copy is right again")
    assert faults.left() == 0


def test_kinds_that_the_cluster_lacks_or_forbids_are_done_without(tmp_path: Path) -> None:
    world = World(tmp_path, without=["leaderworkerset.x-k8s.io"])
    world.server.faults.forbid(kind="ClusterEngineRuntimeProfile")
    try:
        for kind in (LEADER_WORKER_SET, PROFILE):
            made = Followed(world, kind, optional=True)
            until(made.informer.synced.is_set, "it goes on without")
            made.close()
        world.start()
        world.create(group("g", role("a")))
        world.wait_ready("g")
    finally:
        world.close()


# ---- the operator ------------------------------------------------------------------------------------------------


def test_lost_answers_and_refused_writes_are_made_good(world: World) -> None:
    faults = world.server.faults
    faults.lose_answer(times=2, verb="apply", kind="StatefulSet")
    faults.answer(500, verb="apply", kind="Service")
    faults.answer(429, verb="apply", kind="ConfigMap", retry_after_s=0)
    faults.reset(verb="apply", kind="RoleBasedGroup")
    world.start()
    world.create(group("g", role("a", 2), role("b", dependencies=["a"])))
    world.wait_ready("g")
    assert faults.left() == 0 and len(world.pods()) == 3
    assert world.quiet() == []


def test_what_happens_while_the_server_is_away_is_put_right(world: World) -> None:
    world.start()
    world.create(group("g", role("a", 2)))
    world.wait_ready("g")
    with world.server.faults.unreachable():
        world.cluster.api.delete("StatefulSet", NAMESPACE, "g-a")
        world.cluster.api.delete("Service", NAMESPACE, "g-a")
        world.cluster.on_work()
    until(lambda: world.names("StatefulSet") == world.names("Service") == ["g-a"], "both are there")
    until(lambda: len(world.pods()) == 2, "two pods")
    world.wait_ready("g")


def test_watches_that_end_in_the_middle_of_an_update(world: World) -> None:
    world.start()
    world.create(group("g", role("a", 4)))
    world.wait_ready("g")
    world.edit("g", lambda each: each["spec"]["roles"][0]["template"]["spec"]["containers"][0].update(image="engine:2"))
    for _ in range(5):
        world.server.faults.drop_watches()
        world.server.faults.forget_history()
    until(
        lambda: [each["spec"]["containers"][0]["image"] for each in world.pods().values()] == ["engine:2"] * 4,
        "all are new",
    )
    world.wait_ready("g")
