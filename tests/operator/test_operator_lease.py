"""Leader election: one leads; another follows soon when it dies, at once when it stops; a leader that cannot renew
writes nothing."""

from __future__ import annotations

from typing import Any

from driver import DirectApi
from hypothesis import given, settings
from hypothesis import strategies as st
from kube_world import NAMESPACE, World, group, role, until

from diptych.errors import Unavailable
from diptych.group.operator.api import Conflict
from diptych.group.operator.lease import DURATION_S, RENEW_DEADLINE_S, RETRY_S, Election
from diptych.group.operator.main import COMPONENT, Operator
from diptych.group.operator.resources import Json, Kind
from diptych.testing.kube import Cluster


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class LeaseApi(DirectApi):
    """Of one candidate, which may be cut off, or get no answers."""

    answers = True

    def within(self, timeout_s: float) -> LeaseApi:
        return self

    def create(self, kind: Kind, obj: Json) -> Json:
        return self._write("create", kind, obj["metadata"]["name"], lambda: self._create(kind, obj))

    def _create(self, kind: Kind, obj: Json) -> Json:
        return self._api.create(f"{kind.api_version}/{kind.kind}", "default", self._typed(kind, obj))

    @staticmethod
    def _typed(kind: Kind, obj: Json) -> Json:
        return {"apiVersion": kind.api_version, "kind": kind.kind, **obj}

    def _call(self, call: Any) -> Any:
        answer = super()._call(call)
        if not self.answers:
            raise Unavailable("no answer")
        return answer


class Candidates:
    def __init__(self, number: int) -> None:
        self.cluster = Cluster(clock="manual")
        self.clock = Clock()
        self.lost: list[int] = []
        self.apis = [LeaseApi(self.cluster) for _ in range(number)]
        self.all = [self._candidate(i) for i in range(number)]

    def _candidate(self, i: int) -> Election:
        def on_lost() -> None:
            self.lost.append(i)

        return Election(
            self.apis[i],  # type: ignore[arg-type]
            "default",
            "op",
            f"op-{i}",
            on_lead=lambda: None,
            on_lost=on_lost,
            clock=self.clock,
        )

    def leaders(self) -> list[int]:
        return [i for i, each in enumerate(self.all) if each.may_write()]

    def look(self, *which: int) -> None:
        for i in which:
            self.all[i].look()


def test_one_leads_and_another_follows_when_the_lease_runs_out() -> None:
    two = Candidates(2)
    two.look(0, 1)
    assert two.leaders() == [0]
    for _ in range(20):  # the first renews
        two.clock.now += 1
        two.look(0, 1)
        assert two.leaders() == [0]
    died = two.clock.now
    while two.leaders() != [1]:
        two.clock.now += two.all[1].pause_s()
        two.look(1)
    assert two.clock.now - died <= DURATION_S + 0.1
    spec = two.cluster.api.get("Lease", "default", "op")["spec"]
    assert spec["holderIdentity"] == "op-1" and spec["leaseTransitions"] == 1


def test_a_leader_that_cannot_renew_stops_before_another_may_begin() -> None:
    two = Candidates(2)
    two.look(0, 1)
    two.apis[0].down = True
    two.clock.now += RENEW_DEADLINE_S - 0.1
    two.look(0, 1)
    assert two.leaders() == [0] and two.lost == []
    two.clock.now += 0.1
    assert two.leaders() == []  # even while its renewal hangs
    two.look(0)
    assert two.lost == [0]


def test_a_conflict_is_no_loss_but_a_thief_is() -> None:
    one = Candidates(1)
    one.look(0)
    lease = one.cluster.api.get("Lease", "default", "op")
    one.apis[0].replace = lambda kind, obj: _raise_conflict()  # type: ignore[method-assign]
    one.clock.now += 1
    one.look(0)
    assert one.leaders() == [0] and one.lost == []
    del one.apis[0].replace
    one.cluster.api.update("Lease", "default", "op", {**lease, "spec": {**lease["spec"], "holderIdentity": "thief"}})
    one.look(0)
    assert one.leaders() == [] and one.lost == [0]


def _raise_conflict() -> Json:
    raise Conflict("somebody wrote to the lease")


def test_a_lease_that_was_given_back_is_taken_at_the_next_look() -> None:
    two = Candidates(2)
    two.look(0, 1)
    two.all[0].start()
    two.all[0].stop()
    two.clock.now += RETRY_S
    two.look(1)
    assert two.leaders() == [1]


def test_the_same_identity_goes_on_after_a_restart() -> None:
    one = Candidates(1)
    one.look(0)
    one.all[0] = one._candidate(0)
    one.look(0)
    assert one.leaders() == [0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["look", "cut", "mute", "mend"]), st.floats(0, 3))))
def test_there_are_never_two_leaders(steps: list[tuple[int, str, float]]) -> None:
    """Candidates look when they like; connections break, answers get lost."""
    three = Candidates(3)
    for who, what, seconds in steps:
        if what == "look":
            three.look(who)
        three.apis[who].down = what == "cut" or (what == "look" and three.apis[who].down)
        three.apis[who].answers = what != "mute"
        assert len(three.leaders()) <= 1
        three.clock.now += seconds
        assert len(three.leaders()) <= 1


# ---- with real operators -----------------------------------------------------------------------------------------


def holder(world: World) -> str:
    found = world.cluster.objects("Lease", "default")
    return str(found[0]["spec"].get("holderIdentity")) if found else ""


def test_a_second_operator_takes_over_when_the_first_stops(world: World) -> None:
    first = world.start("first", elect=True)
    until(lambda: holder(world) == "first", "the first leads")
    world.start("second", elect=True)
    world.create(group("g", role("a")))
    world.wait_ready("g")
    world.stop(first)
    world.create(group("h", role("a")))
    world.wait_ready("h")
    assert holder(world) == "second"


def leads(operator: Operator) -> bool:
    return operator.metrics.registry.get_sample_value("leader_election_master_status", {"name": COMPONENT}) == 1


def test_a_leader_whose_lease_is_stolen_writes_nothing_until_it_has_it_again(world: World) -> None:
    operator = world.start("first", elect=True)
    world.create(group("g", role("a")))
    world.wait_ready("g")
    world.server.faults.steal_lease(COMPONENT)
    until(lambda: not leads(operator), "it notices")
    world.edit("g", lambda each: each["spec"]["roles"][0].update(replicas=2))
    assert world.quiet(seconds=0.5) == [] and holder(world) == "thief"
    until(lambda: leads(operator), "the thief has not renewed the lease")
    until(lambda: len(world.pods()) == 2, "what it missed")
    world.wait_ready("g")


def test_a_leader_that_is_cut_off_stops_and_goes_on_afterwards(world: World) -> None:
    operator = world.start("first", elect=True)
    world.create(group("g", role("a")))
    world.wait_ready("g")
    with world.server.faults.unreachable():
        until(lambda: not leads(operator), "it notices")
        world.cluster.api.delete("StatefulSet", NAMESPACE, "g-a")
        world.cluster.on_work()
    until(lambda: world.names("StatefulSet") == ["g-a"], "it is repaired")
    world.wait_ready("g")
