"""While no server can take requests, they are held: one that is only updated loses none of them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from router_cluster import held, until

from diptych.testing.processes import metrics

BODY = {"text": "a"}
CHECKS = {"health_check_interval_secs": 0.02}


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_they_are_served_when_it_is_back(cluster: Any, role: str) -> None:
    c = await cluster(1, 1, **CHECKS)
    away = getattr(c, role)[0]
    await away.stop()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(c.post("/generate", BODY)) for _ in range(30)]
        await until(lambda: held(c) == 30)
        async with c.http.get("/metrics") as reply:
            assert metrics(await reply.text())["diptych_router_requests_held"] == 30
        await away.start(away.port)
    assert [task.result()[0] for task in tasks] == [200] * 30
    assert held(c) == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_an_update_of_the_only_decode_server_loses_nothing(cluster: Any, stream: bool) -> None:
    """It drains: what it has begun it ends, what comes then is held, and its successor serves it."""
    c = await cluster(1, 1, **CHECKS)
    server = c.decode[0]
    server.gates = [asyncio.Event()]
    body = {**BODY, "stream": True}
    async with asyncio.TaskGroup() as group:
        begun = [group.create_task(c.post("/generate", body)) for _ in range(10)]
        await until(lambda: len(server.bodies) == 10)
        server.refusal = 503, "this server is draining; send the request to another server, or later"
        later = [group.create_task(c.post("/generate", {**BODY, "stream": stream})) for _ in range(10)]
        await until(lambda: held(c) == 10)
        server.gates[0].set()
        assert [(await task)[0] for task in begun] == [200] * 10
        await server.stop()
        server.refusal = None
        await server.start(server.port)
    assert [task.result()[0] for task in later] == [200] * 10
    assert c.router.metrics.retries_over_budget == 0


async def test_not_for_ever(cluster: Any) -> None:
    c = await cluster(1, 1, **CHECKS, hold_timeout_secs=0.05)
    await c.decode[0].stop()
    async with c.http.post("/generate", json=BODY) as response:
        assert response.status == 503 and response.headers["retry-after"] == "1"
        assert "no decode server is healthy" in json.loads(await response.read())["error"]["message"]
    assert held(c) == 0


async def test_only_so_many_and_a_client_that_leaves_frees_its_place(cluster: Any) -> None:
    c = await cluster(1, 1, **CHECKS, hold_size=2)
    await c.decode[0].stop()
    first, second = (asyncio.create_task(c.post("/generate", BODY)) for _ in range(2))
    await until(lambda: held(c) == 2)
    assert (await c.post("/generate", BODY))[0] == 503
    first.cancel()
    await until(lambda: held(c) == 1)
    third = asyncio.create_task(c.post("/generate", BODY))
    await until(lambda: held(c) == 2)
    await c.decode[0].start(c.decode[0].port)
    assert [(await task)[0] for task in (second, third)] == [200, 200]


async def test_only_so_many_bytes_but_any_single_body(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.router.limits.HOLD_BYTES", 100_000)
    c = await cluster(1, 1, **CHECKS)
    await c.decode[0].stop()
    large, small = {"text": "a" * 200_000}, {"text": "a" * 20_000}  # a prompt is kept twice: as the router's key too
    first = asyncio.create_task(c.post("/generate", large))
    await until(lambda: held(c) == 1)
    async with c.http.post("/generate", json=BODY) as response:
        assert response.status == 503 and response.headers["retry-after"] == "1"
        message = json.loads(await response.read())["error"]["message"]
    assert message.startswith("1 requests of 400") and "wait for a server already" in message
    first.cancel()
    await until(lambda: held(c) == 0)
    tasks = [asyncio.create_task(c.post("/generate", small)) for _ in range(3)]
    await until(lambda: held(c) == 2)
    await c.decode[0].start(c.decode[0].port)
    assert sorted([(await task)[0] for task in tasks]) == [200, 200, 503]


async def test_a_server_of_another_role_is_no_help(cluster: Any) -> None:
    c = await cluster(1, 1, **CHECKS)
    for server in c.servers:
        await server.stop()
    asked = asyncio.create_task(c.post("/generate", BODY))
    await until(lambda: held(c) == 1)
    await c.prefill[0].start(c.prefill[0].port)
    await until(lambda: c.router.fleet.roles["prefill"][0].healthy)
    assert held(c) == 1
    await c.decode[0].start(c.decode[0].port)
    assert (await asked)[0] == 200
