"""Rolling updates: which pods go next, in single situations and from one end to the other."""

from __future__ import annotations

from typing import Any

import pytest
from group_world import World
from msgspec.structs import replace

from diptych.group.actions import (
    Action,
    ApplyRole,
    CoordinatedUpdate,
    Coordination,
    DeletePod,
    Desired,
    DesiredRole,
    Observed,
    ObservedRole,
    PodState,
    RecordRollout,
    Rollback,
    Rollout,
    Target,
    Update,
    Wait,
)
from diptych.group.conditions import group_status
from diptych.group.plan import plan, updating


def role(name: str = "a", replicas: int = 4, *dependencies: str, revision: str = "new", **update: Any) -> DesiredRole:
    kind = update.pop("kind", "StatefulSet")
    return DesiredRole(
        name=name,
        replicas=replicas,
        dependencies=dependencies,
        revision=revision,
        kind=kind,
        update=Update(**update),
    )


def group(*roles: DesiredRole, **more: Any) -> Desired:
    return Desired(group="g", roles=roles, **more)


def seen(text: str, target: Target | None = None, name: str = "a", **more: Any) -> ObservedRole:
    """One pod a letter: `o` old and ready, `x` old and not ready, `c` old and cut off, `n` new and ready, `u` new and
    not ready, `~` ends, `-` is missing. The target is the old one unless given."""
    pods = tuple(
        PodState(
            name=f"g-{name}-{index}",
            index=index,
            uid=f"{name}{index}",
            revision="new" if letter in "nu" else "old",
            phase="stopping" if letter == "~" else "running",
            ready=letter in "on",
            cut_off=letter == "c",
            ready_since=-1000.0 if letter == "o" else 0.0,
        )
        for index, letter in enumerate(text)
        if letter != "-"
    )
    return ObservedRole(name=name, target=target or Target(len(text), 0, "old"), pods=pods, **more)


def record(state: Any = "progressing", updated: int = 0, at: float = 0.0) -> Rollout:
    return Rollout(revision="new", good="old", state=state, started_at=0.0, progressed_at=at, updated=updated)


def steps(desired: Desired, *roles: ObservedRole, now: float = 0.0) -> list[Action]:
    """What the plan does; records left out."""
    actions = plan(desired, Observed(roles=roles), now)
    return [action for action in actions if not isinstance(action, RecordRollout)]


def target(partition: int, replicas: int = 4, on_delete: bool = False) -> Target:
    return Target(replicas, partition, "new", on_delete)


def delete(*ordinals: int, name: str = "a") -> list[DeletePod]:
    why = "its revision is no longer wanted"
    return [DeletePod(name, f"g-{name}-{i}", f"{name}{i}", why) for i in ordinals]


def applied(*expected: Target) -> list[ApplyRole]:
    return [ApplyRole("a", each) for each in expected]


def test_a_new_revision_lets_the_highest_pod_go_in_one_write() -> None:
    actions = plan(group(role()), Observed(roles=(seen("oooo"),)), 5.0)
    begun = Rollout(revision="new", good="old", state="progressing", started_at=5.0, progressed_at=5.0)
    assert actions == [RecordRollout("a", begun), ApplyRole("a", target(3))]


def test_pods_are_deleted_by_name_once_the_controller_knows() -> None:
    now = group(role(max_unavailable=2))
    assert steps(now, seen("oooo")) == applied(target(2))
    assert steps(now, seen("oooo", target(2), settled=False)) == []
    assert steps(now, seen("oooo", target(2))) == delete(3, 2)
    assert steps(now, seen("oo~~", target(2))) == []
    assert steps(now, seen("oo-u", target(2))) == []
    assert steps(now, seen("oonu", target(2))) == applied(target(1))
    assert steps(now, seen("oonn", target(2))) == applied(target(0))
    assert steps(now, seen("nnnn", target(0))) == []


