"""The plan in a world where anything happens: it keeps every limit at every step, and once the world is calm it
converges, with a controller of ours and with one that does a single thing at a time."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from group_world import World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from diptych.group.actions import (
    Action,
    ApplyRole,
    Backoff,
    CoordinatedScaling,
    CoordinatedUpdate,
    Coordination,
    DeletePod,
    Desired,
    DesiredRole,
    Observed,
    RecordFailures,
    Update,
    Wait,
)
from diptych.group.coordinate import amount
from diptych.group.plan import group_ready, plan, replicas_now, role_ready
from diptych.group.restart import restart_at

BACKOFF = Backoff(base_s=10, cap_s=40, stable_s=100)
POLICIES = ("None", "None", "RecreateRBGOnPodRestart", "RecreateRoleInstanceOnPodRestart")


@st.composite
def updates(draw: st.DrawFn) -> Update:
    unavailable = draw(st.sampled_from((0, 1, 1, 2, "25%", "50%")))
    return Update(
        partition=draw(st.sampled_from((0, 0, 0, 1, "50%"))),
        max_unavailable=unavailable,
        max_surge=draw(st.sampled_from((1, 2, "30%") if unavailable == 0 else (0, 0, 1))),
        min_ready_s=draw(st.sampled_from((0.0, 0.0, 5.0))),
    )


@st.composite
def groups(draw: st.DrawFn) -> Desired:
    names = draw(st.permutations(["a", "b", "c"]))[: draw(st.integers(1, 3))]
    roles = tuple(
        DesiredRole(
            name=name,
            replicas=draw(st.integers(0, 5)),
            dependencies=tuple(sorted(draw(st.sets(st.sampled_from(names[:i]))))) if i else (),
            revision="r0",
            restart_policy=draw(st.sampled_from(POLICIES)),
            update=draw(updates()),
        )
        for i, name in enumerate(names)
    )
    coordination = Coordination(
        roles=tuple(names),
        update=draw(st.sampled_from((None, CoordinatedUpdate(max_skew=10), CoordinatedUpdate(max_skew=40)))),
        scaling=draw(
            st.sampled_from(
                (None, CoordinatedScaling(max_skew=20), CoordinatedScaling(max_skew=34, progression="OrderReady"))
            )
        ),
    )
    coordinations = (coordination,) if draw(st.booleans()) else ()
    return Desired(group="g", roles=tuple(draw(st.permutations(roles))), coordinations=coordinations, backoff=BACKOFF)


# ---- what must hold whenever the plan is asked -------------------------------------------------------------------


def asked(world: World) -> list[Action]:
    """The plan's answer, checked."""
    observed = world.observe()
    actions = plan(world.desired, observed, world.now)
    assert actions == plan(world.desired, observed, world.now)
    deleted = [action.uid for action in actions if isinstance(action, DeletePod)]
    assert len(deleted) == len(set(deleted))
    check_creation(world.desired, observed, actions)
    if not restarting(world, actions):
        check_rollouts(world, observed, actions)
        check_scaling(world.desired, observed, actions)
    check_back_off(world, observed, actions)
    return actions


def restarting(world: World, actions: list[Action]) -> bool:
    """Whether the group is being emptied, and nothing else is done."""
    records = [action.failures for action in actions if isinstance(action, RecordFailures) and action.unit == "g"]
    record = records[-1] if records else world.failures.get("g")
    return record is not None and record.pending and world.now >= restart_at(record, BACKOFF)


def check_creation(desired: Desired, observed: Observed, actions: list[Action]) -> None:
    roles = {role.name: role for role in desired.roles}
    for action in actions:
        if isinstance(action, ApplyRole) and action.target.replicas:
            seen = observed.role(action.role)
            if seen is None or (not seen.pods and not seen.target.replicas):
                assert all(role_ready(roles[name], observed) for name in roles[action.role].dependencies)


def check_rollouts(world: World, observed: Observed, actions: list[Action]) -> None:
    """maxUnavailable, partition, maxSurge, pause and maxSkew: of what the plan lets go, not of what breaks."""
    targets = {action.role: action.target for action in actions if isinstance(action, ApplyRole)}
    named = {action.uid for action in actions if isinstance(action, DeletePod) and "revision" in action.reason}
    going: dict[str, int] = {}
    for role in world.desired.roles:
        seen = observed.role(role.name)
        if seen is None or seen.deleting or not role.replicas:
            continue
        target, goal = targets.get(role.name, seen.target), replicas_now(world.desired, observed)[role.name]
        floor = min(amount(role.update.partition, goal, round_up=True), goal)
        most, surge = limits(role, goal)
        assert goal <= target.replicas <= goal + surge
        pods = {pod.index: pod for pod in seen.pods if pod.phase != "stopping"}
        covered = {
            i
            for i, pod in pods.items()
            if i < goal and (pod.uid in named or (i >= target.partition and not target.on_delete))
            if pod.revision != target.revision
        }
        going[role.name] = len(covered)
        if role.update.paused or world.desired.paused:
            assert not named & {pod.uid for pod in pods.values()}
            assert target.revision == seen.target.revision
            assert not covered
            continue
        assert all(i >= floor for i in covered)
        if target.on_delete:  # whatever is made anew gets the new revision: nothing below the partition may be
            assert all(i in pods and pods[i].ready and pods[i].phase == "running" for i in range(floor))
        available = {
            i
            for i, pod in pods.items()
            if pod.ready and pod.phase == "running"
            if not role.update.min_ready_s or world.now >= pod.ready_since + role.update.min_ready_s
        }
        if covered & {i for i in pods if pods[i].ready}:
            staying = {
                i
                for i in available - covered
                if i < goal or (i < target.replicas and pods[i].revision == role.revision)
            }
            assert len(staying) >= goal - most
    for coordination in world.desired.coordinations:
        if coordination.update is not None:
            check_skew(world, observed, coordination, going)


