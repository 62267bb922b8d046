"""What the plan says in single situations: creation, scaling, ends, restart policies, gangs, status."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from diptych.group.actions import (
    Action,
    ApplyRole,
    Backoff,
    CoordinatedScaling,
    Coordination,
    DeletePod,
    DeleteRole,
    Desired,
    DesiredRole,
    Failures,
    Observed,
    ObservedRole,
    PodState,
    RecordFailures,
    Target,
    Update,
    Wait,
)
from diptych.group.conditions import group_status
from diptych.group.coordinate import Share, amount, budget, lower_limits, upper_limits
from diptych.group.gang import members, min_member
from diptych.group.order import find_cycle, start_order
from diptych.group.plan import group_ready, plan, waiting_for
from diptych.group.restart import count_failure

BACKOFF = Backoff()


def role(name: str, replicas: int = 1, *dependencies: str, **more: Any) -> DesiredRole:
    return DesiredRole(name=name, replicas=replicas, dependencies=dependencies, revision="r", **more)


def group(*roles: DesiredRole, **more: Any) -> Desired:
    return Desired(group="g", roles=roles, **more)


SEED = group(role("scheduler", 1, "decode", "prefill"), role("prefill", 2), role("decode", 1))


def pods(name: str, text: str) -> tuple[PodState, ...]:
    """One letter an ordinal: `+` ready, `.` starting, `?` no node takes it, `x` exited, `~` stopping, `r` restarted,
    `s` starting and `X` exited before it was ever ready, `-` not there."""
    return tuple(
        PodState(
            name=f"g-{name}-{index}",
            index=index,
            uid=f"{name}{index}",
            revision="r",
            phase={"x": "exited", "X": "exited", "~": "stopping"}.get(letter, "running"),  # type: ignore[arg-type]
            scheduled=letter != "?",
            unplaced=letter == "?",
            ready=letter == "+",
            restarted=letter == "r",
            unproven=letter in "sX",
        )
        for index, letter in enumerate(text)
        if letter != "-"
    )


def seen(failures: dict[str, Failures] | None = None, targets: dict[str, int] | None = None, **roles: str) -> Observed:
    """Roles whose target is as many replicas as there are letters, unless `targets` says otherwise."""
    return Observed(
        roles=tuple(
            ObservedRole(name=name, target=Target((targets or {}).get(name, len(text)), 0, "r"), pods=pods(name, text))
            for name, text in roles.items()
        ),
        failures=failures or {},
    )


def apply(name: str, replicas: int) -> ApplyRole:
    return ApplyRole(name, Target(replicas, 0, "r"))


def at(desired: Desired, observed: Observed, now: float = 0.0) -> list[Action]:
    return plan(desired, observed, now)


# ---- creation ----------------------------------------------------------------------------------------------------


def test_what_nothing_depends_on_is_created_first_all_replicas_at_once() -> None:
    assert at(SEED, Observed()) == [apply("prefill", 2), apply("decode", 1)]


def test_a_role_waits_for_every_replica_of_its_dependencies() -> None:
    observed = seen(prefill="+.", decode="+")
    assert at(SEED, observed) == []
    assert waiting_for(SEED.roles[0], SEED, observed) == ["prefill"]
    assert at(SEED, seen(prefill="++", decode="+")) == [apply("scheduler", 1)]


def test_a_ready_group_needs_nothing() -> None:
    assert at(SEED, seen(prefill="++", decode="+", scheduler="+")) == []
    assert group_ready(SEED, seen(prefill="++", decode="+", scheduler="+"))
    assert not group_ready(SEED, seen(prefill="++", decode="+~", scheduler="+"))


def test_a_flapping_dependency_does_not_touch_a_created_role() -> None:
    assert at(SEED, seen(prefill=".+", decode="+", scheduler="+")) == []
    more = group(replace(SEED.roles[0], replicas=3), *SEED.roles[1:])
    assert at(more, seen(prefill=".+", decode="+", scheduler="+")) == [apply("scheduler", 3)]
    newer = group(replace(SEED.roles[0], revision="s"), *SEED.roles[1:])
    applied = at(newer, seen(prefill=".+", decode="+", scheduler="+"))[-1]
    assert applied == ApplyRole("scheduler", Target(1, 0, "s"))


def test_a_dependency_of_no_replicas_is_ready() -> None:
    desired = group(role("a", 1, "b"), role("b", 0))
    assert at(desired, Observed()) == [apply("b", 0), apply("a", 1)]


def test_a_role_started_from_none_waits_as_a_new_one_does() -> None:
    desired = group(role("a", 2, "b"), role("b", 1))
    assert at(desired, seen(targets={"b": 1}, a="", b=".")) == []
    assert at(desired, seen(a="", b="+")) == [apply("a", 2)]


def test_drift_of_replicas_is_reverted() -> None:
    assert at(group(role("a", 2)), seen(a="+++")) == [apply("a", 2)]


# ---- ends --------------------------------------------------------------------------------------------------------


def test_deleting_ends_dependents_first() -> None:
    deleted = replace(SEED, deleted=True)
    assert at(deleted, seen(prefill="+.", decode="x", scheduler="+")) == [DeleteRole("scheduler")]
    observed = seen(prefill="+.", decode="x", scheduler="~")
    ending = replace(observed, roles=(*observed.roles[:2], replace(observed.roles[2], deleting=True)))
    assert at(deleted, ending) == []
    assert at(deleted, seen(prefill="+.", decode="x")) == [DeleteRole("decode"), DeleteRole("prefill")]
    assert at(deleted, Observed()) == []


def test_roles_gone_from_the_spec_end_dependents_first() -> None:
    front = ObservedRole(name="front", target=Target(1, 0, "r"), pods=pods("front", "+"), dependencies=("back",))
    back = ObservedRole(name="back", target=Target(1, 0, "r"), pods=pods("back", "+"))
    desired = group(role("a"))
    a = seen(a="+").roles
    assert at(desired, Observed(roles=(*a, back, front))) == [DeleteRole("front")]
    assert at(desired, Observed(roles=(*a, back, replace(front, deleting=True)))) == []
    assert at(desired, Observed(roles=(*a, back))) == [DeleteRole("back")]


def test_a_role_of_another_kind_is_made_anew_even_if_others_need_it() -> None:
    desired = group(role("a", 1, "b"), role("b", kind="Deployment"))
    observed = seen(a="+", b="+")
    assert at(desired, observed) == [DeleteRole("b")]
    going = replace(observed, roles=(observed.roles[0], replace(observed.roles[1], deleting=True)))
    assert at(desired, going) == []
    assert at(desired, seen(a="+")) == [apply("b", 1)]


# ---- restart policies --------------------------------------------------------------------------------------------


def test_back_off() -> None:
    assert [BACKOFF.delay_s(failures) for failures in range(1, 9)] == [0, 10, 20, 40, 80, 160, 300, 300]
    assert BACKOFF.delay_s(10_000) == 300


def test_failures_are_counted_until_nothing_has_failed_for_long() -> None:
    first = count_failure(None, 10.0, BACKOFF)
    second = count_failure(first, 609.0, BACKOFF)
    third = count_failure(second, 609.0 + 10 + 600, BACKOFF)
    assert (first, second, third) == (Failures(1, 10.0), Failures(2, 609.0), Failures(1, 1219.0))


def test_without_a_policy_nothing_is_made_anew() -> None:
    assert at(group(role("a", 3)), seen(a="+rx")) == []


INSTANCE = group(role("a", 3, restart_policy="RecreateRoleInstanceOnPodRestart"))


@pytest.mark.parametrize("letter", "rx")
def test_an_instance_is_made_anew_at_once_and_then_after_a_pause(letter: str) -> None:
    observed = seen(a=f"+{letter}+")
    first = Failures(1, 100.0, "a1")
    delete = DeletePod("a", "g-a-1", "a1", "it failed, and its role is restarted by instance")
    assert at(INSTANCE, observed, 100.0) == [RecordFailures("g-a-1", first), delete]
    # the runner ended between the two: the failure counts once
    assert at(INSTANCE, replace(observed, failures={"g-a-1": first}), 101.0) == [delete]
    # the pod that came instead fails too
    earlier = {"g-a-1": Failures(1, 90.0, "before")}
    second = Failures(2, 100.0, "a1")
    actions = at(INSTANCE, replace(observed, failures=earlier), 100.0)
    assert actions[0] == RecordFailures("g-a-1", second)
    assert [type(each) for each in actions[1:]] == [Wait] and actions[1].until == 110.0  # type: ignore[union-attr]
    assert at(INSTANCE, replace(observed, failures={"g-a-1": second}), 110.0) == [delete]


def test_no_pod_is_made_anew_that_is_to_end_or_is_ending() -> None:
    assert at(INSTANCE, seen(a="+~+")) == []
    assert at(INSTANCE, seen(targets={"a": 3}, a="+++x")) == []


def test_records_of_what_is_no_longer_there_are_forgotten() -> None:
    records = {"g-a-7": Failures(1, 0.0), "g-a-2": Failures(1, 0.0), "g": Failures(1, 0.0)}
    assert at(INSTANCE, seen(records, a="+++")) == [RecordFailures("g-a-7", None), RecordFailures("g", None)]


WHOLE = group(role("a", 1, "b"), role("b", 2, restart_policy="RecreateRBGOnPodRestart"))


def test_the_whole_group_is_restarted_in_order() -> None:
    pending = {"g": Failures(1, 100.0, "b0", pending=True)}
    assert at(WHOLE, seen(a="+", b="x+"), 100.0) == [RecordFailures("g", pending["g"]), apply("a", 0)]
    assert at(WHOLE, seen(pending, targets={"a": 0}, a="~", b="x+"), 101.0) == []
    assert at(WHOLE, seen(pending, a="", b="x+"), 101.0) == [apply("b", 0)]
    assert at(WHOLE, seen(pending, targets={"b": 0}, a="", b="~~"), 101.0) == []
    done = {"g": Failures(1, 100.0, "b0")}
    assert at(WHOLE, seen(pending, a="", b=""), 102.0) == [RecordFailures("g", done["g"]), apply("b", 2)]
    assert at(WHOLE, seen(done, targets={"a": 0, "b": 2}, a="", b="+."), 103.0) == []
    assert at(WHOLE, seen(done, a="", b="++"), 103.0) == [apply("a", 1)]


def test_what_fails_before_it_was_ever_ready_concerns_only_itself() -> None:
    assert at(WHOLE, seen(a="+", b="s+"), 100.0) == []
    assert at(WHOLE, seen(a="+", b="X+"), 101.0) == []
    assert at(INSTANCE, seen(a="+sX"), 102.0) == []


def test_a_failure_that_was_recorded_counts_whatever_the_pod_looks_like_later() -> None:
    recorded = {"g-a-1": Failures(2, 100.0, "a1")}
    for text in ("+r+", "+++", "+.+", "+s+", "+x+"):
        (wait,) = at(INSTANCE, seen(recorded, a=text), 101.0)
        assert isinstance(wait, Wait) and wait.until == 110.0
        (deleted,) = at(INSTANCE, seen(recorded, a=text), 110.0)
        assert isinstance(deleted, DeletePod) and deleted.pod == "g-a-1"
    assert at(INSTANCE, seen(recorded, a="+~+"), 110.0) == []
    of_another = {"g-a-1": Failures(2, 100.0, "before")}
    assert at(INSTANCE, seen(of_another, a="+++"), 110.0) == []


def test_a_restart_of_the_group_that_was_asked_for_waits_and_survives_that_the_pod_recovers() -> None:
    again = {"g": Failures(3, 100.0, "b0", pending=True)}
    (wait,) = at(WHOLE, seen(again, a="+", b="++"), 101.0)
    assert isinstance(wait, Wait) and wait.until == 120.0
    assert at(WHOLE, seen(again, a="+", b="++"), 120.0) == [apply("a", 0)]


def test_deleting_a_pod_restarts_no_group() -> None:
    assert at(WHOLE, seen(a="+", b="+~")) == []
    assert at(WHOLE, seen(targets={"b": 2}, a="+", b="+-")) == []


def test_a_restart_of_the_group_is_not_held_up_by_an_evicted_pod_of_a_deployment() -> None:
    """Nobody else deletes it, and counted again it would restart the group for ever."""
    roles = group(role("a", kind="Deployment", restart_policy="RecreateRBGOnPodRestart"))
    evicted = PodState(name="g-a-z", index=-1, uid="z", phase="exited")
    there = ObservedRole(name="a", kind="Deployment", target=Target(1, 0, "r"), pods=(evicted,))
    failed = Failures(1, 0.0, "z", pending=True)
    deleted = DeletePod("a", "g-a-z", "z", "it ended, and its ReplicaSet has made another")
    actions = at(roles, Observed(roles=(there,)))
    assert actions == [RecordFailures("g", failed), deleted, apply("a", 0)]
    empty = Observed(roles=(replace(there, target=Target(0, 0, "r"), pods=()),), failures={"g": failed})
    assert at(roles, empty) == [RecordFailures("g", replace(failed, pending=False)), apply("a", 1)]
    unproven = Observed(roles=(replace(there, pods=(replace(evicted, unproven=True),)),))
    assert at(roles, unproven) == [deleted]


def test_a_restart_is_given_up_with_its_policy() -> None:
    pending = {"g": Failures(3, 100.0, "b0", pending=True)}
    desired = group(role("a", 1, "b"), role("b", 2))
    assert at(desired, seen(pending, a="+", b="++"), 200.0) == [RecordFailures("g", None)]


# ---- scaling -----------------------------------------------------------------------------------------------------


def coordinated(progression: Any = "OrderScheduled", skew: int = 34, **replicas: int) -> Desired:
    scaling = CoordinatedScaling(max_skew=skew, progression=progression)
    roles = tuple(role(name, number) for name, number in replicas.items())
    return group(*roles, coordinations=(Coordination(roles=tuple(replicas), scaling=scaling),))


def test_scaling_without_coordination_goes_straight_there() -> None:
    assert at(group(role("a", 5, "b"), role("b", 2)), seen(a="+", b=".++")) == [apply("b", 2), apply("a", 5)]


def test_coordinated_roles_come_in_step() -> None:
    desired = coordinated(p=6, d=3)
    assert at(desired, Observed()) == [apply("p", 2), apply("d", 1)]
    assert at(desired, seen(p="..", d="?")) == [apply("d", 2)]  # the pod without a node holds p back
    assert at(desired, seen(p="..", d=".")) == [apply("p", 4), apply("d", 2)]
    ready = coordinated("OrderReady", p=6, d=3)
    assert at(ready, seen(p="..", d=".")) == []
    assert at(ready, seen(p="++", d=".")) == [apply("d", 2)]
    assert at(ready, seen(p="++", d="+")) == [apply("p", 4), apply("d", 2)]


def test_roles_of_one_replica_come_whatever_the_skew() -> None:
    assert at(coordinated(skew=1, p=1, d=1), Observed()) == [apply("p", 1), apply("d", 1)]


def test_a_role_that_waits_for_another_holds_it_not_back() -> None:
    desired = coordinated("OrderReady", p=4, d=4)
    desired = replace(desired, roles=(desired.roles[0], replace(desired.roles[1], dependencies=("p",))))
    assert at(desired, Observed()) == [apply("p", 4)]
    assert at(desired, seen(p="++++")) == [apply("d", 4)]


def test_coordinated_roles_go_in_step() -> None:
    desired = coordinated(skew=50, p=4, d=2)
    assert at(desired, seen(p="+" * 8, d="+" * 4)) == [apply("p", 6), apply("d", 3)]
    ending = seen(targets={"p": 6, "d": 3}, p="++++++~~", d="+++~")
    assert at(desired, ending) == []  # what still ends counts as there
    assert at(desired, seen(p="+" * 6, d="+++")) == [apply("p", 4), apply("d", 2)]
    assert at(coordinated(p=0, d=0), seen(p="+" * 8, d="+" * 4)) == [apply("p", 0), apply("d", 0)]


def test_limits() -> None:
    assert upper_limits({"a": Share(0, 1), "b": Share(0, 1)}, 0) == {"a": 1, "b": 1}
    assert upper_limits({"a": Share(3, 10), "b": Share(1, 3)}, 1) == {"a": 4, "b": 0}
    assert upper_limits({"a": Share(2, 4), "b": Share(4, 4)}, 10)["a"] == 4
    assert lower_limits({"a": Share(8, 4), "b": Share(4, 2)}, 25) == {"a": 7, "b": 3}
    assert lower_limits({"a": Share(8, 4), "b": Share(2, 2)}, 25)["a"] == 4


@pytest.mark.parametrize(
    ("unavailable", "surge", "replicas", "expected"),
    [
        (1, 0, 4, (1, 0)),
        ("25%", 0, 7, (1, 0)),
        ("25%", 0, 3, (1, 0)),  # 0 and 0: nothing could ever go on
        ("0%", "10%", 3, (0, 1)),
        (9, 9, 3, (3, 3)),
        (0, 1, 0, (1, 0)),
    ],
)
def test_what_a_rollout_may_take(unavailable: Any, surge: Any, replicas: int, expected: tuple[int, int]) -> None:
    assert budget(Update(max_unavailable=unavailable, max_surge=surge), replicas) == expected


def test_percentages() -> None:
    assert [amount("30%", 4, round_up=up) for up in (True, False)] == [2, 1]
    assert amount("50%", 4, round_up=True) == 2


# ---- gangs -------------------------------------------------------------------------------------------------------


def test_a_gang_counts_only_roles_that_are_due() -> None:
    assert members(SEED, Observed()) == {"prefill": 2, "decode": 1}
    assert min_member(SEED, seen(prefill="+.", decode="+")) == 3
    assert min_member(SEED, seen(prefill="++", decode="+")) == 4
    # once created a role goes on counting, whatever its dependencies do
    assert min_member(SEED, seen(prefill="+.", decode="+", scheduler=".")) == 4


def test_a_gang_of_least_members() -> None:
    desired = group(role("p", 4, gang_min=2), role("d", 2, size=2), role("e", 0), role("f", 3, gang_min=0))
    assert members(desired, Observed()) == {"p": 2, "d": 4, "f": 0}
    assert members(group(role("p", 1, gang_min=2)), Observed()) == {"p": 1}
    assert min_member(group(role("p", 0)), Observed()) == 1


# ---- status ------------------------------------------------------------------------------------------------------


def told(desired: Desired, observed: Observed) -> dict[str, tuple[bool, str, str]]:
    status = group_status(desired, observed, 7, 0.0)
    assert status.observed_generation == 7
    return {each.type: (each.status, each.reason, each.message) for each in status.conditions}


def test_the_status_of_a_starting_group_says_what_it_waits_for() -> None:
    conditions = told(SEED, seen(prefill="+?", decode="."))
    assert conditions["Ready"] == (
        False,
        "RoleNotReady",
        "scheduler waits until decode, prefill is ready; prefill has 1 of 2 replicas ready, no node has room for"
        " g-prefill-1; decode has 0 of 1 replicas ready; see the events and logs of g-decode-0",
    )
    assert conditions["Progressing"] == (True, "Reconciling", "still at work on scheduler, prefill, decode")
    assert conditions["RollingUpdateInProgress"][0] is False
    assert conditions["RestartInProgress"][:2] == (False, "NoRestart")


def test_the_status_of_a_ready_group() -> None:
    observed = seen(prefill="++", decode="+", scheduler="+")
    conditions = told(SEED, observed)
    assert conditions["Ready"][:2] == (True, "AllRolesReady")
    assert conditions["Progressing"][:2] == (True, "Complete")
    numbers = [
        (each.name, each.replicas, each.ready, each.updated) for each in group_status(SEED, observed, 1, 0).roles
    ]
    assert numbers == [("scheduler", 1, 1, 1), ("prefill", 2, 2, 2), ("decode", 1, 1, 1)]


def test_the_status_tells_of_restarts() -> None:
    again = {"g": Failures(3, 100.0, "b0", pending=True)}
    assert told(WHOLE, seen(again, a="+", b="x+"))["RestartInProgress"] == (
        True,
        "RBGRestart",
        "failure 3 in a row: the whole group is made anew after a pause of 20 s; see the logs of its pods",
    )
    done = {"g": Failures(3, 100.0, "b0")}
    assert told(WHOLE, seen(done, a="", b="+."))["RestartInProgress"][0] is True  # a is not started yet
    assert told(WHOLE, seen(done, a="+", b="++"))["RestartInProgress"][:2] == (False, "RBGRestartCompleted")
    assert told(INSTANCE, seen(a="+xx"))["RestartInProgress"] == (
        True,
        "RoleInstanceRestart",
        "g-a-1 and 1 more failed and is made anew; see its logs",
    )


# ---- order -------------------------------------------------------------------------------------------------------


def test_order_of_roles() -> None:
    assert start_order({"a": ["c"], "b": [], "c": ["b"]}) == ["b", "c", "a"]
    assert find_cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert find_cycle({"a": ["a"]}) == ["a", "a"]
    assert find_cycle({"a": ["b"], "b": ["a"], "c": ["d"], "d": ["c"]}) in (["a", "b", "a"], ["c", "d", "c"])
    assert find_cycle({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []
    with pytest.raises(ValueError, match="a -> b -> a"):
        start_order({"a": ["b"], "b": ["a"]})
