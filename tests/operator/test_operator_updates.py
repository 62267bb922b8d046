"""Rolling updates, restarts, rollbacks, coordination: with an operator driven by hand, so that limits hold exactly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from driver import Driver, image_of, is_pod_ready, set_image
from kube_world import group, role

from diptych.group.operator.history import ROLE_REVISIONS
from diptych.group.operator.resources import Json
from diptych.testing.kube import Behaviour


def rolling(**settings: Any) -> Json:
    return {"rollingUpdate": settings}


def images(driver: Driver, of_role: str = "") -> dict[str, str]:
    return {name: image_of(pod) for name, pod in driver.pods(of_role).items()}


def uids(driver: Driver, of_role: str = "") -> dict[str, str]:
    return {name: pod["metadata"]["uid"] for name, pod in driver.pods(of_role).items()}


def watch(driver: Driver, measure: Callable[[], int]) -> list[int]:
    seen: list[int] = []
    driver.checks.append(lambda: seen.append(measure()))
    return seen


def num_ready(driver: Driver, of_role: str = "") -> int:
    return sum(map(is_pod_ready, driver.pods(of_role).values()))


@pytest.mark.parametrize("gates", [(), ("MaxUnavailableStatefulSet",)])
def test_several_pods_at_a_time_whatever_the_cluster_can(gates: tuple[str, ...]) -> None:
    driver = Driver(gates=gates)
    driver.create(group("g", role("a", 6, rolloutStrategy=rolling(maxUnavailable=3))))
    driver.run(5)
    driver.cluster.pods.behaviour = Behaviour(ready_s=2.0)
    ready = watch(driver, lambda: num_ready(driver))
    driver.edit("g", set_image("engine:2"))
    driver.run(20)
    assert set(images(driver).values()) == {"engine:2"} and driver.ready("g")
    assert min(ready) == 3
    assert driver.rests()


def test_surge_pods_come_first_and_go_again(driver: Driver) -> None:
    driver.create(group("g", role("a", 3, rolloutStrategy=rolling(maxUnavailable=0, maxSurge=2))))
    driver.run(5)
    driver.cluster.pods.behaviour = Behaviour(ready_s=2.0)
    ready, number = watch(driver, lambda: num_ready(driver)), watch(driver, lambda: len(driver.pods()))
    driver.edit("g", set_image("engine:2"))
    driver.run(60)
    assert images(driver) == {f"g-a-{i}": "engine:2" for i in range(3)} and driver.ready("g")
    assert min(ready) >= 3 and max(number) == 5


def test_a_broken_pod_above_a_partition_stalls_nothing(driver: Driver) -> None:
    driver.create(group("g", role("a", 6, rolloutStrategy=rolling(partition=2, maxUnavailable=1))))
    driver.run(5)
    before = uids(driver)
    driver.cluster.pods.set_ready("g-a-3", False)
    driver.run(5)
    driver.cluster.pods.behaviour = Behaviour(ready_s=2.0)
    ready = watch(driver, lambda: num_ready(driver))
    driver.edit("g", set_image("engine:2"))
    driver.run(60)
    assert min(ready) == 5
    new = {f"g-a-{index}" for index in (2, 3, 4, 5)}
    assert {name for name, image in images(driver, "a").items() if image == "engine:2"} == new
    assert {name for name, uid in uids(driver).items() if before[name] != uid} == new and driver.ready("g")
    assert driver.read("StatefulSet", "g-a")["spec"]["updateStrategy"]["rollingUpdate"]["partition"] == 2


def test_a_pod_below_the_partition_comes_back_at_the_last_revision_that_was_complete(driver: Driver) -> None:
    """Also if it had a later one, of an update that never was: that is what a StatefulSet's controller remembers."""
    driver.create(group("g", role("a", 3)))
    driver.run(5)
    partition(driver, 1)
    driver.edit("g", set_image("engine:2"))
    driver.run(30)
    partition(driver, 2)
    driver.edit("g", set_image("engine:3"))
    driver.run(30)
    assert list(images(driver, "a").values()) == ["engine:1", "engine:2", "engine:3"]
    for index in (0, 1, 2):
        driver.delete("Pod", f"g-a-{index}")
    driver.run(30)
    assert list(images(driver, "a").values()) == ["engine:1", "engine:1", "engine:3"] and driver.ready("g")
    partition(driver, 0)
    driver.run(30)
    assert set(images(driver, "a").values()) == {"engine:3"}


def partition(driver: Driver, ordinal: int) -> None:
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(rolloutStrategy=rolling(partition=ordinal)))


