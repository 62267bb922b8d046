"""Statuses and events: few writes, and nothing that a person would miss."""

from __future__ import annotations

import pytest
from driver import DirectApi, Driver, refuse
from kube_world import group, role

from diptych.group.operator.events import MAX_KNOWN, MAX_MESSAGE, QUIET_S, Events
from diptych.group.operator.resources import Json
from diptych.testing.kube import Behaviour, Cluster


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def subject(name: str = "g") -> Json:
    metadata = {"namespace": "default", "name": name, "uid": f"u-{name}"}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}


def test_an_event_that_repeats_is_counted_not_written_anew() -> None:
    cluster, clock = Cluster(clock="manual"), Clock()
    events = Events(DirectApi(cluster), "test", clock)  # type: ignore[arg-type]
    for _ in range(5):
        events.tell(subject(), "Warning", "Reason", "x" * 2 * MAX_MESSAGE)
    (event,) = cluster.objects("Event")
    assert event["count"] == 1 and event["type"] == "Warning" and len(event["message"]) == MAX_MESSAGE
    assert event["involvedObject"]["uid"] == "u-g"
    clock.now += QUIET_S
    events.tell(subject(), "Warning", "Reason", "x" * 2 * MAX_MESSAGE)
    (event,) = cluster.objects("Event")
    assert event["count"] == 6
    events.tell(subject(), "Warning", "Reason", "something else")
    assert len(cluster.objects("Event")) == 2


def test_memory_of_events_is_bounded_and_a_failure_to_write_one_is_no_failure() -> None:
    api = DirectApi(Cluster(clock="manual"))
    api.down = True
    events = Events(api, "test", Clock())  # type: ignore[arg-type]
    for i in range(MAX_KNOWN + 100):
        events.tell(subject(), "Normal", "Reason", str(i))
    assert len(vars(events)["_known"]) == MAX_KNOWN


def test_pods_that_become_ready_one_after_the_other_are_few_writes() -> None:
    driver = Driver()
    for index in range(10):
        driver.cluster.pods.rule(name=f"g-a-{index}", ready_s=3.0 + index * 0.2)
    driver.create(group("g", role("a", 10)))
    driver.run(2.5)
    condition = driver.conditions("g")["Ready"]
    assert (condition["status"], "a has 0 of 10 replicas ready" in condition["message"]) == ("False", True)
    driver.run(10, tick_s=0.1)
    assert driver.ready("g")
    statuses = [name for verb, kind, name in driver.api.writes if (verb, kind) == ("apply", "RoleBasedGroup")]
    assert len(statuses) <= 3


@pytest.mark.parametrize("first", ["ConfigMap", ""])
def test_a_status_that_is_refused_is_told_and_hides_nothing(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    driver = Driver()
    refuse(driver, monkeypatch, "RoleBasedGroup")  # of which only the status is ever applied
    if first:
        refuse(driver, monkeypatch, first)
    driver.create(group("g", role("a")))
    driver.run(5)
    told = driver.events("FailedReconcile")
    assert any("quota of RoleBasedGroup" in each for each in told)
    assert all(f"quota of {first}" in each for each in told)


def test_a_group_that_is_no_longer_ready_says_so_at_once() -> None:
    driver = Driver()
    driver.create(group("g", role("a", 2)))
    driver.run(5)
    since = driver.conditions("g")["Ready"]["lastTransitionTime"]
    driver.cluster.pods.behaviour = Behaviour(ready_s=60.0)
    driver.cluster.pods.set_ready("g-a-0", False)
    driver.settle()
    condition = driver.conditions("g")["Ready"]
    assert condition["status"] == "False" and "g-a-0" in condition["message"]
    assert condition["lastTransitionTime"] > since
    assert driver.read("RoleBasedGroup", "g")["status"]["roleStatuses"] == [
        {"name": "a", "replicas": 2, "readyReplicas": 1, "updatedReplicas": 2}
    ]
