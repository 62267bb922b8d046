"""Restarts by policy: what counts as a failure when nobody looked, and how failures are recorded and told."""

from __future__ import annotations

import pytest
from driver import Crash, Driver, is_pod_ready, set_image
from kube_world import group, role

from diptych.group.actions import Failures
from diptych.group.operator import observe
from diptych.testing.kube import Behaviour

INSTANCE, WHOLE = "RecreateRoleInstanceOnPodRestart", "RecreateRBGOnPodRestart"


def uids(driver: Driver) -> dict[str, str]:
    return {name: pod["metadata"]["uid"] for name, pod in driver.pods().items()}


def renewed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Pods that are no longer what they were."""
    return {name for name, uid in before.items() if after.get(name) != uid}


def restarting(driver: Driver) -> str:
    return str(driver.conditions("g")["RestartInProgress"]["status"])


@pytest.mark.parametrize("policy", [INSTANCE, WHOLE])
def test_a_bad_start_while_the_operator_is_away_is_no_failure(driver: Driver, policy: str) -> None:
    driver.create(group("g", role("a", 2, restartPolicy=policy)))
    driver.run(5)
    driver.deaf = True
    slow = driver.cluster.pods.rule(name="g-a-1", ready_s=5.0)
    driver.delete("Pod", "g-a-1")
    driver.run(2)
    driver.cluster.pods.crash("g-a-1")
    driver.run(10)
    slow()
    before, driver.deaf = uids(driver), False
    driver.restart()
    driver.run(30)
    assert driver.ready("g") and uids(driver) == before and restarting(driver) == "False"


@pytest.mark.parametrize("policy", [INSTANCE, WHOLE])
def test_a_bad_start_beside_as_many_ready_pods_as_are_wanted_is_no_failure(driver: Driver, policy: str) -> None:
    """The group turns ready while an update goes on, whose new pod is one more than that needs."""
    strategy = {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    workload = {"apiVersion": "apps/v1", "kind": "Deployment"}
    one = role("a", 2, workload=workload, restartPolicy=policy, rolloutStrategy=strategy)
    driver.create(group("g", one, role("b")))
    driver.run(5)
    old = set(driver.pods())
    driver.cluster.pods.behaviour = Behaviour(ready_s=20.0)
    driver.edit("g", set_image("engine:2", "a"))
    driver.run(3)
    (new,) = set(driver.pods()) - old
    driver.cluster.pods.behaviour = Behaviour(ready_s=1.0)
    driver.delete("Pod", "g-b-0")
    driver.run(5)
    assert driver.ready("g") and not is_pod_ready(driver.pods()[new])
    driver.cluster.pods.crash(new)
    before = uids(driver)
    driver.run(60)
    assert uids(driver)[new] == before[new] and uids(driver)["g-b-0"] == before["g-b-0"]
    annotations = driver.read("RoleBasedGroup", "g")["metadata"].get("annotations") or {}
    assert driver.ready("g") and observe.FAILURES not in annotations


@pytest.mark.parametrize("policy", [INSTANCE, WHOLE])
def test_a_failure_while_the_operator_is_away_counts_though_the_pod_is_ready_again(driver: Driver, policy: str) -> None:
    driver.create(group("g", role("a", 2, restartPolicy=policy)))
    driver.run(5)
    before, driver.deaf = uids(driver), True
    driver.cluster.pods.rule(name="g-a-1", ready_s=5.0)
    driver.cluster.pods.crash("g-a-1")
    driver.run(10)
    assert all(map(is_pod_ready, driver.pods().values()))
    driver.deaf = False
    driver.restart()
    driver.run(30)
    assert driver.ready("g") and renewed(before, uids(driver)) == ({"g-a-1"} if policy == INSTANCE else set(before))


def test_restarts_of_before_a_policy_was_given_are_no_failures(driver: Driver) -> None:
    driver.cluster.pods.behaviour = Behaviour(ready_s=2.0)
    driver.create(group("g", role("a", 2)))
    driver.run(5)
    driver.cluster.pods.crash("g-a-1")
    driver.run(10)
    before = uids(driver)
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(restartPolicy=WHOLE))
    driver.run(20)
    assert driver.ready("g") and uids(driver) == before


def test_pods_of_a_deployment_that_fail_together_are_one_failure(driver: Driver) -> None:
    workload = {"apiVersion": "apps/v1", "kind": "Deployment"}
    driver.create(group("g", role("a", 3, workload=workload, restartPolicy=INSTANCE)))
    driver.run(5)
    driver.cluster.pods.crash(min(driver.pods()))
    driver.run(5)
    before = uids(driver)
    one, two, three = sorted(driver.pods())
    driver.cluster.pods.crash(one)  # the second failure in a row: a pause of 10 s
    driver.cluster.pods.crash(two)
    driver.run(5)
    assert uids(driver) == before and restarting(driver) == "True"
    driver.run(10)
    assert set(before) & set(uids(driver)) == {three} and driver.ready("g")


@pytest.mark.parametrize("policy", [INSTANCE, WHOLE])
def test_bad_starts_are_written_nowhere(driver: Driver, policy: str) -> None:
    broken = driver.cluster.pods.rule(name="g-a-*", ready_s=None, crash_s=20.0)
    driver.create(group("g", role("a", 2, restartPolicy=policy)))
    driver.run(90)
    assert observe.FAILURES not in (driver.read("RoleBasedGroup", "g")["metadata"].get("annotations") or {})
    broken()
    driver.run(10)
    assert driver.ready("g")


def test_as_many_failures_are_kept_as_annotations_have_room_for() -> None:
    """The longest names there can be, as many pods as a group may have."""
    failures = {f"{'g' * 52}-{index:05}": Failures(index, 1e9 + index / 7, "u" * 36) for index in range(10_000)}
    pending = {"g": Failures(3, 0.0, "u" * 36, pending=True)}
    text = observe.failures_text(failures | pending)
    assert text is not None and len(text) < 192 * 1024
    kept = observe.observe({"metadata": {"name": "g", "annotations": {observe.FAILURES: text}}}, {}, []).failures
    assert len(kept) == observe.MAX_FAILURES and "g" in kept and f"{'g' * 52}-09999" in kept


def test_more_failures_than_are_kept_are_dealt_with_all_the_same(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "MAX_FAILURES", 2)
    driver.create(group("g", role("a", 5, restartPolicy=INSTANCE)))
    driver.run(5)
    for _ in range(3):
        before = uids(driver)
        for name in before:
            driver.cluster.pods.crash(name)
        driver.run(30)
        assert renewed(before, uids(driver)) == set(before) and driver.ready("g")


def test_a_restart_of_the_group_is_told(driver: Driver) -> None:
    driver.create(group("g", role("a", 2, restartPolicy=WHOLE), role("b")))
    driver.run(5)
    driver.cluster.pods.crash("g-a-1")
    driver.run(10)
    text = "the whole group is made anew"
    first = f"pod g-a-1 failed; failure 1 in a row: {text}; see the logs of its pods"
    assert driver.events("RBGRestart") == [first]
    driver.cluster.pods.crash("g-a-0")
    driver.api.crash_after = 1  # at once after the record
    with pytest.raises(Crash):
        driver.run(1)
    driver.restart()
    driver.run(30)
    second = f"pod g-a-0 failed; failure 2 in a row: {text} after a pause of 10 s; see the logs of its pods"
    assert sorted(driver.events("RBGRestart")) == sorted([first, second])  # they are listed by name, a hash
    assert driver.ready("g")
