"""Mock servers and a real router in front of them, in one process, over real sockets."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiohttp
from mock_server import Meeting, MockServer

from diptych.router.config import RouterConfig, ServerAddress
from diptych.router.main import Router


class Cluster:
    def __init__(self) -> None:
        self.prefill: list[MockServer] = []
        self.decode: list[MockServer] = []
        self.workers: list[MockServer] = []

    async def start(self, num_prefill: int, num_decode: int, num_workers: int = 0, **settings: Any) -> None:
        meeting = Meeting()
        self.prefill = [MockServer("prefill", meeting, f"p{i}") for i in range(num_prefill)]
        self.decode = [MockServer("decode", meeting, f"d{i}") for i in range(num_decode)]
        self.workers = [MockServer("worker", meeting, f"w{i}") for i in range(num_workers)]
        for server in self.servers:
            await server.start()
        settings = {"policy": "round_robin", "retry_initial_backoff_ms": 1.0, **settings}
        config = RouterConfig(
            prefill=tuple(ServerAddress("127.0.0.1", server.port, 34000) for server in self.prefill),
            decode=tuple(ServerAddress("127.0.0.1", server.port) for server in self.decode),
            workers=tuple(ServerAddress("127.0.0.1", server.port) for server in self.workers),
            port=0,
            **settings,
        )
        self.router = Router(config, random.Random(1))
        await self.router.start()
        self.http = aiohttp.ClientSession(f"http://127.0.0.1:{self.router.port}")
        await until(lambda: all(server.healthy for server in self.router.fleet.servers))

    @property
    def servers(self) -> list[MockServer]:
        return self.prefill + self.decode + self.workers

    async def close(self) -> None:
        await self.http.close()
        await self.router.close()
        for server in self.servers:
            await server.stop()

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, bytes]:
        async with self.http.post(path, json=body, **options) as response:
            return response.status, await response.read()


def held(cluster: Cluster) -> int:
    """Requests that wait for a server to be back."""
    return cluster.router.app._core.hold.num_held


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    """Wait until `condition()` holds; fails after `timeout_s`. Sockets, the kernel between them, set no event."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
