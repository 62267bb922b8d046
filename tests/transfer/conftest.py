"""Every asynchronous test of this folder runs on asyncio's own loop and on uvloop, which servers use."""

import asyncio
import gc

import pytest
import uvloop
from transfer_links import held, settle


def pytest_asyncio_loop_factories(config, item):
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
async def nothing_left():
    gc.collect()  # what earlier tests left: shared pools, NIXL's agents
    before = held()
    yield
    await settle()
    if held() != before:
        gc.collect()  # a payload that a finished test still looks at keeps its ring mapped
    assert held() == before