def test_a_partition_holds_low_indexes_and_lowering_it_goes_on(driver: Driver) -> None:
    driver.create(group("g", role("a", 4, rolloutStrategy=rolling(partition=2))))
    driver.run(5)
    driver.edit("g", set_image("engine:2"))
    driver.run(10)
    assert images(driver) == {
        "g-a-0": "engine:1",
        "g-a-1": "engine:1",
        "g-a-2": "engine:2",
        "g-a-3": "engine:2",
    }
    driver.delete("Pod", "g-a-0")
    driver.run(5)
    assert images(driver)["g-a-0"] == "engine:1"
    driver.edit("g", lambda each: each["spec"]["roles"][0]["rolloutStrategy"]["rollingUpdate"].update(partition=0))
    driver.run(10)
    assert set(images(driver).values()) == {"engine:2"}


def test_one_edit_changes_the_workloads_template_once(driver: Driver) -> None:
    driver.create(group("g", role("a", 3)))
    driver.run(5)
    templates: list[str] = []

    def note() -> None:
        image = driver.read("StatefulSet", "g-a")["spec"]["template"]["spec"]["containers"][0]["image"]
        if not templates or templates[-1] != image:
            templates.append(image)

    driver.checks.append(note)
    driver.edit("g", set_image("engine:2"))
    driver.run(10)
    assert templates == ["engine:1", "engine:2"]


def test_updates_follow_dependencies(driver: Driver) -> None:
    driver.create(group("g", role("router", 2, dependencies=["engine"]), role("engine", 2)))
    driver.run(5)
    driver.cluster.pods.behaviour = Behaviour(ready_s=3.0)
    wrong: list[dict[str, str]] = []

    def check() -> None:
        new = [name for name, image in images(driver).items() if image == "engine:2"]
        if any("router" in name for name in new) and sum("engine-" in name for name in new) < 2:
            wrong.append(images(driver))

    driver.checks.append(check)
    driver.edit("g", set_image("engine:2"))
    driver.run(40)
    assert set(images(driver).values()) == {"engine:2"} and not wrong


def test_coordinated_roles_stay_within_the_skew(driver: Driver) -> None:
    policy = {"name": "pd", "roles": ["p", "d"], "strategy": {"rollingUpdate": {"maxSkew": "25%"}}}
    strategy = rolling(maxUnavailable=4)
    driver.create(
        group(
            "g", role("p", 4, rolloutStrategy=strategy), role("d", 8, rolloutStrategy=strategy), coordination=[policy]
        )
    )
    driver.run(5)
    driver.cluster.pods.behaviour = Behaviour(ready_s=2.0)

    def skew() -> int:
        new = {name: sum(image == "engine:2" for image in images(driver, name).values()) for name in ("p", "d")}
        return abs(2 * new["p"] - new["d"])  # in eighths

    skews = watch(driver, skew)
    driver.edit("g", set_image("engine:2"))
    driver.run(120)
    assert set(images(driver).values()) == {"engine:2"} and driver.ready("g")
    assert max(skews) <= 4  # 25 %, or one pod of the smaller role, on either side of what is on its way


def test_a_coordinated_partition_keeps_its_share_of_every_role(driver: Driver) -> None:
    strategy = {"rollingUpdate": {"partition": "50%", "maxUnavailable": "50%"}}
    policy = {"name": "pd", "roles": ["p", "d"], "strategy": strategy}
    driver.create(group("g", role("p", 2), role("d", 4), role("x", 2), coordination=[policy]))
    driver.run(5)
    driver.edit("g", set_image("engine:2"))
    driver.run(30)
    new = sorted(name for name, image in images(driver).items() if image == "engine:2")
    assert new == ["g-d-2", "g-d-3", "g-p-1", "g-x-0", "g-x-1"] and driver.ready("g")
    driver.edit("g", lambda each: each["spec"].pop("coordination"))
    driver.run(30)
    assert set(images(driver).values()) == {"engine:2"}


def test_single_replicas_that_are_coordinated_are_updated(driver: Driver) -> None:
    policy = {"name": "pd", "roles": ["p", "d"], "strategy": {"rollingUpdate": {"maxSkew": "1%"}}}
    driver.create(group("g", role("p"), role("d"), coordination=[policy]))
    driver.run(5)
    driver.edit("g", set_image("engine:2"))
    driver.run(20)
    assert set(images(driver).values()) == {"engine:2"} and driver.ready("g")


