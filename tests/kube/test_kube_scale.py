"""A cluster as large as the operator's largest test, and one that moves by itself."""

from __future__ import annotations

import threading
from pathlib import Path

from kube_clients import connect
from kube_objects import service, stateful_set
from kubernetes import watch

from diptych.testing.kube import Behaviour, Cluster, KubeServer


def test_a_thousand_groups_of_three_roles_fit() -> None:
    cluster = Cluster(clock="manual")
    for group in range(1000):
        for role in range(3):
            name = f"g{group}-r{role}"
            body = stateful_set(name, replicas=1)
            cluster.api.apply("StatefulSet", "default", name, body, manager="me", force=True)
            cluster.api.apply("Service", "default", name, service(name), manager="me", force=True)
    cluster.settle()
    assert sum(one["status"]["readyReplicas"] for one in cluster.objects("StatefulSet")) == 3000
    page = cluster.api.list("Pod", "default", limit=500)
    assert (len(page.items), page.remaining) == (500, 2500)


def test_on_the_real_clock_controllers_act_by_themselves(live: KubeServer, tmp_path: Path) -> None:
    clients = connect(live, tmp_path)
    live.cluster.pods.behaviour = Behaviour(scheduled_s=0.01, running_s=0.01, ready_s=0.02)
    clients.apps.create_namespaced_stateful_set("default", stateful_set())
    ready = []
    for event in watch.Watch().stream(clients.apps.list_namespaced_stateful_set, "default", timeout_seconds=60):
        ready.append(event["object"].status.ready_replicas or 0)
        if ready[-1] == 3:
            break
    assert ready[-1] == 3
    clients.api.close()


def test_an_outage_of_some_seconds_ends_by_itself(live: KubeServer, tmp_path: Path) -> None:
    clients = connect(live, tmp_path)
    over = threading.Event()
    end = live.faults.end_outage

    def ended() -> None:
        end()
        over.set()

    live.faults.end_outage = ended  # type: ignore[method-assign]
    live.faults.outage(0.05)
    assert over.wait(30)
    assert clients.core.list_namespace().items
    clients.api.close()


def test_requests_of_many_threads_do_not_mix(live: KubeServer, tmp_path: Path) -> None:
    """Twenty appliers of one field each: every field is there, every revision was given once."""
    clients = connect(live, tmp_path)
    revisions: list[int] = []

    def write(number: int) -> None:
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {f"k{number}": "1"}}
        options = {"field_manager": f"m{number}", "_content_type": "application/apply-patch+yaml"}
        obj = clients.core.patch_namespaced_config_map("c", "default", body, **options)
        revisions.append(int(obj.metadata.resource_version))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(revisions)) == 20
    data = clients.core.read_namespaced_config_map("c", "default").data
    assert data == {f"k{number}": "1" for number in range(20)}
    clients.api.close()