@pytest.mark.parametrize(
    ("text", "unavailable", "partition"),
    [
        ("oooo", 1, 3),
        ("oooo", 4, 0),
        ("ooou", 1, 3),  # the one that is out is not back yet
        ("ooon", 1, 2),
        ("oo-n", 1, 2),  # what is missing may come back new
        ("oo~n", 1, 2),
        ("ooxn", 1, 2),  # what is unavailable anyway may go at once
        ("oxxn", 1, 1),
        ("oxxo", 2, 1),  # the two that are out are all that may be; they go first, and the one above not
    ],
)
def test_how_far_the_partition_goes(text: str, unavailable: int, partition: int) -> None:
    (action,) = steps(group(role(max_unavailable=unavailable)), seen(text))
    assert isinstance(action, ApplyRole)
    if text == "oxxo":
        assert action.target == target(0, on_delete=True)
    else:
        assert action.target == target(partition)


def test_a_broken_pod_at_a_low_ordinal_goes_first_and_stalls_nothing() -> None:
    """Upstream #464: it used maxUnavailable up for good."""
    desired = group(role())
    assert steps(desired, seen("xooo")) == applied(target(0, on_delete=True))
    assert steps(desired, seen("xooo", target(0, on_delete=True))) == delete(0)
    assert steps(desired, seen("uooo", target(0, on_delete=True))) == []
    assert steps(desired, seen("nooo", target(0, on_delete=True))) == delete(3)
    assert steps(desired, seen("noon", target(0, on_delete=True))) == delete(2)
    assert steps(desired, seen("nonn", target(0, on_delete=True))) == applied(target(0))


@pytest.mark.parametrize("text", ["cccc", "cccn", "ccuu", "ooco", "occn"])
def test_pods_of_nodes_that_are_not_heard_of_are_left_alone(text: str) -> None:
    """They may well serve: after an outage of the API server all are unready for a moment, and not all may go."""
    held = target(len(text.rstrip("nu")))
    assert steps(group(role()), seen(text)) == applied(held)
    assert steps(group(role()), seen(text, held)) == []


def test_a_broken_pod_above_the_users_partition_goes_first_too() -> None:
    """OnDelete would not hold the others back: it lasts until that pod is made anew, and while they are well."""
    desired, on_delete = group(role(partition=1)), target(0, on_delete=True)
    assert steps(desired, seen("oxoo")) == applied(on_delete)
    assert steps(desired, seen("oxoo", on_delete)) == delete(1)
    assert steps(desired, seen("o~oo", on_delete)) == []
    assert steps(desired, seen("ouoo", on_delete)) == applied(target(4))
    assert steps(desired, seen("ouoo", target(4))) == []
    assert steps(desired, seen("onoo", target(4))) == applied(target(3))
    assert steps(desired, seen("onon", target(3))) == applied(target(1))
    for text in ("xxoo", "~xoo", "-xoo", "ux~o"):
        assert steps(desired, seen(text, on_delete)) == applied(target(4))
        assert steps(desired, seen(text, target(4))) == []
    assert steps(desired, seen("noon", target(3))) == applied(target(2))


def test_the_users_partition_holds_ordinals_back() -> None:
    desired = group(role(partition=2, max_unavailable=4))
    assert steps(desired, seen("oooo")) == applied(target(2))
    assert steps(desired, seen("oonn", target(2))) == []
    assert updating(desired, Observed(roles=(seen("oonn", target(2), rollout=record("complete", 2)),))) == []
    lower = group(role(partition=0, max_unavailable=4))
    assert steps(lower, seen("oonn", target(2), rollout=record("complete", 2))) == applied(target(0))
    assert steps(group(role(partition="30%")), seen("oonn", target(2))) == []  # 1.2 pods are 2


def test_surge_comes_first_and_goes_last() -> None:
    desired = group(role(max_unavailable=0, max_surge=2))
    assert steps(desired, seen("oooo")) == applied(target(4, 6))
    assert steps(desired, seen("oooouu", target(4, 6))) == []
    assert steps(desired, seen("oooonu", target(4, 6))) == applied(target(3, 6))
    assert steps(desired, seen("oooonn", target(2, 6))) == delete(3, 2)
    going = {"rollout": record()}
    assert steps(desired, seen("nunnnn", target(0, 6), **going)) == applied(target(0, 5))
    assert steps(desired, seen("nnnnnn", target(0, 6), **going)) == applied(target(0, 4))
    assert steps(desired, seen("nnnuun", target(0, 6), **going)) == []  # the surge pod that is ready is the last one
    # broken surge pods do not count as what they stand in for
    assert steps(desired, seen("ooonuu", target(3, 6), **going)) == []
    assert steps(group(role(max_unavailable=0, max_surge=9)), seen("oooo")) == applied(target(4, 8))
    # nor do those of another revision, which an update that was overtaken may have left
    assert steps(desired, seen("ooooox", target(4, 6), **going)) == delete(5, 4)


