"""From objects to what the plan sees: whose pods count, and as what."""

from __future__ import annotations

from typing import Any

import pytest

from diptych.group.actions import ObservedRole
from diptych.group.operator.observe import REVISION, ROLE_LABEL, observe
from diptych.group.operator.resources import Json

GROUP: Json = {"metadata": {"name": "g", "namespace": "n", "uid": "u-g"}}


def workload(kind: str, **status: Any) -> Json:
    spec: Json = {"replicas": 2, "leaderWorkerTemplate": {"size": 2}}
    return {
        "kind": kind,
        "metadata": {"name": "g-a", "uid": "u-w", "generation": 3},
        "spec": spec,
        "status": status,
    }


def pod(name: str, owner: str = "StatefulSet", owner_name: str = "g-a", uid: str = "u-w", ready: bool = True) -> Json:
    reference = {"kind": owner, "name": owner_name, "uid": uid, "controller": True}
    status = "True" if ready else "False"
    condition = {"type": "Ready", "status": status, "lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {
        "metadata": {
            "name": name,
            "uid": f"u-{name}",
            "labels": {ROLE_LABEL: "a", REVISION: "r"},
            "ownerReferences": [reference] if owner else [],
        },
        "spec": {"nodeName": "node"},
        "status": {"phase": "Running", "conditions": [condition], "containerStatuses": []},
    }


def seen(kind: str, *pods: Json, **status: Any) -> ObservedRole:
    found = observe(GROUP, {"a": (kind, workload(kind, **status))}, list(pods)).role("a")  # type: ignore[dict-item]
    assert found is not None
    return found


def test_pods_of_others_do_not_count() -> None:
    others = (
        pod("g-a-7", owner=""),
        pod("g-a-8", owner="Job", owner_name="g-a"),
        pod("g-a-x-1", owner="ReplicaSet", owner_name="g-a-copy-5f6d"),
        pod("g-a-y-1", owner="StatefulSet", owner_name="g-a-y"),
    )
    assert [each.name for each in seen("StatefulSet", pod("g-a-0"), *others).pods] == ["g-a-0"]
    observed = observe(GROUP, {}, others)
    assert observed.roles == ()


def test_pods_of_an_earlier_workload_are_ending() -> None:
    old = pod("g-a-1", uid="u-old")
    assert [(each.name, each.phase) for each in seen("StatefulSet", pod("g-a-0"), old).pods] == [
        ("g-a-0", "running"),
        ("g-a-1", "stopping"),
    ]
    (left,) = observe(GROUP, {}, [old]).roles
    assert left.deleting and left.name == "a"


