from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvloop
from router_cluster import Cluster


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}  # what the router runs on


@pytest.fixture
async def cluster() -> AsyncIterator[Callable[..., Awaitable[Cluster]]]:
    """`await cluster(num_prefill, num_decode, **settings)`: mocks and a router before them, over real sockets."""
    made: list[Cluster] = []

    async def make(num_prefill: int = 1, num_decode: int = 1, **settings: object) -> Cluster:
        made.append(Cluster())
        await made[-1].start(num_prefill, num_decode, **settings)
        return made[-1]

    yield make
    for one in made:
        await one.close()