def test_a_change_of_replicas_in_mid_rollout() -> None:
    more = group(role(replicas=6))
    going = {"rollout": record(updated=1)}
    assert steps(more, seen("ooon", target(3), **going)) == applied(target(3, 6))
    # the two that are new count as missing: no healthy pod goes before they are there
    assert steps(more, seen("ooonuu", target(3, 6), **going)) == []
    assert steps(more, seen("ooonnn", target(3, 6), **going)) == applied(target(2, 6))
    assert steps(group(role(replicas=2)), seen("ooon", target(3), **going)) == applied(target(1, 2))


def test_a_second_update_in_mid_rollout_ends_on_the_last_revision() -> None:
    latest = group(role(revision="newer"))
    going = seen("oonu", target(2), rollout=record(updated=1))
    actions = plan(latest, Observed(roles=(going,)), 9.0)
    begun = Rollout(revision="newer", good="old", state="progressing", started_at=9.0, progressed_at=9.0)
    assert actions == [RecordRollout("a", begun), ApplyRole("a", Target(4, 3, "newer"))]


def test_a_pod_that_failed_and_is_old_is_deleted_once() -> None:
    desired = group(replace(role(), restart_policy="RecreateRoleInstanceOnPodRestart"))
    old = seen("ooox", target(3))
    failed = replace(old, pods=(*old.pods[:3], replace(old.pods[3], phase="exited")))
    deleted = [each.uid for each in steps(desired, failed) if isinstance(each, DeletePod)]
    assert deleted == ["a3"]


def test_min_ready_seconds() -> None:
    desired = group(role(min_ready_s=10))
    actions = steps(desired, seen("ooon", target(3)), now=4.0)
    assert [(type(each), each.until) for each in actions if isinstance(each, Wait)] == [(Wait, 10.0)]
    assert len(actions) == 1
    assert steps(desired, seen("ooon", target(3)), now=10.0) == applied(target(2))
    young = [replace(pod, ready_since=0.0) for pod in seen("oooo").pods]
    assert steps(desired, replace(seen("oooo"), pods=tuple(young)), now=4.0)[0] == ApplyRole("a", target(4))


# ---- pause, order, deadline --------------------------------------------------------------------------------------


@pytest.mark.parametrize("paused", [group(role(paused=True)), group(role(), paused=True)])
def test_pause(paused: Desired) -> None:
    assert steps(paused, seen("oooo")) == []  # the new template is not even written
    going = {"rollout": record(updated=1)}
    assert steps(paused, seen("ooon", target(3), **going)) == []
    assert steps(paused, seen("ooon", target(2), **going)) == applied(target(3))  # what was let go and is still there
    assert steps(paused, seen("oo-n", target(2), **going)) == []
    more = replace(paused, roles=(replace(paused.roles[0], replicas=5),))
    assert steps(more, seen("oooo")) == [ApplyRole("a", Target(5, 0, "old"))]  # scaling goes on
    assert plan(paused, Observed(roles=(seen("oooo"),)), 3.0) == [
        RecordRollout("a", Rollout(revision="new", good="old", state="held", started_at=3.0, progressed_at=3.0))
    ]


def test_the_clock_stands_still_while_paused() -> None:
    desired = group(role(progress_deadline_s=60))
    held = seen("ooou", target(3), rollout=record("held"))
    assert plan(desired, Observed(roles=(held,)), 1000.0)[0] == RecordRollout("a", record("progressing", at=1000.0))