def test_coordinated_scaling_waits_for_ready_pods(driver: Driver) -> None:
    strategy = {"scaling": {"maxSkew": "34%", "progression": "OrderReady"}}
    policy = {"name": "pd", "roles": ["p", "d"], "strategy": strategy}
    driver.create(group("g", role("p", 1), role("d", 1), coordination=[policy]))
    driver.run(5)
    driver.cluster.pods.behaviour = Behaviour(ready_s=3.0)
    counts: list[tuple[int, int]] = []
    driver.checks.append(lambda: counts.append((len(driver.pods("p")), num_ready(driver, "d"))))
    driver.edit("g", lambda each: [one.update(replicas=3) for one in each["spec"]["roles"]])
    driver.run(60)
    assert len(driver.pods()) == 6 and driver.ready("g")
    assert all(made - ready <= 2 for made, ready in counts)


def test_scaling_in_the_middle_of_an_update(driver: Driver) -> None:
    driver.create(group("g", role("a", 4)))
    driver.run(5)
    driver.cluster.pods.behaviour = Behaviour(ready_s=2.0)
    driver.edit("g", set_image("engine:2"))
    driver.run(3)
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(replicas=6))
    driver.run(60)
    assert images(driver) == {f"g-a-{i}": "engine:2" for i in range(6)} and driver.ready("g")


@pytest.mark.parametrize("whole_group", [False, True])
def test_pause_holds_an_update_and_resume_lets_it_go(driver: Driver, whole_group: bool) -> None:
    driver.create(group("g", role("a", 3)))
    driver.run(5)

    def pause(on: bool) -> Callable[[Json], None]:
        def change(obj: Json) -> None:
            if whole_group:
                obj["spec"]["paused"] = on
            else:
                obj["spec"]["roles"][0]["rolloutStrategy"] = rolling(paused=on)

        return change

    driver.edit("g", pause(True))
    driver.edit("g", set_image("engine:2"))
    driver.run(20)
    assert set(images(driver).values()) == {"engine:1"}
    assert driver.conditions("g")["Progressing"]["reason"] == "RolloutHeld"
    driver.delete("Pod", "g-a-1")
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(replicas=4))
    driver.run(5)
    assert images(driver) == {f"g-a-{i}": "engine:1" for i in range(4)}
    assert driver.rests()
    driver.edit("g", pause(False))
    driver.run(20)
    assert images(driver) == {f"g-a-{i}": "engine:2" for i in range(4)}


def test_a_failed_update_returns_to_what_was_good(driver: Driver) -> None:
    strategy = {"progressDeadlineSeconds": 30, "rollbackOnFailure": True}
    driver.create(group("g", role("a", 3, rolloutStrategy=strategy), role("b")))
    driver.run(5)
    before = uids(driver, "b")
    driver.cluster.pods.rule(name="g-a-2", ready_s=None)
    driver.edit("g", set_image("engine:broken", "a"))
    driver.run(10)
    assert images(driver, "a") == {"g-a-0": "engine:1", "g-a-1": "engine:1", "g-a-2": "engine:broken"}
    driver.cluster.pods.rule(name="g-a-2", ready_s=0.0)
    driver.cluster.pods.set_ready("g-a-2", False)
    driver.run(40)
    assert set(images(driver, "a").values()) == {"engine:1"} and driver.ready("g")
    assert image_of({"spec": driver.read("RoleBasedGroup", "g")["spec"]["roles"][0]["template"]["spec"]}) == "engine:1"
    assert any("no progress for 30 s" in each for each in driver.events("RolledBack"))
    assert uids(driver, "b") == before


def test_a_failed_update_without_rollback_says_so(driver: Driver) -> None:
    driver.create(group("g", role("a", 2, rolloutStrategy={"progressDeadlineSeconds": 30})))
    driver.run(5)
    driver.cluster.pods.rule(name="g-a-1", ready_s=None)
    driver.edit("g", set_image("engine:broken"))
    driver.run(60)
    assert driver.conditions("g")["Progressing"]["reason"] == "ProgressDeadlineExceeded"
    assert images(driver) == {"g-a-0": "engine:1", "g-a-1": "engine:broken"}
    assert driver.rests()
    driver.edit("g", set_image("engine:1"))
    driver.cluster.pods.rule(name="g-a-1", ready_s=0.0)
    driver.run(20)
    assert set(images(driver).values()) == {"engine:1"} and driver.ready("g")


@pytest.mark.parametrize("by_hand", ["deleted", "garbled"])
def test_nothing_to_return_to_leaves_the_group_cared_for(driver: Driver, by_hand: str) -> None:
    """Somebody took its old revisions: it says so, spins not, and goes on with everything else."""
    strategy = {"progressDeadlineSeconds": 10, "rollbackOnFailure": True}
    driver.create(group("g", role("a", 2, rolloutStrategy=strategy), role("b")))
    driver.run(5)
    driver.cluster.pods.rule(name="g-a-1", ready_s=None)
    driver.edit("g", set_image("engine:broken", "a"))
    driver.run(2)
    for name in driver.names("ControllerRevision"):
        if by_hand == "deleted":
            driver.delete("ControllerRevision", name)
        else:
            garbled = {ROLE_REVISIONS: '["a"'}
            driver.edit(name, lambda each, new=garbled: each["metadata"].update(annotations=new), "ControllerRevision")
    driver.run(30)
    assert driver.events("RollbackFailed")
    assert driver.conditions("g")["Progressing"]["status"] == "False"
    driver.edit("g", lambda each: each["spec"]["roles"][1].update(replicas=2))
    driver.run(5)
    assert len(driver.pods("b")) == 2