def limits(role: DesiredRole, replicas: int) -> tuple[int, int]:
    most = amount(role.update.max_unavailable, replicas, round_up=False)
    surge = min(amount(role.update.max_surge, replicas, round_up=True), replicas)
    return (most or (0 if surge else 1)), surge


def check_skew(world: World, observed: Observed, coordination: Coordination, going: dict[str, int]) -> None:
    assert coordination.update is not None
    updated: dict[str, Fraction] = {}
    ahead: dict[str, tuple[Fraction, int]] = {}
    for role in world.desired.roles:
        seen, goal = observed.role(role.name), replicas_now(world.desired, observed).get(role.name, 0)
        if role.name not in going or seen is None or not goal:
            continue
        floor = min(amount(role.update.partition, goal, round_up=True), goal)
        alive = [pod for pod in seen.pods if pod.phase != "stopping" and pod.index < goal]
        new = [pod for pod in alive if pod.revision == role.revision]
        if not any(pod.revision != role.revision and pod.index >= floor for pod in alive):
            continue
        arrived = [
            pod
            for pod in new
            if pod.ready and pod.phase == "running"
            if not role.update.min_ready_s or world.now >= pod.ready_since + role.update.min_ready_s
        ]
        updated[role.name] = Fraction(len(arrived), goal)
        if going[role.name]:
            ahead[role.name] = Fraction(len(new) + going[role.name], goal), goal
    for name, (share, goal) in ahead.items():
        others = [each for other, each in updated.items() if other != name]
        if others:
            skew = Fraction(coordination.update.max_skew, 100)
            assert share - min(others) <= max(skew, Fraction(1, goal))


def check_scaling(desired: Desired, observed: Observed, actions: list[Action]) -> None:
    """A coordinated role is not asked for pods that would put it too far ahead of another."""
    waiting_or_done = replicas_now(desired, observed)
    for coordination in desired.coordinations:
        if coordination.scaling is None:
            continue
        ready = coordination.scaling.progression == "OrderReady"
        goals = {role.name: role.replicas for role in desired.roles if role.replicas and role.name in waiting_or_done}
        arrived = {}
        for name, goal in goals.items():
            seen = observed.role(name)
            pods = [pod for pod in (seen.pods if seen else ()) if pod.phase == "running" and pod.index < goal]
            arrived[name] = Fraction(sum(pod.ready if ready else pod.scheduled for pod in pods), goal)
        for action in actions:
            if not isinstance(action, ApplyRole) or action.role not in goals:
                continue
            seen = observed.role(action.role)
            goal, before = goals[action.role], seen.target.replicas if seen else 0
            now = min(action.target.replicas, waiting_or_done[action.role])
            free = [
                each
                for name, each in arrived.items()
                if name != action.role and each < 1 and waiting_or_done[name] and not shrinking(observed, name, goals)
            ]
            if before < now and free:
                most = max(Fraction(coordination.scaling.max_skew, 100), Fraction(1, goal))
                assert Fraction(now, goal) - min(free) <= most


def shrinking(observed: Observed, name: str, goals: dict[str, int]) -> bool:
    seen = observed.role(name)
    return seen is not None and seen.target.replicas > goals[name]


def check_back_off(world: World, observed: Observed, actions: list[Action]) -> None:
    for action in actions:
        if isinstance(action, DeletePod) and "failed" in action.reason:
            failures = world.failures.get(action.pod)
            if failures is not None and failures.uid == action.uid:
                assert world.now >= restart_at(failures, BACKOFF)


# ---- the world's course ------------------------------------------------------------------------------------------

EVENTS = (
    *("plan",) * 6,
    *("sync",) * 8,
    *("ready",) * 6,
    *("gone",) * 3,
    *("unready", "crash", "lost", "scheduled", "half a plan", "time"),
    *("replicas", "revision", "partition", "pause", "limits", "roles"),
)


