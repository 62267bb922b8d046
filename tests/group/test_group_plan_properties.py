"""The plan in a world where anything happens: it never breaks an order, and once the world is calm it converges."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

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
    restart_at,
    restart_unit,
    role_ready,
)

BACKOFF = Backoff(base_s=10, cap_s=40, stable_s=100)
POLICIES = ("None", "RecreateRBGOnPodRestart", "RecreateRoleInstanceOnPodRestart")
Key = tuple[str, int]


@dataclass
class World:
    """A runner that does what the plan says, and the pods it has."""

    desired: Desired
    now: float = 0.0
    phase: dict[Key, str] = field(default_factory=dict)
    ready: set[Key] = field(default_factory=set)
    started: dict[Key, float] = field(default_factory=dict)
    failures: dict[str, Failures] = field(default_factory=dict)
    endpoints: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def observe(self) -> Observed:
        pods = tuple(PodState(*key, phase, key in self.ready) for key, phase in self.phase.items())  # type: ignore[arg-type]
        return Observed(pods, dict(self.failures), dict(self.endpoints))

    def step(self) -> list[Action]:
        observed = self.observe()
        actions = plan(self.desired, observed, self.now, BACKOFF)
        assert actions == plan(self.desired, observed, self.now, BACKOFF)
        for action in actions:
            self.check(action, observed)
        for action in actions:
            self.apply(action)
        return actions

    def check(self, action: Action, observed: Observed) -> None:
        roles = {role.name: role for role in self.desired.roles}
        match action:
            case StartPod(role, index):
                assert not self.desired.deleted and index < roles[role].replicas
                phase = self.phase.get((role, index))
                assert phase in (None, "exited")
                if not any(pod.role == role for pod in observed.pods):
                    assert all(role_ready(roles[name], observed) for name in roles[role].dependencies)
                if phase == "exited":
                    failures = self.failures.get(restart_unit(self.desired, role, index))
                    assert self.now >= restart_at(failures, BACKOFF)
            case StopPod(role, index):
                assert self.phase[role, index] in ("running", "exited")
                if self.desired.deleted:
                    dependents = {each.name for each in self.desired.roles if role in each.dependencies}
                    assert not dependents & {pod.role for pod in observed.pods}
            case SetEndpoints(_, pods):
                assert set(pods) <= {f"g-{role}-{index}" for role, index in self.ready}
            case Wait(_, until):
                assert until > self.now

    def apply(self, action: Action) -> None:
        match action:
            case StartPod(role, index):
                self.phase[role, index] = "running"
                self.started[role, index] = self.now
            case StopPod(role, index):
                if self.phase[role, index] == "exited":
                    self.forget((role, index))
                else:
                    self.phase[role, index] = "stopping"
                    self.ready.discard((role, index))
            case SetEndpoints(service, pods):
                self.endpoints[service] = pods

    def forget(self, key: Key) -> None:
        del self.phase[key]
        self.failures.pop(f"g-{key[0]}-{key[1]}", None)

    def exit(self, key: Key) -> None:
        """The pod ends by itself."""
        self.phase[key] = "exited"
        self.ready.discard(key)
        unit = restart_unit(self.desired, *key)
        self.failures[unit] = count_failure(self.failures.get(unit), self.now - self.started[key], self.now, BACKOFF)

    def calm(self) -> None:
        """Nothing goes wrong any more: what stops is gone, what runs becomes ready, time passes."""
        for _ in range(60):
            actions = self.step()
            for key in [key for key, phase in self.phase.items() if phase == "stopping"]:
                self.forget(key)
            self.ready = {key for key, phase in self.phase.items() if phase == "running"}
            waits = [action.until for action in actions if isinstance(action, Wait)]
            if waits:
                self.now = max(waits)
            if not actions and not plan(self.desired, self.observe(), self.now, BACKOFF):
                return
        raise AssertionError(f"does not converge: {self}")


@st.composite
def groups(draw: st.DrawFn) -> Desired:
    names = draw(st.permutations(["a", "b", "c", "d"]))[: draw(st.integers(1, 4))]
    roles = tuple(
        DesiredRole(
            name,
            draw(st.integers(0, 3)),
            tuple(draw(st.sets(st.sampled_from(names[:i])))) if i else (),
            draw(st.sampled_from(POLICIES)),  # type: ignore[arg-type]
            {"role": name},
        )
        for i, name in enumerate(names)
    )
    services = (DesiredService("svc", {"role": names[0]}),)
    return Desired("g", tuple(draw(st.permutations(roles))), services)


def disturb(world: World, draw: st.DataObject) -> None:
    """One thing that can happen in the world."""
    running = sorted(key for key, phase in world.phase.items() if phase == "running")
    stopping = sorted(key for key, phase in world.phase.items() if phase == "stopping")
    event = draw.draw(st.sampled_from(("plan", "ready", "unready", "exit", "gone", "time", "scale")))
    if event == "plan":
        world.step()
    elif event == "time":
        world.now += draw.draw(st.sampled_from((1.0, 10.0, 200.0)))
    elif event == "scale":
        role = draw.draw(st.sampled_from(world.desired.roles))
        scaled = DesiredRole(
            role.name, draw.draw(st.integers(0, 3)), role.dependencies, role.restart_policy, role.labels
        )
        roles = tuple(scaled if each.name == role.name else each for each in world.desired.roles)
        world.desired = Desired("g", roles, world.desired.services)
    elif event == "gone" and stopping:
        world.forget(draw.draw(st.sampled_from(stopping)))
    elif running and event in ("ready", "unready", "exit"):
        key = draw.draw(st.sampled_from(running))
        if event == "exit":
            world.exit(key)
        elif event == "ready":
            world.ready.add(key)
        else:
            world.ready.discard(key)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(groups(), st.data())
def test_converges_from_anywhere_and_then_rests(desired: Desired, data: st.DataObject) -> None:
    world = World(desired)
    for _ in range(data.draw(st.integers(0, 40))):
        disturb(world, data)
    world.calm()
    assert group_ready(world.desired, world.observe())
    assert plan(world.desired, world.observe(), world.now, BACKOFF) == []
    first = world.desired.services[0].selector["role"]
    replicas = next(role.replicas for role in world.desired.roles if role.name == first)
    assert world.endpoints.get("svc", ()) == tuple(f"g-{first}-{index}" for index in range(replicas))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(groups(), st.data())
def test_a_deleted_group_ends_from_anywhere(desired: Desired, data: st.DataObject) -> None:
    world = World(desired)
    for _ in range(data.draw(st.integers(0, 40))):
        disturb(world, data)
    world.desired = Desired("g", world.desired.roles, world.desired.services, deleted=True)
    world.calm()
    assert world.phase == {}
    assert not any(world.endpoints.values())
