"""A request that servers die of is given up; those that were beside it each time are served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from mock_server import MockServer, hang, refuse
from router_cluster import Cluster, held, until

from diptych.errors import EngineLost
from diptych.router.limits import Line, Turn
from diptych.router.retry import Suspect

POISON = {"text": "poison"}
HARMLESS = [{"text": f"harmless {number}"} for number in range(5)]
BODIES = [*HARMLESS[:2], POISON, *HARMLESS[2:]]
WORDS = "the engine of this server has stopped; the request was lost"


def known(c: Cluster, mock: MockServer) -> Any:
    """What the router knows of it."""
    return next(s for s in c.router.fleet.servers if s.address.port == mock.port)


async def turn(c: Cluster, server: MockServer, *, healthy: bool) -> None:
    server.healthy = healthy
    if healthy and not server.running:
        await server.start(server.port)
    await until(lambda: known(c, server).healthy == healthy)


def mortal(c: Cluster, server: MockServer, num_together: int = 1, *, cut: bool = False) -> list[int]:
    """Let `server` die of the poison, once it has so many requests, and take all of them with it: with words, or with
    `cut` as a process that is killed. Returns a list that grows: how many it had when each came.
    """
    loads: list[int] = []
    ready = asyncio.Event()
    killed: list[asyncio.Task[None]] = []
    words = refuse(503, WORDS, code=EngineLost.code)

    async def script(server: MockServer, request: Any, body: dict[str, Any]) -> Any:
        loads.append(known(c, server).num_requests)
        poisoned = any(one["text"] == POISON["text"] for one in server.bodies)
        if len(loads) == num_together:
            ready.set()
        await ready.wait()
        if poisoned or num_together > 1:
            if cut:
                killed.append(asyncio.create_task(server.stop()))
                await asyncio.Event().wait()
            server.healthy = False
            return await words(server, request, body)
        return None

    server.bodies.clear()
    server.scripts.clear()
    server.scripts.extend([script] * 100)
    return loads


Suspected = Callable[..., Awaitable[tuple[Cluster, MockServer, list[asyncio.Task[tuple[int, bytes]]]]]]


@pytest.fixture
def suspected(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Suspected:
    """`await suspected(role)`: a cluster in which two servers of `role` have died of the poison; the requests, all of
    which were on both; and the third server, which is away.
    """
    monkeypatch.setattr("diptych.router.client.STALE_S", 0.0)  # kept connections have not ended before

    async def make(role: str, bodies: list[Any] = BODIES, *, cut: bool = False, **settings: Any) -> Any:
        num = (3, 1) if role == "prefill" else (1, 3)
        c = await cluster(*num, health_check_interval_secs=0.02, **settings)
        first, second, third = getattr(c, role)
        await turn(c, second, healthy=False)
        await turn(c, third, healthy=False)
        mortal(c, first, len(bodies), cut=cut)
        mortal(c, second, len(bodies), cut=cut)
        tasks = [asyncio.create_task(c.post("/generate", body)) for body in bodies]
        await until(lambda: held(c) == len(bodies))
        await turn(c, second, healthy=True)  # all go there at once: after one death nobody waits for the others
        await until(lambda: len(second.bodies) == held(c) == len(bodies))
        return c, third, tasks

    return make


def assert_given_up(answer: tuple[int, bytes], num_deaths: int) -> None:
    status, data = answer
    error = json.loads(data)["error"]
    assert status == 500 and error["code"] == "servers_died" and f"{num_deaths} servers died" in error["message"]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_one_at_a_time_shows_which_of_them_servers_die_of(suspected: Suspected, role: str, cut: bool) -> None:
    c, third, tasks = await suspected(role, cut=cut)
    before = mortal(c, third, cut=cut)
    await turn(c, third, healthy=True)
    await until(tasks[2].done)
    await until(lambda: held(c) == sum(not task.done() for task in tasks))
    after = mortal(c, third)
    await turn(c, third, healthy=True)
    answers = [await task for task in tasks]
    assert_given_up(answers.pop(2), 3)
    assert [status for status, _ in answers] == [200] * 5
    assert before + after == [1] * 6
    assert c.router.metrics.given_up == 1


async def test_it_is_over_when_the_answer_begins(suspected: Suspected) -> None:
    """From then on a request is sent to nobody else, so that the next one need not wait for its end."""
    c, third, tasks = await suspected("decode", [{**body, "stream": True} for body in HARMLESS])
    third.scripts.clear()
    third.gates = [asyncio.Event() for _ in range(2)]
    third.gates[0].set()
    await turn(c, third, healthy=True)
    await until(lambda: len(third.bodies) == 5)
    assert not any(task.done() for task in tasks)
    third.gates[1].set()
    assert [(await task)[0] for task in tasks] == [200] * 5


async def test_a_client_that_leaves_gives_its_turn_away(suspected: Suspected) -> None:
    c, third, tasks = await suspected("decode", HARMLESS)
    third.gates = [asyncio.Event()]
    stuck = asyncio.Event()

    async def hang(server: MockServer, request: Any, body: dict[str, Any]) -> None:
        stuck.set()
        await asyncio.Event().wait()

    third.scripts.append(hang)
    await turn(c, third, healthy=True)
    await stuck.wait()
    for task in tasks:
        if {"text": third.bodies[0]["text"]} == HARMLESS[tasks.index(task)]:
            task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(answer[0] if isinstance(answer, tuple) else 499 for answer in answers) == [200] * 4 + [499]


async def test_one_that_hangs_does_not_hold_up_the_others(
    suspected: Suspected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.router.limits.TURN_S", 0.05)
    c, third, tasks = await suspected("decode", HARMLESS)
    third.scripts.append(hang())
    await turn(c, third, healthy=True)
    await until(lambda: sum(task.done() for task in tasks) == 4)
    assert c.router.app._core.alone.num_waiting == 0
    [stuck] = [task for task in tasks if not task.done()]
    assert [task.result()[0] for task in tasks if task is not stuck] == [200] * 4
    stuck.cancel()


async def test_a_turn_that_is_over_is_given_away_once(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line()
    first, second = Turn(line), Turn(line)
    monkeypatch.setattr("diptych.router.limits.TURN_S", 0.0)
    await first.take()
    monkeypatch.setattr("diptych.router.limits.TURN_S", 1e6)
    await second.take()
    first.leave()  # as its answer begins now
    assert line.turn.locked()
    second.leave()
    assert not line.turn.locked() and line.num_waiting == 0


async def test_those_that_wait_for_their_turn_are_counted(suspected: Suspected) -> None:
    c, third, tasks = await suspected("decode", HARMLESS)
    third.scripts.append(hang())
    await turn(c, third, healthy=True)
    await until(lambda: len(third.bodies) == 1)
    async with c.http.get("/metrics") as response:
        assert "diptych_router_suspects_waiting 4.0" in await response.text()
    for task in tasks:
        task.cancel()


async def test_the_next_suspect_goes_where_no_other_is(suspected: Suspected) -> None:
    """So that the death of a server is not held against two. It may have failed before, if it is back."""
    c, third, tasks = await suspected("decode", [{**body, "stream": True} for body in HARMLESS])
    first = c.decode[0]
    first.scripts.clear()
    first.bodies.clear()
    third.gates = first.gates = [asyncio.Event(), asyncio.Event()]
    await turn(c, third, healthy=True)
    await until(lambda: len(third.bodies) == 1)
    await turn(c, first, healthy=True)
    assert first.bodies == []
    third.gates[0].set()
    await until(lambda: len(third.bodies) + len(first.bodies) > 1)
    assert len(first.bodies) == 1
    third.gates[1].set()
    assert [(await task)[0] for task in tasks] == [200] * 5


async def test_deaths_at_once_on_kept_connections_count_from_the_second_attempt_on(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.router.client.STALE_S", 1e6)  # all of them are at once
    c = await cluster(1, 6, health_check_interval_secs=0.02)
    await asyncio.gather(*(c.post("/generate", HARMLESS[0]) for _ in range(24)))  # connections are kept
    dead: list[MockServer] = []
    killed: list[asyncio.Task[None]] = []

    async def die(server: MockServer, request: Any, body: dict[str, Any]) -> Any:
        dead.append(server)
        killed.append(asyncio.create_task(server.stop()))
        await asyncio.Event().wait()

    for server in c.decode:
        server.scripts.append(die)
    assert_given_up(await c.post("/generate", POISON), 2)
    assert len(dead) == 3
    await asyncio.gather(*killed)


async def test_a_server_whose_engine_has_stopped_is_dead_however_it_was_heard(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The health check hears it first, then the request's own connection is cut."""
    monkeypatch.setattr("diptych.router.client.STALE_S", 0.0)
    c = await cluster(1, 6, health_check_interval_secs=0.02)
    dead: list[MockServer] = []

    async def die(server: MockServer, request: Any, body: dict[str, Any]) -> Any:
        dead.append(server)
        server.refusal = (503, WORDS)
        await until(lambda: not known(c, server).healthy)
        request.transport.abort()
        await asyncio.Event().wait()

    for server in c.decode:
        server.scripts.append(die)
    assert_given_up(await c.post("/generate", POISON), 2)
    assert len(dead) == 2


