"""2,000 requests on 2 prefill servers and 1 decode server, a third of them aborted at random points: nothing is left.

Whatever a process held after a warm-up it holds after the storm: pages, rooms, asyncio tasks, file descriptors, memory.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil
import pytest
from asking import counters, endless, settle, until
from mixed_requests import generate
from pd_cluster import PDCluster, start_cluster, start_router

from diptych.model.layers import padded_rows
from diptych.testing.processes import ServerProcess

pytestmark = pytest.mark.timeout(400)

NUM_REQUESTS = 2000
NUM_CLIENTS = 24
POOL_TOKENS = 4096
CHUNK = 512  # rows of a step of prompts at most, the default
MB = 1 << 20
SERVER_MB = 700  # API and engine process, besides weights and KV pool
ROUTER_MB = 150
GROWTH_MB = 24  # of a process, over the second half: row counts have been met by then (each keeps about 1.9 MB)


@dataclass(frozen=True)
class Wish:
    """One request and what its client does."""

    body: dict[str, Any]
    leaves_after_s: float | None = None  # hangs up
    aborts_after_s: float | None = None  # asks for /abort_request


def wishes(count: int, seed: int) -> Iterator[Wish]:
    rng = random.Random(seed)
    for index in range(count):
        length = rng.choice((rng.randint(1, 40), rng.randint(1, 40), rng.randint(40, 160)))
        if index % 50 == 0:
            length = rng.randint(400, 900)
        fields = {"rid": f"storm-{seed}-{index}-", "stream": rng.random() < 0.5}
        body = endless(rng.randrange(400), length, rng.randint(1, 10), **fields)
        delay_s, fate = rng.uniform(0, 0.4), index % 6
        yield Wish(body, delay_s if fate == 1 else None, delay_s if fate == 4 else None)


class Storm:
    """Clients that ask one request after the other. `outcomes` counts how they ended."""

    def __init__(self, url: str, wishes: Iterator[Wish]) -> None:
        self.url = url
        self.wishes = wishes
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as self.session, asyncio.TaskGroup() as clients:
            for _ in range(NUM_CLIENTS):
                clients.create_task(self._client())

    async def _client(self) -> None:
        for wish in self.wishes:
            asking = asyncio.create_task(self._ask(wish))
            delay_s = wish.leaves_after_s if wish.leaves_after_s is not None else wish.aborts_after_s
            if delay_s is not None:
                await asyncio.wait((asking,), timeout=delay_s)
            if asking.done():
                pass
            elif wish.leaves_after_s is not None:
                asking.cancel()
            elif wish.aborts_after_s is not None:
                async with self.session.post(self.url + "/abort_request", json={"rid": wish.body["rid"]}) as reply:
                    await reply.read()
            (outcome,) = await asyncio.gather(asking, return_exceptions=True)
            self._judge(wish, outcome)

    async def _ask(self, wish: Wish) -> tuple[int, str]:
        async with self.session.post(self.url + "/generate", json=wish.body) as reply:
            return reply.status, await reply.text()

    def _judge(self, wish: Wish, outcome: Any) -> None:
        if isinstance(outcome, asyncio.CancelledError):
            self.outcomes["left"] += 1
        elif isinstance(outcome, BaseException):
            raise outcome
        elif outcome[0] == 200 and _num_tokens(outcome[1]) == wish.body["sampling_params"]["max_new_tokens"]:
            self.outcomes["served"] += 1
        elif wish.aborts_after_s is not None and "abort" in outcome[1]:
            self.outcomes["aborted"] += 1
        else:
            self.outcomes["wrong"] += 1
            self.wrong.append(f"{outcome} for {wish}")


def _num_tokens(text: str) -> int:
    """Tokens of an answer, streamed or not; 0 if it does not end as it should."""
    if text.startswith("data: "):
        *frames, end = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
        text = frames[-1] if end == "[DONE]" and frames else "{}"
    return len(json.loads(text).get("output_ids", ()))


def storm(router: ServerProcess, count: int, seed: int) -> Storm:
    run = Storm(router.url, wishes(count, seed))
    asyncio.run(run.run())
    assert not run.wrong, run.wrong[:5]
    return run


def held(pd: PDCluster) -> list[tuple[int, int, int, int]]:
    """File descriptors and tasks of each server's API process and engine process."""
    reports = [server.get("/audit") for server in pd.servers]
    names = [(process, figure) for process in ("api", "engine") for figure in ("num_fds", "num_tasks")]
    return [tuple(report[process][figure] for process, figure in names) for report in reports]