def test_a_pod_that_restarts_restarts_the_group_once(driver: Driver) -> None:
    policy = "RecreateRBGOnPodRestart"
    driver.create(group("g", role("a", 2, restartPolicy=policy), role("b", dependencies=["a"])))
    driver.run(5)
    before = uids(driver)
    driver.cluster.pods.crash("g-a-0")
    told: set[str] = set()
    driver.checks.append(lambda: told.add(driver.conditions("g")["RestartInProgress"]["status"]))
    driver.run(20)
    after = uids(driver)
    assert before.keys() == after.keys() and not set(before.values()) & set(after.values())
    assert driver.ready("g") and driver.conditions("g")["RestartInProgress"]["status"] == "False"
    assert "True" in told
    driver.run(60)
    assert uids(driver) == after


def test_failures_in_a_row_wait_longer_and_longer(driver: Driver) -> None:
    driver.create(group("g", role("a", restartPolicy="RecreateRBGOnPodRestart")))
    driver.run(5)
    births: list[float] = []
    known: set[str] = set()

    def note() -> None:
        for uid in uids(driver).values():
            if uid not in known:
                known.add(uid)
                births.append(driver.cluster.clock.now())

    driver.checks.append(note)
    driver.cluster.pods.rule(name="g-a-0", crash_s=1.0)
    driver.run(90)
    pauses = [round(two - one) for one, two in pairwise(births)]
    assert pauses[0] <= 3 and pauses[1] in range(10, 14) and pauses[2] in range(20, 24)
    driver.cluster.pods.rule(name="g-a-0", crash_s=None)


def test_an_update_goes_on_while_a_restart_waits(driver: Driver) -> None:
    driver.create(group("g", role("a", 2, restartPolicy="RecreateRBGOnPodRestart"), role("b")))
    driver.run(5)
    driver.cluster.pods.crash("g-a-0")
    driver.run(5)
    driver.cluster.pods.crash("g-a-0")  # the second in a row: a pause of 10 s
    driver.run(1)
    waiting = uids(driver, "a")
    driver.edit("g", set_image("engine:2", "b"))
    driver.run(5)
    assert images(driver, "b") == {"g-b-0": "engine:2"} and uids(driver, "a") == waiting
    driver.run(20)
    assert not set(uids(driver, "a").values()) & set(waiting.values()) and driver.ready("g")


def test_scaling_and_deleting_restart_nothing(driver: Driver) -> None:
    driver.create(group("g", role("a", 3, restartPolicy="RecreateRBGOnPodRestart"), role("b")))
    driver.run(5)
    before = uids(driver)
    driver.edit("g", lambda each: each["spec"]["roles"][0].update(replicas=2))
    driver.run(5)
    driver.delete("Pod", "g-a-1")
    driver.run(5)
    after = uids(driver)
    assert {name for name in after if after[name] != before[name]} == {"g-a-1"}
    driver.edit("g", set_image("engine:2", "b"))
    driver.run(10)
    assert uids(driver, "a") == {name: uid for name, uid in after.items() if "-a-" in name}


def test_only_the_failed_instance_is_made_anew(driver: Driver) -> None:
    driver.create(group("g", role("a", 3, restartPolicy="RecreateRoleInstanceOnPodRestart"), role("b")))
    driver.run(5)
    before = uids(driver)
    driver.cluster.pods.crash("g-a-1")
    driver.run(10)
    after = uids(driver)
    assert {name for name in after if after[name] != before[name]} == {"g-a-1"}
    deleted = [name for verb, kind, name in driver.api.writes if (verb, kind) == ("delete", "Pod")]
    assert deleted == ["g-a-1"]
    driver.run(60)
    assert uids(driver) == after


def test_without_a_policy_a_restart_changes_nothing(driver: Driver) -> None:
    driver.create(group("g", role("a", 2)))
    driver.run(5)
    before = uids(driver)
    driver.cluster.pods.crash("g-a-0")
    driver.run(10)
    assert uids(driver) == before
    driver.cluster.pods.fail("g-a-0")  # evicted: its StatefulSet makes another
    driver.run(10)
    assert driver.ready("g") and uids(driver)["g-a-0"] != before["g-a-0"]
