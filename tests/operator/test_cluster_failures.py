"""Failures, evictions, ends and changes of the leader, on any cluster (see cluster_place)."""

from __future__ import annotations

import pytest
from cluster_place import Place, role
from driver import is_pod_ready

from diptych.group.operator.resources import GROUP, LEASE, POD, STATEFUL_SET, Json


def conditions(place: Place, name: str) -> dict[str, str]:
    status = place.read(GROUP, name).get("status") or {}
    return {each["type"]: each["status"] for each in status.get("conditions") or []}


def test_a_failed_pod_is_replaced_and_no_other(place: Place) -> None:
    place.create("g", role("a", 2), role("b"))
    place.wait_ready("g")
    before = place.uids("g")
    place.change_status("g-a-1", lambda status: status.update(phase="Failed", reason="Evicted"))
    place.until(lambda: place.uids("g").get("g-a-1", before["g-a-1"]) != before["g-a-1"], "a new g-a-1")
    place.wait_ready("g")
    after = place.uids("g")
    assert {name for name in before if before[name] != after.get(name)} == {"g-a-1"} and after.keys() == before.keys()


def test_the_group_restarts_as_one(place: Place) -> None:
    place.create("g", role("a", 2, restartPolicy="RecreateRBGOnPodRestart"), role("b"))
    place.wait_ready("g")
    before = place.uids("g")
    place.delete(POD, "g-a-0")  # on purpose: that pod alone is renewed
    place.until(lambda: place.uids("g").get("g-a-0", before["g-a-0"]) != before["g-a-0"], "a new g-a-0")
    place.wait_ready("g")
    renewed = place.uids("g")
    assert {name for name in before if before[name] != renewed.get(name)} == {"g-a-0"}
    place.crash("g-a-1")
    place.until(lambda: not renewed.items() & place.uids("g").items(), "no pod of those")
    place.until(lambda: place.uids("g").keys() == renewed.keys(), "all pods again")
    place.wait_ready("g")
    place.until(lambda: conditions(place, "g")["RestartInProgress"] == "False", "the restart has ended")


@pytest.mark.parametrize("policy", ["None", "RecreateRoleInstanceOnPodRestart"])
def test_a_restarted_pod_is_recreated_where_that_is_wanted(place: Place, policy: str) -> None:
    place.create("g", role("a", 2, restartPolicy=policy), role("b"))
    place.wait_ready("g")
    before = place.uids("g")
    place.crash("g-a-1")
    if policy == "None":
        place.edit("g", lambda obj: obj["spec"]["roles"][1].update(replicas=2))  # what comes after the restart
        place.until(lambda: "g-b-1" in place.uids("g"), "a second b")
    else:
        place.until(lambda: place.uids("g").get("g-a-1", before["g-a-1"]) != before["g-a-1"], "a new g-a-1")
    place.wait_ready("g")
    after = place.uids("g")
    renewed = {name for name in before if before[name] != after.get(name)}
    assert renewed == (set() if policy == "None" else {"g-a-1"})


def test_evictions_keep_to_the_budget(place: Place) -> None:
    """What `kubectl drain` does."""
    place.create("g", role("a", 2, gate=True, podDisruptionBudget={"maxUnavailable": 1}))
    place.open("g-a-0", "g-a-1")
    place.wait_ready("g")
    before = place.uids("g")
    place.until(lambda: place.evict("g-a-0") == 201, "an eviction")
    place.until(lambda: place.uids("g").get("g-a-0", before["g-a-0"]) != before["g-a-0"], "a new g-a-0")
    assert place.evict("g-a-1") == 429  # the other is not ready
    assert place.uids("g")["g-a-1"] == before["g-a-1"]
    place.open("g-a-0")
    place.until(lambda: place.evict("g-a-1") == 201, "the other's eviction")
    place.open("g-a-1")
    place.wait_ready("g")
    assert not before.items() & place.uids("g").items()


def test_dependents_end_first(place: Place) -> None:
    place.create("g", role("router", 1, dependencies=["engine"]), role("engine", 2))
    place.wait_ready("g")

    def left(pods: dict[str, Json]) -> tuple[bool, bool]:
        """Whether the router is there, in whatever state; whether an engine was told to end."""
        ending = any("engine" in name and "deletionTimestamp" in pod["metadata"] for name, pod in pods.items())
        return "g-router-0" in pods, ending or sum("engine" in name for name in pods) < 2

    with place.watching("g", left) as seen:
        place.delete(GROUP, "g")
        assert place.read(GROUP, "g")["metadata"]["finalizers"]
        place.until(lambda: not place.exists(GROUP, "g"), "the group is gone")
        place.until(lambda: not place.objects(POD, "g") and not place.objects(STATEFUL_SET, "g"), "nothing is left")
        place.until(lambda: seen[-1] == (False, True), "the last pod's end was seen")
    assert (True, True) not in seen


def test_a_pod_starts_where_its_dependency_flaps(place: Place) -> None:
    """Dependencies gate creation alone."""
    place.create("g", role("router", 1, dependencies=["engine"]), role("engine", 1, gate=True))
    place.open("g-engine-0")
    place.wait_ready("g")
    place.delete(POD, "g-engine-0")
    place.until(lambda: conditions(place, "g")["Ready"] == "False", "the group is not ready")
    router = place.uids("g")["g-router-0"]
    place.delete(POD, "g-router-0")
    place.until(lambda: place.uids("g").get("g-router-0", router) != router, "a new router")
    place.until(lambda: is_pod_ready(place.read(POD, "g-router-0")), "it is ready without an engine")
    place.open("g-engine-0")
    place.wait_ready("g")


def test_another_operator_leads_when_one_stops(place: Place) -> None:
    place.stop_all()
    operators = {name: place.start(name, elect=True) for name in ("one", "two")}

    def holder() -> str:
        return str(place.read(LEASE, "diptych-operator")["spec"].get("holderIdentity") or "")

    place.until(lambda: place.exists(LEASE, "diptych-operator") and holder(), "a leader")
    leader = holder()
    place.create("g", role("a"))
    place.wait_ready("g")
    place.stop(operators[leader])
    place.delete(STATEFUL_SET, "g-a")
    place.until(lambda: place.exists(STATEFUL_SET, "g-a"), "what the other repairs")
    place.wait_ready("g")
    assert {leader, holder()} == operators.keys()
