"""While no prefill server is healthy, decode servers that can do the prefill themselves are asked to."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from mock_server import MockServer, hang, reset
from router_cluster import until

from diptych.testing.processes import metrics

BODY = {"text": "a"}


def able(c: Any, mock: Any) -> bool:
    return bool(next(s for s in c.router.fleet.servers if s.address.port == mock.port).local_prefill)


async def teach(c: Any, *mocks: Any) -> None:
    """Make decode servers say that they can, and wait until the router has heard it."""
    for mock in mocks:
        mock.local_prefill = True
    await until(lambda: all(able(c, mock) for mock in mocks))


async def fallbacks(c: Any) -> float:
    async with c.http.get("/metrics") as reply:
        return metrics(await reply.text())["diptych_router_prefill_fallbacks_total"]


@pytest.fixture
async def orphaned(cluster: Any) -> Any:
    """One prefill server, and two decode servers of which the second can do its own prefill."""
    c = await cluster(1, 2, health_check_interval_secs=0.02)
    await teach(c, c.decode[1])
    assert (await c.post("/generate", BODY))[0] == 200
    assert len(c.prefill[0].bodies) == 1 and await fallbacks(c) == 0
    await c.prefill[0].stop()
    return c


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
async def test_a_decode_server_that_can_does_both_phases(orphaned: Any, path: str, stream: bool) -> None:
    c, (foreign, ours) = orphaned, orphaned.decode
    for server in c.decode:
        server.bodies.clear()
    body = {"text": "é", "stream": stream, "n": 1}
    for _ in range(4):
        status, data = await c.post(path, body)
        assert status == 200 and (data == b"".join(ours.events(path, body)) if stream else json.loads(data))
    alone = [{**body, "bootstrap_host": None}] * 4
    assert ours.bodies[-4:] == alone
    assert all(sent["bootstrap_host"] is not None for sent in foreign.bodies)  # before prefill was found gone
    assert await fallbacks(c) == 4


async def test_a_clients_own_rooms_are_left_out(orphaned: Any) -> None:
    body = {"bootstrap_room": 5, "bootstrap_host": "x", "bootstrap_port": 1, "text": ["a", "b"]}
    for _ in range(2):
        assert (await orphaned.post("/generate", body))[0] == 200
    assert json.loads(orphaned.decode[1].raw[-1]) == {"text": ["a", "b"], "bootstrap_host": None}
    assert (await orphaned.post("/generate", {}))[0] == 200
    assert json.loads(orphaned.decode[1].raw[-1]) == {"bootstrap_host": None}


async def test_the_prompts_logprobs_are_decodes_then(orphaned: Any) -> None:
    body = {"text": "a", "return_logprob": True}
    status, data = await orphaned.post("/generate", body)
    assert status == 200 and json.loads(data) == orphaned.decode[1].answer("/generate", body)


async def test_it_is_not_ready_all_the_same_and_ends_when_prefill_is_back(orphaned: Any) -> None:
    c = orphaned
    assert (await c.post("/generate", BODY))[0] == 200
    async with c.http.get("/ready") as reply:
        assert reply.status == 503 and "no prefill server" in await reply.text()
    await c.prefill[0].start(c.prefill[0].port)
    await until(lambda: c.router.fleet.ready)
    before = len(c.prefill[0].bodies)
    assert (await c.post("/generate", BODY))[0] == 200
    assert len(c.prefill[0].bodies) == before + 1 and await fallbacks(c) == 1


async def test_requests_under_way_move_too(cluster: Any) -> None:
    c = await cluster(1, 1, health_check_interval_secs=0.02)
    await teach(c, c.decode[0])
    c.prefill[0].scripts.extend(hang() for _ in range(40))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(c.post("/generate", BODY)) for _ in range(40)]
        await until(lambda: len(c.prefill[0].bodies) == 40)
        await c.prefill[0].stop()
    assert [task.result()[0] for task in tasks] == [200] * 40
    assert await fallbacks(c) == 40


@pytest.mark.parametrize("words", ["this server is draining", "the engine of this server has stopped; send it again"])
async def test_a_prefill_server_that_leaves_keeps_nobody_waiting(cluster: Any, words: str) -> None:
    """One refusal is enough, whatever the checks' interval, and moving costs nothing of the retries' budget."""
    c = await cluster(1, 1)
    c.decode[0].local_prefill = True
    c.router.fleet.roles["decode"][0].suspected.set()
    await until(lambda: able(c, c.decode[0]))
    c.prefill[0].refusal = 503, words
    answers = await asyncio.gather(*(c.post("/generate", BODY) for _ in range(60)))
    assert [status for status, _ in answers] == [200] * 60
    assert c.router.metrics.retries_over_budget == 0 and await fallbacks(c) == 60
    assert not c.router.fleet.roles["prefill"][0].healthy


async def test_a_leaving_server_ends_what_it_has(cluster: Any) -> None:
    """A check that says so is believed at once, and requests that it has are left with it."""
    c = await cluster(2, 1, health_check_interval_secs=0.02)
    release = asyncio.Event()

    async def serve_late(server: Any, request: Any, body: Any) -> None:
        await release.wait()

    c.prefill[0].scripts.append(serve_late)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(c.post("/generate", BODY))
        await until(lambda: len(c.prefill[0].bodies) == 1)
        c.prefill[0].refusal = 503, "this server is draining"
        await until(lambda: not c.router.fleet.roles["prefill"][0].healthy)
        assert c.router.fleet.roles["prefill"][0].checks[False] == 1
        release.set()
    assert first.result()[0] == 200 and len(c.prefill[1].bodies) == 0


async def test_a_leaving_server_that_dies_keeps_nobody_waiting(cluster: Any) -> None:
    """What it had begun is given up once its checks fail otherwise, as when its machine is switched off."""
    c = await cluster(2, 1, health_check_interval_secs=0.02, health_failure_threshold=2)
    c.prefill[0].scripts.append(hang())
    async with asyncio.TaskGroup() as group:
        first = group.create_task(c.post("/generate", BODY))
        await until(lambda: len(c.prefill[0].bodies) == 1)
        c.prefill[0].refusal = 503, "this server is draining"
        await until(lambda: not c.router.fleet.roles["prefill"][0].healthy)
        assert not first.done()
        c.prefill[0].refusal, c.prefill[0].healthy = None, False
    assert first.result()[0] == 200 and len(c.prefill[1].bodies) == 1


async def test_it_can_be_switched_off(cluster: Any) -> None:
    c = await cluster(1, 1, health_check_interval_secs=0.02, hold_timeout_secs=0, disable_prefill_fallback=True)
    await teach(c, c.decode[0])
    await c.prefill[0].stop()
    status, data = await c.post("/generate", BODY)
    assert status == 503 and "no prefill server is healthy" in json.loads(data)["error"]["message"]


async def test_foreign_decode_servers_are_never_asked(cluster: Any) -> None:
    c = await cluster(1, 1, health_check_interval_secs=0.02, hold_timeout_secs=0)
    await c.prefill[0].stop()
    for _ in range(3):
        assert (await c.post("/generate", BODY))[0] == 503
    assert all(body["bootstrap_host"] == "127.0.0.1" for body in c.decode[0].bodies)


async def test_a_lost_decode_server_is_tried_elsewhere(cluster: Any) -> None:
    c = await cluster(1, 2, health_check_interval_secs=0.02)
    await teach(c, *c.decode)
    await c.prefill[0].stop()
    await c.post("/generate", BODY)
    for server in c.decode:
        server.bodies.clear()

    async def lost(server: MockServer, request: Any, body: dict[str, Any]) -> Any:
        for one in c.decode:
            one.scripts.clear()
        return await reset()(server, request, body)

    for server in c.decode:
        server.scripts.append(lost)
    assert (await c.post("/generate", BODY))[0] == 200
    assert [len(server.bodies) for server in c.decode] == [1, 1]
