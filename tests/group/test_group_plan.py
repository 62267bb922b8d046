"""What the plan says in single situations."""

from __future__ import annotations

import pytest

from diptych.group.order import find_cycle, start_order
from diptych.group.plan import (
    Action,
    Backoff,
    Desired,
    DesiredRole,
    DesiredService,
    Failures,
    Observed,
    PodState,
    SetEndpoints,
    StartPod,
    StopPod,
    Wait,
    count_failure,
    group_ready,
    plan,
    waiting_for,
)

BACKOFF = Backoff()
SEED = Desired(
    "sglang-pd",
    (
        DesiredRole("scheduler", 1, ("decode", "prefill"), labels={"role": "scheduler"}),
        DesiredRole("prefill", 2, labels={"role": "prefill"}),
        DesiredRole("decode", 1, labels={"role": "decode"}),
    ),
)


def pods(*described: str) -> tuple[PodState, ...]:
    """ "prefill-0" starting, "prefill-0+" ready, "prefill-0x" exited, "prefill-0~" stopping."""
    result = []
    for text in described:
        role, _, rest = text.partition("-")
        phase = {"x": "exited", "~": "stopping"}.get(rest[-1], "running")
        result.append(PodState(role, int(rest.rstrip("+x~")), phase, rest.endswith("+")))  # type: ignore[arg-type]
    return tuple(result)


def at(desired: Desired, *described: str, now: float = 0.0, **observed: object) -> list[Action]:
    return plan(desired, Observed(pods(*described), **observed), now, BACKOFF)  # type: ignore[arg-type]


def test_what_nothing_depends_on_starts_first_all_replicas_at_once() -> None:
    assert at(SEED) == [StartPod("prefill", 0), StartPod("prefill", 1), StartPod("decode", 0)]


def test_a_role_waits_for_every_replica_of_its_dependencies() -> None:
    assert at(SEED, "prefill-0+", "prefill-1", "decode-0+") == []
    assert waiting_for(SEED.roles[0], SEED, Observed(pods("prefill-0+", "prefill-1", "decode-0+"))) == ["prefill"]
    assert at(SEED, "prefill-0+", "prefill-1+", "decode-0+") == [StartPod("scheduler", 0)]


def test_a_ready_group_needs_nothing() -> None:
    everything = ("prefill-0+", "prefill-1+", "decode-0+", "scheduler-0+")
    assert at(SEED, *everything) == []
    assert group_ready(SEED, Observed(pods(*everything)))
    assert not group_ready(SEED, Observed(pods(*everything, "decode-1~")))


def test_a_flapping_dependency_does_not_touch_a_created_role() -> None:
    assert at(SEED, "prefill-0", "prefill-1+", "decode-0+", "scheduler-0+") == []
    # nor does it keep the role's own pod from restarting
    exited = ("prefill-0", "prefill-1+", "decode-0+", "scheduler-0x")
    assert at(SEED, *exited) == [StartPod("scheduler", 0, fresh=False)]


def test_back_off() -> None:
    delays = [BACKOFF.delay_s(failures) for failures in range(1, 9)]
    assert delays == [0, 10, 20, 40, 80, 160, 300, 300]
    assert BACKOFF.delay_s(10_000) == 300
    described = ("prefill-0+", "prefill-1+", "decode-0x", "scheduler-0+")
    failures = {"sglang-pd-decode-0": Failures(3, last_at=100.0)}
    assert at(SEED, *described, now=119.9, failures=failures) == [Wait("sglang-pd-decode-0", 120.0)]
    assert at(SEED, *described, now=120.0, failures=failures) == [StartPod("decode", 0, fresh=False)]


def test_failures_are_counted_until_a_stable_run() -> None:
    first = count_failure(None, 1.0, 10.0, BACKOFF)
    second = count_failure(first, 599.0, 700.0, BACKOFF)
    third = count_failure(second, 600.0, 1400.0, BACKOFF)
    assert (first, second, third) == (Failures(1, 10.0), Failures(2, 700.0), Failures(1, 1400.0))


def test_scaling_down_ends_the_highest_index_first() -> None:
    small = Desired("g", (DesiredRole("a", 1),))
    assert at(small, "a-0+", "a-1+", "a-2x", "a-3~") == [StopPod("a", 2), StopPod("a", 1)]


def test_scaling_up_does_not_wait_for_dependencies_again() -> None:
    desired = Desired("g", (DesiredRole("a", 2, ("b",)), DesiredRole("b", 1)))
    assert at(desired, "a-0+", "b-0") == [StartPod("a", 1)]