def test_a_pod_waits_for_room_only_when_the_scheduler_says_so() -> None:
    """A new pod has no node for a moment: nothing is wrong with it."""
    new, left = pod("g-a-0", ready=False), pod("g-a-1", ready=False)
    new["spec"], new["status"] = {}, {"phase": "Pending"}
    left["spec"] = {}
    left["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]
    found = seen("StatefulSet", new, left).pods
    assert [(each.scheduled, each.unplaced) for each in found] == [(False, False), (False, True)]


def test_a_pod_of_a_node_that_is_not_heard_of_is_unready_and_cut_off() -> None:
    """The node's controller takes Ready from its pods, and leaves what the kubelet said last of their containers."""
    lost, starting = pod("g-a-0", ready=False), pod("g-a-1", ready=False)
    for each, status in ((lost, "True"), (starting, "False")):
        each["status"]["conditions"].append({"type": "ContainersReady", "status": status})
    held = pod("g-a-2", ready=False)  # by a readiness gate: its kubelet says so itself
    held["status"]["conditions"].append({"type": "ContainersReady", "status": "True"})
    held["spec"] = {**held.get("spec", {}), "readinessGates": [{"conditionType": "example.com/open"}]}
    found = seen("StatefulSet", lost, starting, held).pods
    assert [(each.ready, each.cut_off) for each in found] == [(False, True), (False, False), (False, False)]


def test_a_replica_of_a_leader_worker_set_is_ready_when_all_its_pods_are() -> None:
    pods = [
        pod("g-a-0"),
        pod("g-a-0-1", owner_name="g-a-0", uid="u-g-a-0"),
        pod("g-a-1"),
        pod("g-a-1-1", owner_name="g-a-1", uid="u-g-a-1", ready=False),
        pod("g-a-2-1", owner_name="g-a-2", uid="u-g-a-2"),  # its leader is gone
        pod("g-a-3"),  # its worker has not been made yet
    ]
    pods[1]["status"]["containerStatuses"] = [
        {"name": "engine", "restartCount": 2, "state": {"running": {"startedAt": "2026-01-01T00:00:01Z"}}},
        {"name": "patio-runtime", "restartCount": 9},
    ]
    found = seen("LeaderWorkerSet", *pods)
    assert [(each.name, each.index, each.ready, each.restarted) for each in found.pods] == [
        ("g-a-0", 0, True, True),
        ("g-a-1", 1, False, False),
        ("g-a-3", 3, False, False),
    ]


@pytest.mark.parametrize(
    ("kind", "status", "settled"),
    [
        ("StatefulSet", {}, False),
        ("StatefulSet", {"observedGeneration": 2}, False),
        ("StatefulSet", {"observedGeneration": 3}, True),
        ("Deployment", {"replicas": 2}, False),
        ("LeaderWorkerSet", {}, False),
        ("LeaderWorkerSet", {"replicas": 2}, True),
        ("LeaderWorkerSet", {"observedGeneration": 2}, False),
    ],
)
def test_whether_a_controller_has_seen_its_spec(kind: str, status: Json, settled: bool) -> None:
    assert seen(kind, **status).settled is settled


@pytest.mark.parametrize(
    ("conditions", "unproven"),
    [
        ({}, False),  # evicted by an old kubelet, say: unknown
        ({"Initialized": ("True", 5), "Ready": ("True", 5)}, False),
        ({"Initialized": ("True", 5), "Ready": ("False", 5)}, True),
        ({"Initialized": ("True", 9), "Ready": ("False", 5)}, True),  # containers that initialize take their time
        ({"Initialized": ("True", 5), "Ready": ("False", 6)}, False),
        ({"Ready": ("False", 1)}, True),  # as old as the pod
        ({"Ready": ("False", 2)}, False),
    ],
)
def test_a_pod_is_unproven_until_it_was_ready(conditions: dict[str, tuple[str, int]], unproven: bool) -> None:
    each = pod("g-a-0")
    each["metadata"]["creationTimestamp"] = "2026-01-01T00:00:01Z"
    each["status"]["conditions"] = [
        {"type": name, "status": status, "lastTransitionTime": f"2026-01-01T00:00:0{second}Z"}
        for name, (status, second) in conditions.items()
    ]
    assert [state.unproven for state in seen("StatefulSet", each).pods] == [unproven]


@pytest.mark.parametrize(("containers", "unproven"), [([], True), ([{"name": "c", "restartCount": 0}], False)])
def test_a_pod_that_its_kubelet_turned_away_was_never_ready(containers: list[Json], unproven: bool) -> None:
    each = pod("g-a-0")
    each["status"] = {"phase": "Failed", "reason": "UnexpectedAdmissionError", "containerStatuses": containers}
    assert [state.unproven for state in seen("StatefulSet", each).pods] == [unproven]


def at(second: int) -> str:
    return f"2026-01-01T00:00:{second:02}Z"


@pytest.mark.parametrize(
    ("ready", "turned", "started", "restarted"),
    [
        ("False", 20, 20, True),  # it ended, which took Ready away, and runs again
        ("False", 20, 25, True),
        ("False", 20, 15, False),  # a bad start, then ready, and now a probe fails
        ("True", 20, 25, True),  # the kubelet has told of neither end nor start
        ("True", 20, 15, False),  # a bad start, or not: nobody knows
        ("True", 20, 20, False),
    ],
)
def test_a_restart_counts_once_the_pod_was_ready(ready: str, turned: int, started: int, restarted: bool) -> None:
    each = pod("g-a-0", ready=ready == "True")
    each["metadata"]["creationTimestamp"] = at(1)
    each["status"]["conditions"][0]["lastTransitionTime"] = at(turned)
    state = {"running": {"startedAt": at(started)}}
    each["status"]["containerStatuses"] = [{"name": "engine", "restartCount": 1, "state": state}]
    assert [found.restarted for found in seen("StatefulSet", each).pods] == [restarted]
    waits = {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": state["running"]}}
    each["status"]["containerStatuses"] = [{"name": "engine", "restartCount": 1, **waits}]
    assert [found.restarted for found in seen("StatefulSet", each).pods] == [restarted]
    each["status"]["containerStatuses"][0]["restartCount"] = 0
    assert [found.restarted for found in seen("StatefulSet", each).pods] == [False]


@pytest.mark.parametrize(
    ("ready", "updating", "restarted"),
    [
        (("True", 10), ("False", 2), True),
        (("True", 2), ("False", 10), True),  # made by the update that ended then
        (("True", 10), ("True", 2), False),  # one more than the group needs
        (("True", 10), None, False),
        (("True", 4), ("False", 2), False),
        (("True", 15), ("False", 2), False),
        (("False", 10), ("False", 2), False),
    ],
)
def test_what_nobody_saw_is_judged_by_what_the_group_last_said(
    ready: tuple[str, int], updating: tuple[str, int] | None, restarted: bool
) -> None:
    """The pod, made at 5, was started again at 15 and is ready since 20."""
    each = pod("g-a-0")
    each["metadata"]["creationTimestamp"] = at(5)
    each["status"]["conditions"][0]["lastTransitionTime"] = at(20)
    state = {"running": {"startedAt": at(15)}}
    each["status"]["containerStatuses"] = [{"name": "engine", "restartCount": 1, "state": state}]
    said = [
        {"type": name, "status": turn[0], "lastTransitionTime": at(turn[1])}
        for name, turn in (("Ready", ready), ("RollingUpdateInProgress", updating))
        if turn
    ]
    (found,) = observe(
        {**GROUP, "status": {"conditions": said}}, {"a": ("StatefulSet", workload("StatefulSet"))}, [each]
    ).roles
    assert [one.restarted for one in found.pods] == [restarted]