def test_roles_are_updated_after_those_they_depend_on() -> None:
    desired = group(role("b", 1, "a"), role("a", 1))
    a, b = seen("o"), seen("o", name="b")
    assert steps(desired, a, b) == applied(target(0, 1))
    assert steps(desired, seen("u", target(0, 1), rollout=record()), b) == []
    done = seen("n", target(0, 1), rollout=record("complete", 1))
    assert steps(desired, done, b) == [ApplyRole("b", target(0, 1))]
    flapping = seen("u", target(0, 1), rollout=record("complete", 1))
    assert steps(desired, flapping, b) == [ApplyRole("b", target(0, 1))]


def test_the_order_reaches_through_a_role_that_has_no_update() -> None:
    desired = group(role("c", 1, "b"), role("b", 1, "a", revision="old"), role("a", 1))
    roles = seen("o"), seen("o", name="b"), seen("o", name="c")
    assert steps(desired, *roles) == applied(target(0, 1))


def test_a_rollout_without_progress_has_failed() -> None:
    desired = group(role(progress_deadline_s=60))
    going = seen("ooou", target(3), rollout=record())
    (wait,) = plan(desired, Observed(roles=(going,)), 59.0)
    assert isinstance(wait, Wait) and wait.until == 60.0
    assert plan(desired, Observed(roles=(going,)), 60.0) == [RecordRollout("a", record("failed"))]
    failed = Observed(roles=(seen("ooou", target(3), rollout=record("failed")),))
    assert plan(desired, failed, 61.0) == []
    conditions = {each.type: each for each in group_status(desired, failed, 1, 61.0).conditions}
    assert (conditions["Progressing"].status, conditions["Progressing"].reason) == (False, "ProgressDeadlineExceeded")
    assert conditions["Progressing"].message == (
        "the update of a failed after 60 s without progress; correct its template or undo the update"
    )
    assert conditions["RollingUpdateInProgress"].message == "a: 0 of 4 updated and available"
    # progress, late as it is, is progress
    late = Observed(roles=(seen("ooon", target(3), rollout=record("failed")),))
    assert plan(desired, late, 70.0)[0] == RecordRollout("a", record("progressing", 1, 70.0))


def test_a_failed_rollout_is_rolled_back_once() -> None:
    desired = group(role(progress_deadline_s=60, rollback=True))
    actions = plan(desired, Observed(roles=(seen("ooou", target(3), rollout=record()),)), 60.0)
    assert actions == [RecordRollout("a", record("failed")), Rollback("a", "old", "a made no progress for 60 s")]
    # the way back is a rollout too, and has nothing to go back to
    back = group(role(revision="old", progress_deadline_s=60, rollback=True))
    going_back = seen("ooou", target(3), rollout=record("failed"))
    begun = Rollout(revision="old", good="old", state="progressing", started_at=70.0, progressed_at=70.0, updated=3)
    actions = plan(back, Observed(roles=(going_back,)), 70.0)
    assert actions[:2] == [RecordRollout("a", begun), ApplyRole("a", Target(4, 0, "old"))]
    stuck = seen("ooox", Target(4, 0, "old"), rollout=begun)
    assert not any(isinstance(each, Rollback) for each in plan(back, Observed(roles=(stuck,)), 999.0))


# ---- other workloads ---------------------------------------------------------------------------------------------


def test_a_deployment_rolls_by_itself_and_is_paused_to_hold_it() -> None:
    def deployment(text: str, at: Target) -> ObservedRole:
        return replace(seen(text, at), kind="Deployment")

    assert steps(group(role(kind="Deployment")), deployment("oooo", target(0))) == []
    assert steps(group(role(kind="Deployment")), deployment("oooo", Target(4, 0, "old"))) == applied(target(0))
    assert steps(group(role(kind="Deployment", paused=True)), deployment("oooo", Target(4, 0, "old"))) == []
    assert steps(group(role(kind="Deployment", paused=True)), deployment("ooon", target(0))) == applied(target(4))