def disturb(world: World, data: st.DataObject) -> None:
    event = data.draw(st.sampled_from(EVENTS))
    roles = {role.name: role for role in world.desired.roles}
    if event == "plan":
        world.carry_out(asked(world))
    elif event == "half a plan":
        actions = asked(world)
        world.carry_out(actions[: data.draw(st.integers(0, len(actions)))])
    elif event == "sync" and world.workloads:
        world.sync(data.draw(st.sampled_from(sorted(world.workloads))))
    elif event == "time":
        world.now += data.draw(st.sampled_from((1.0, 10.0, 200.0)))
    elif event == "roles":
        change_roles(world, data)
    elif event in ("replicas", "revision", "partition", "pause", "limits"):
        role = roles[data.draw(st.sampled_from(sorted(roles)))]
        edited: Any = {
            "replicas": lambda: replace(role, replicas=data.draw(st.integers(0, 5))),
            "revision": lambda: replace(role, revision=data.draw(st.sampled_from(("r0", "r1", "r2")))),
            "partition": lambda: replace(role, update=replace(role.update, partition=data.draw(st.integers(0, 3)))),
            "limits": lambda: replace(role, update=replace(data.draw(updates()), paused=role.update.paused)),
            "pause": lambda: replace(role, update=replace(role.update, paused=not role.update.paused)),
        }[event]()
        roles[role.name] = edited
        world.desired = replace(world.desired, roles=tuple(roles[each.name] for each in world.desired.roles))
    elif world.all_pods():
        role_name, pod = data.draw(st.sampled_from(world.all_pods()))
        world.change(role_name, pod, event)


def change_roles(world: World, data: st.DataObject) -> None:
    """A role is taken out of the spec, or one that was comes back; one may forget a dependency."""
    roles = {role.name: role for role in world.desired.roles}
    name = data.draw(st.sampled_from(sorted({*roles, *world.taken_out})))
    if name in world.taken_out:
        roles[name] = world.taken_out.pop(name)
    elif len(roles) > 1:
        world.taken_out[name] = roles.pop(name)
    world.desired = replace(
        world.desired,
        roles=tuple(
            replace(each, dependencies=tuple(sorted({*each.dependencies} & {*roles}))) for each in roles.values()
        ),
        coordinations=tuple(replace(each, roles=tuple(sorted(roles))) for each in world.desired.coordinations),
    )


def calm(world: World) -> None:
    """Nothing goes wrong any more, and time passes."""
    for _ in range(400):
        before = world.observe()
        actions = asked(world)
        world.carry_out(actions)
        for role in list(world.workloads):
            world.sync(role)
        for role, pod in world.all_pods():
            world.change(role, pod, "gone" if pod.phase == "stopping" else "ready")
        if world.observe() == before:
            waits = [action.until for action in actions if isinstance(action, Wait)]
            exited = any(pod.phase == "exited" for _, pod in world.all_pods())
            if not waits and not exited:
                return
            world.now = min(waits, default=world.now + 50.0)
    raise AssertionError(f"does not converge: {world}")


COURSE = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("naive", [False, True])
@COURSE
@given(desired=groups(), data=st.data())
def test_keeps_its_limits_converges_and_then_rests(naive: bool, desired: Desired, data: st.DataObject) -> None:
    world = World(desired, naive)
    for _ in range(data.draw(st.integers(0, 60))):
        disturb(world, data)
    unpaused = tuple(replace(role, update=replace(role.update, paused=False)) for role in world.desired.roles)
    world.desired = replace(world.desired, roles=unpaused)
    calm(world)
    assert group_ready(world.desired, world.observe())
    assert plan(world.desired, world.observe(), world.now) == []
    for role in world.desired.roles:
        target = world.workloads[role.name].target
        floor = min(amount(role.update.partition, role.replicas, round_up=True), role.replicas)
        assert (target.replicas, target.revision, target.on_delete) == (role.replicas, role.revision, False)
        assert all(pod.revision == role.revision for i, pod in world.workloads[role.name].pods.items() if i >= floor)


@COURSE
@given(desired=groups(), data=st.data())
def test_a_deleted_group_ends_from_anywhere_dependents_first(desired: Desired, data: st.DataObject) -> None:
    world = World(desired, naive=False)
    for _ in range(data.draw(st.integers(0, 40))):
        disturb(world, data)
    world.desired = replace(world.desired, deleted=True)
    needs = {name: each.dependencies for name, each in world.workloads.items()}  # of roles that are gone from the spec
    needs |= {role.name: role.dependencies for role in world.desired.roles}
    for _ in range(60):
        before = {role for role, each in world.workloads.items() if not each.deleting}
        world.carry_out(plan(world.desired, world.observe(), world.now))
        ending = {role for role, each in world.workloads.items() if each.deleting and role in before}
        for role in world.workloads:
            if world.workloads[role].pods:
                assert not ending & set(needs[role])
        for role in list(world.workloads):
            world.sync(role)
        for role_name, pod in world.all_pods():
            world.change(role_name, pod, "gone")
    assert not world.workloads