def memory(server: ServerProcess) -> list[int]:
    """Resident bytes of each process of a server, with all it maps."""
    return [process.memory_info().rss for process in server.tree()]


def router_fds(router: ServerProcess) -> tuple[int, int]:
    """(file descriptors besides connections, connections): idle ones to servers are kept for the next request."""
    process = psutil.Process(router.process.pid)
    connections = [c for c in process.net_connections("tcp") if c.status != psutil.CONN_LISTEN]
    return process.num_fds() - len(connections), len(connections)


def test_nothing_is_left_after_a_storm() -> None:
    with ExitStack() as stack:
        pd = start_cluster(stack, 2, "--max-total-tokens", str(POOL_TOKENS), "--log-level", "warning")
        for index in range(2):  # all of each pool is used once, so that all of it is in memory
            generate(pd.router, endless(index, POOL_TOKENS - 32, 2))
        for rows in sorted({padded_rows(rows) for rows in range(1, CHUNK + 1)}):  # so is what each row count keeps
            for index in range(2):  # on both prefill servers: the router takes them in turns
                generate(pd.router, endless(2 * rows + index, rows, 1))
        storm(pd.router, 200, seed=1)
        pd.router.stop()  # its connections end with it
        settle(pd)
        before = held(pd)

        pd.router = start_router(stack, pd.prefill, pd.decode, "--log-level", "warning")
        storm(pd.router, 60, seed=2)
        settle(pd)
        fds_before = router_fds(pd.router)[0]

        started = time.monotonic()
        outcomes = storm(pd.router, NUM_REQUESTS // 2, seed=3).outcomes
        half = [memory(server) for server in (*pd.servers, pd.router)]
        outcomes += storm(pd.router, NUM_REQUESTS // 2, seed=4).outcomes
        print(f"storm: {time.monotonic() - started:.1f} s, {dict(outcomes)}")
        assert sum(outcomes.values()) == NUM_REQUESTS
        assert outcomes["left"] > NUM_REQUESTS / 12 and outcomes["aborted"] > NUM_REQUESTS / 12

        settle(pd)
        until(lambda: router_fds(pd.router)[0] == fds_before, "the router's descriptors are back")
        assert router_fds(pd.router)[1] <= len(pd.servers) * (NUM_CLIENTS + 8)
        assert memory(pd.router)[0] < ROUTER_MB * MB
        for server, old in zip((*pd.servers, pd.router), half, strict=True):
            new = memory(server)
            growth = [(after - then) / MB for then, after in zip(old, new, strict=True)]
            assert max(growth) < GROWTH_MB, (server.args, growth)
            if server is not pd.router:
                assert sum(new) - _model_bytes(server) < SERVER_MB * MB, (server.args, new)

        # The same answers as before the storm, from caches that have seen all of it.
        quiet = [generate(pd.router, endless(index, 60, 6))["output_ids"] for index in range(10)]
        for server in pd.servers:
            server.post("/flush_cache", {})
        assert quiet == [generate(pd.router, endless(index, 60, 6))["output_ids"] for index in range(10)]

        pd.router.stop()
        settle(pd)
        until(lambda: held(pd) == before, f"tasks and descriptors are back at {before}", 10)


def _model_bytes(server: ServerProcess) -> int:
    """Weights and KV pool."""
    info = server.get("/server_info")
    model = info["model"]
    token_bytes = model["num_layers"] * 2 * model["num_kv_heads"] * model["head_dim"] * 4  # float32
    assert model["kv_dtype"] == "float32"
    assert counters(server)["max_total_num_tokens"] == info["max_total_num_tokens"]
    return int(model["weight_bytes"] + info["max_total_num_tokens"] * token_bytes)