def test_an_evicted_pod_of_a_deployment_neither_opens_a_rollout_again_nor_fails_one() -> None:
    """Its ReplicaSet has made another and leaves it lying: a healthy group was rolled back because of one."""
    roles = group(role(replicas=2, kind="Deployment", progress_deadline_s=60, rollback=True))
    running = replace(seen("nn", Target(2, 0, "new")), kind="Deployment")
    evicted = PodState(name="g-a-z", index=-1, uid="z", revision="old", phase="exited")
    for state in ("complete", "progressing"):
        left = replace(running, pods=(*running.pods, evicted), rollout=record(state, updated=2))
        why = "it ended, and its ReplicaSet has made another"
        assert steps(roles, left, now=100.0) == [DeletePod("a", "g-a-z", "z", why)]
        assert updating(roles, Observed(roles=(left,))) == ([] if state == "complete" else ["a"])  # as recorded


def test_a_leader_worker_set_gets_the_partition_and_minds_the_rest() -> None:
    """Upstream #150: the partition did not reach it."""
    desired = group(role(kind="LeaderWorkerSet", partition=1))
    lws = replace(seen("oooo"), kind="LeaderWorkerSet")
    assert steps(desired, lws) == applied(target(1))
    assert steps(desired, replace(lws, target=target(1))) == []


# ---- coordination ------------------------------------------------------------------------------------------------


def in_step(skew: int, *roles: DesiredRole, **update: Any) -> Desired:
    names = tuple(each.name for each in roles)
    coordinated = CoordinatedUpdate(max_skew=skew, **update)
    return group(*roles, coordinations=(Coordination(roles=names, update=coordinated),))


def test_coordinated_roles_move_at_the_same_time() -> None:
    """Upstream #154: only the slowest role moved."""
    desired = in_step(25, role("a", 4, max_unavailable=4), role("b", 8, max_unavailable=8))
    assert steps(desired, seen("oooo"), seen("o" * 8, name="b")) == [
        ApplyRole("a", target(3)),
        ApplyRole("b", target(6, 8)),
    ]
    # b is behind: a, at a quarter, may not go further
    a = seen("ooon", target(3))
    assert steps(desired, a, seen("o" * 7 + "n", target(6, 8), name="b")) == [ApplyRole("b", target(4, 8))]
    assert steps(desired, a, seen("o" * 6 + "nn", target(6, 8), name="b")) == [
        ApplyRole("a", target(2)),
        ApplyRole("b", target(4, 8)),
    ]


def test_coordinated_roles_of_one_replica_start() -> None:
    """Upstream #307: neither could be first."""
    desired = in_step(1, role("a", 1), role("b", 1))
    assert steps(desired, seen("o"), seen("o", name="b")) == [
        ApplyRole("a", target(0, 1)),
        ApplyRole("b", target(0, 1)),
    ]


def test_a_role_without_an_update_holds_nobody_back() -> None:
    desired = in_step(1, role("a", 2), role("b", 2, revision="old"))
    assert steps(desired, seen("on", target(1, 2)), seen("ox", name="b")) == applied(target(0, 2))


def test_coordination_comes_before_dependencies_and_replaces_the_roles_limits() -> None:
    desired = in_step(100, role("a", 4), role("b", 4, "a"), max_unavailable=50, partition=25)
    assert steps(desired, seen("oooo"), seen("oooo", name="b")) == [
        ApplyRole("a", target(2)),
        ApplyRole("b", target(2)),
    ]
    assert steps(desired, seen("oonn", target(2)), seen("onnn", target(1), name="b")) == applied(target(1))


# ---- from one end to the other -----------------------------------------------------------------------------------


def run(world: World, rounds: int = 200) -> list[set[str]]:
    """Lets the world go on until it rests; the pods that were ready at each step."""
    history = []
    for _ in range(rounds):
        before = world.observe()
        world.carry_out(plan(world.desired, before, world.now))
        for name in list(world.workloads):
            world.sync(name)
        history.append({pod.name for _, pod in world.all_pods() if pod.ready})
        for name, pod in world.all_pods():
            world.change(name, pod, "gone" if pod.phase == "stopping" else "ready")
        world.now += 1.0
        if world.observe() == before:
            return history
    raise AssertionError(f"does not rest: {world}")