async def test_all_are_told_in_time_that_there_is_no_server(suspected: Suspected) -> None:
    """They are held together, not one after the other."""
    c, _, tasks = await suspected("decode", hold_timeout_secs=0.5)
    assert [(await task)[0] for task in tasks] == [503] * 6
    assert c.router.app._core.hold.num_held == 0 and not c.router.app._core.alone.turn.locked()


# the rule


def die(name: str, *requests: Suspect) -> None:
    """They report a death one after the other, as they do."""
    for number, one in enumerate(requests):
        one.had(name, requests[number + 1 :])


def test_one_death_is_held_against_nobody() -> None:
    requests = [Suspect() for _ in range(3)]
    die("A", *requests)
    assert not any(one.is_guilty or one.goes_alone for one in requests)
    die("A", *requests)  # told again
    assert not any(one.is_guilty or one.goes_alone for one in requests)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_only_suspect_of_a_second_server_is_guilty(at: int) -> None:
    poison, beside, others = Suspect(), Suspect(), [Suspect(), Suspect()]
    die("A", beside, poison)
    die("B", *others[:at], poison, *others[at:])
    assert [one.is_guilty for one in (poison, beside, *others)] == [True, False, False, False]


@pytest.mark.parametrize("first", [False, True])
def test_of_several_none_is_until_a_third_server_dies(first: bool) -> None:
    poison, beside, other = Suspect(), Suspect(), Suspect()
    die("A", poison, beside)
    die("B", *((other, poison, beside) if first else (beside, other, poison)))
    assert [one.is_guilty for one in (poison, beside, other)] == [False] * 3
    assert [one.goes_alone for one in (poison, beside, other)] == [True, True, False]
    die("C", poison, other)
    assert poison.is_guilty and not other.is_guilty and other.goes_alone


def test_a_shared_death_says_nothing_of_those_who_outlived_it() -> None:
    """The connection of one was cut, the server lives: the next death of the other is its own."""
    cut, lucky = Suspect(), Suspect()
    die("A", cut, lucky)
    cut.had("B", [lucky])
    lucky.had("C", [])
    assert lucky.is_guilty and not cut.is_guilty
