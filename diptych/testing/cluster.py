"""A whole cluster in one process, on a virtual clock: router, prefill and decode servers, a network with faults.

The router's core and health checks are the real ones, its servers are `SimServer`s. HTTP exchanges and KV links run
over one MemoryNetwork.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from diptych.engine.ranks import Follower
from diptych.errors import Unavailable
from diptych.router.config import RouterConfig, ServerAddress
from diptych.router.core import Core
from diptych.router.fleet import Fleet
from diptych.router.health import HealthChecker
from diptych.router.metrics import RouterMetrics
from diptych.testing.exchange import SimUpstream
from diptych.testing.mock_runner import MockRunner
from diptych.testing.network import MemoryNetwork
from diptych.testing.server import CONTEXT_LEN, PAGE_SIZE, SimServer
from diptych.transfer.bootstrap import Route

ROUTER, CLIENT = "router", "client"


class Cluster:
    """`prefill` and `decode` servers behind a router; all randomness comes from `seed`.

    `tp`: ranks of each stage of prefill and of decode servers, `pp`: their stages. `overlaps`: they plan ahead.
    `follower`: what leads a rank above 0. `defects` collects what must never be: pages that are not what a prompt
    demands.
    """

    def __init__(
        self,
        seed: int,
        *,
        prefill: int = 2,
        decode: int = 1,
        tp: tuple[int, int] = (1, 1),
        pp: tuple[int, int] = (1, 1),
        overlaps: bool = False,
        follower: type[Follower] = Follower,
    ) -> None:
        self.overlaps = overlaps
        self.rng = random.Random(seed)
        self.network = MemoryNetwork(self.rng.getrandbits(64))
        self.follower = follower
        self.defects: list[str] = []
        self.http: dict[str, str] = {}  # where each server's HTTP is reached now
        self.names = {"prefill": [f"p{i}" for i in range(prefill)], "decode": [f"d{i}" for i in range(decode)]}
        self.tp = dict(zip(self.names, tp, strict=True))
        self.pp = dict(zip(self.names, pp, strict=True))
        self.servers: dict[str, SimServer] = {}
        self.info = MockRunner(1, PAGE_SIZE, context_len=CONTEXT_LEN).info
        self.num_pages = self.rng.choice([40, 64, 160])
        config = RouterConfig(
            prefill=tuple(ServerAddress(name, 80) for name in self.names["prefill"]),
            decode=tuple(ServerAddress(name, 80) for name in self.names["decode"]),
            policy=self.rng.choice(["random", "round_robin", "power_of_two", "cache_aware"]),
            request_timeout_secs=120.0,
            health_check_interval_secs=2.0,
        )
        loop = asyncio.get_running_loop()
        router_rng = random.Random(self.rng.getrandbits(64))
        self.fleet = Fleet(config, router_rng, loop.time)
        upstream = SimUpstream(self.network.transport(ROUTER), self.http)
        self.direct = SimUpstream(self.network.transport(CLIENT), self.http)  # past the router
        self.metrics = RouterMetrics(("/generate",))
        self.core = Core(config, self.fleet, upstream, router_rng, self.metrics)
        self._health = HealthChecker(config, self.fleet, upstream, [])

    async def start(self) -> None:
        for mode, names in self.names.items():
            for name in names:
                await self.start_server(name, mode)
        self._health.start()
        async with asyncio.timeout(60):
            await self.fleet.complete.wait()

    async def start_server(self, name: str, mode: str) -> None:
        """New processes under this name, with an empty pool."""
        radix = mode == "prefill" or self.rng.random() < 0.5
        server = SimServer(name, mode, self, self.num_pages, radix=radix, tp=self.tp[mode], pp=self.pp[mode])
        for endpoint in server.endpoints:
            self.network.revive(endpoint)
        await server.start()
        self.servers[name] = server

    def kill_server(self, name: str) -> str:
        """End a server at once. Returns its mode."""
        server = self.servers.pop(name)
        server.kill()
        return server.mode

    def fetch_route(self, caller: str) -> Any:
        """The bootstrap lookup of a decode server, over the same faulty network."""

        async def fetch(host: str, port: int, timeout_s: float) -> Route:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(2 * self.network.draw_delay())
                while self.network.is_stalled((caller, host)) or self.network.is_stalled((host, caller)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            server = self.servers.get(host)
            if server is None or server.ended.is_set():
                raise Unavailable("its bootstrap service does not answer")
            return server.routes.route()

        return fetch

    async def close(self) -> None:
        await self._health.stop()
        for name in list(self.servers):
            self.kill_server(name)