@pytest.mark.parametrize("naive", [False, True])
@pytest.mark.parametrize(
    ("unavailable", "surge", "least", "most"), [(1, 0, 7, 8), (3, 0, 5, 8), (0, 2, 8, 10), (2, 2, 6, 10)]
)
def test_a_whole_rollout_keeps_as_many_ready_as_it_must(
    naive: bool, unavailable: int, surge: int, least: int, most: int
) -> None:
    old = group(role(replicas=8, revision="old", max_unavailable=unavailable, max_surge=surge))
    world = World(old, naive)
    run(world)
    world.desired = replace(old, roles=(replace(old.roles[0], revision="new"),))
    history = run(world)
    assert least <= min(map(len, history)) and max(map(len, history)) <= most
    assert {pod.revision for _, pod in world.all_pods()} == {"new"} and len(world.all_pods()) == 8
    rollout = world.workloads["a"].rollout
    assert rollout is not None and (rollout.state, rollout.good, rollout.updated) == ("complete", "old", 8)


@pytest.mark.parametrize("naive", [False, True])
def test_several_pods_at_a_time_are_faster_than_one(naive: bool) -> None:
    """A StatefulSet's controller rolls one by one, whatever its own maxUnavailable says."""
    lengths = []
    for unavailable in (1, 4):
        old = group(role(replicas=8, revision="old", max_unavailable=unavailable))
        world = World(old, naive=False)
        run(world)
        world.naive = naive
        world.desired = replace(old, roles=(replace(old.roles[0], revision="new"),))
        lengths.append(len(run(world)))
    assert lengths[1] * 1.5 <= lengths[0]


def test_a_broken_update_takes_no_more_than_it_may_and_is_undone() -> None:
    old = group(role(revision="old", max_unavailable=1, progress_deadline_s=30, rollback=True))
    world = World(old, naive=True)
    run(world)
    world.broken.add("new")
    world.desired = replace(old, roles=(replace(old.roles[0], revision="new"),))
    for _ in range(60):
        world.carry_out(plan(world.desired, world.observe(), world.now))
        if world.rolled_back:
            break
        world.sync("a")
        for name, pod in world.all_pods():
            world.change(name, pod, "gone" if pod.phase == "stopping" else "ready")
        assert sum(pod.ready for _, pod in world.all_pods()) >= 3
        world.now += 1.0
    assert world.rolled_back == [Rollback("a", "old", "a made no progress for 30 s")]
    world.desired = old
    run(world)
    assert [pod.revision for _, pod in world.all_pods()] == ["old"] * 4
    assert all(pod.ready for _, pod in world.all_pods())


# ---- what a person is told ---------------------------------------------------------------------------------------


def told(desired: Desired, *roles: ObservedRole) -> dict[str, tuple[bool, str, str]]:
    status = group_status(desired, Observed(roles=roles), 1, 0.0)
    return {each.type: (each.status, each.reason, each.message) for each in status.conditions}


def test_the_status_of_a_rollout() -> None:
    desired = group(role(partition=1), role("b", 1, "a"))
    conditions = told(desired, seen("ooou", target(3), rollout=record()), seen("o", name="b"))
    assert conditions["Progressing"] == (True, "Reconciling", "still at work on a, b")
    assert conditions["RollingUpdateInProgress"] == (
        True,
        "RollingUpdate",
        "a: 0 of 3 updated and available; b: 0 of 1 updated and available; held, because the update of a, which it"
        " depends on, comes first",
    )


def test_the_status_of_a_paused_rollout() -> None:
    conditions = told(group(role(), paused=True), seen("oonn", target(2), rollout=record("held", 2)))
    assert conditions["Ready"][0] is True
    assert conditions["Progressing"] == (
        False,
        "RolloutHeld",
        "the update of a does not go on: the group is paused",
    )
    assert (
        conditions["RollingUpdateInProgress"][2] == "a: 2 of 4 updated and available; held, because the group is paused"
    )


def test_a_pause_in_mid_rollout_is_recorded() -> None:
    going = seen("ooou", target(3), rollout=record())
    assert plan(group(role(paused=True)), Observed(roles=(going,)), 5.0) == [RecordRollout("a", record("held"))]
