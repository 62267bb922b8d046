"""A request that servers die of is given up; those that were beside it each time are served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from mock_server import MockServer, refuse
from router_cluster import Cluster, held, until

from diptych.errors import EngineLost
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


async def test_all_are_told_in_time_that_there_is_no_server(suspected: Suspected) -> None:
    """They are held together, not one after the other."""
    c, _, tasks = await suspected("decode", hold_timeout_secs=0.5)
    assert [(await task)[0] for task in tasks] == [503] * 6
    assert c.router.app._core.hold.num_held == 0 and not c.router.app._core._alone.locked()


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