def test_a_dependency_of_no_replicas_is_ready() -> None:
    desired = Desired("g", (DesiredRole("a", 1, ("b",)), DesiredRole("b", 0)))
    assert at(desired) == [StartPod("a", 0)]


def test_deleting_ends_dependents_first() -> None:
    deleted = Desired(SEED.group, SEED.roles, deleted=True)
    assert at(deleted, "prefill-0+", "prefill-1", "decode-0x", "scheduler-0+") == [StopPod("scheduler", 0)]
    assert at(deleted, "prefill-0+", "prefill-1", "decode-0x", "scheduler-0~") == []
    assert at(deleted, "prefill-0+", "prefill-1", "decode-0x") == [
        StopPod("decode", 0),
        StopPod("prefill", 1),
        StopPod("prefill", 0),
    ]
    assert at(deleted) == []


def test_a_role_that_is_no_longer_desired_ends() -> None:
    assert at(Desired("g", (DesiredRole("a", 1),)), "a-0+", "old-0+", "old-1~") == [StopPod("old", 0)]


def test_restart_policy_of_an_instance_makes_a_fresh_pod() -> None:
    desired = Desired("g", (DesiredRole("a", 1, restart_policy="RecreateRoleInstanceOnPodRestart"),))
    assert at(desired, "a-0x") == [StartPod("a", 0, fresh=True)]


def test_restart_policy_of_the_group_restarts_everything_in_order() -> None:
    roles = (DesiredRole("a", 1, ("b",)), DesiredRole("b", 2, restart_policy="RecreateRBGOnPodRestart"))
    desired = Desired("g", roles)
    failures = {"g": Failures(2, last_at=100.0)}
    assert at(desired, "a-0+", "b-0x", "b-1+", now=101, failures=failures) == [StopPod("a", 0)]
    assert at(desired, "a-0~", "b-0x", "b-1+", now=101, failures=failures) == []
    assert at(desired, "b-0x", "b-1+", now=101, failures=failures) == [StopPod("b", 1)]
    assert at(desired, "b-0x", now=101, failures=failures) == [Wait("g", 110.0)]
    assert at(desired, "b-0x", now=110, failures=failures) == [StopPod("b", 0)]
    assert at(desired, now=110, failures=failures) == [StartPod("b", 0), StartPod("b", 1)]


def test_endpoints_are_the_ready_pods_the_selector_matches() -> None:
    service = DesiredService("svc", {"role": "prefill"})
    desired = Desired(SEED.group, SEED.roles, (service,))
    described = ("prefill-1+", "prefill-0+", "decode-0+", "scheduler-0+")
    names = ("sglang-pd-prefill-0", "sglang-pd-prefill-1")
    assert at(desired, *described) == [SetEndpoints("svc", names)]
    assert at(desired, *described, endpoints={"svc": names}) == []
    assert at(desired, "prefill-0", "prefill-1+", "decode-0+", "scheduler-0+", endpoints={"svc": names}) == [
        SetEndpoints("svc", names[1:])
    ]
    deleted = Desired(SEED.group, SEED.roles, (service,), deleted=True)
    assert at(deleted, "prefill-0+", endpoints={"svc": names}) == [SetEndpoints("svc", ()), StopPod("prefill", 0)]


@pytest.mark.parametrize(
    ("selector", "publish", "expected"),
    [
        ({}, False, ()),
        ({"role": "a", "apps.kubernetes.io/pod-index": "1"}, False, ("g-a-1",)),
        ({"statefulset.kubernetes.io/pod-name": "g-a-2"}, False, ()),
        ({"statefulset.kubernetes.io/pod-name": "g-a-2"}, True, ("g-a-2",)),
    ],
)
def test_selectors(selector: dict[str, str], publish: bool, expected: tuple[str, ...]) -> None:
    role = DesiredRole("a", 3, labels={"role": "a"})
    desired = Desired("g", (role,), (DesiredService("svc", selector, publish),))
    actions = at(desired, "a-0+", "a-1+", "a-2")
    assert actions == ([SetEndpoints("svc", expected)] if expected else [])


def test_order_of_roles() -> None:
    assert start_order({"a": ["c"], "b": [], "c": ["b"]}) == ["b", "c", "a"]
    assert find_cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert find_cycle({"a": ["a"]}) == ["a", "a"]
    assert find_cycle({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []
    with pytest.raises(ValueError, match="a -> b -> a"):
        start_order({"a": ["b"], "b": ["a"]})
