from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from api_server import DEMO, TEXT, Serve, Server, running
from mock_engine_client import Script

from diptych.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def demo() -> Tokenizer:
    return Tokenizer.load(DEMO)


@pytest.fixture
async def serve(demo: Tokenizer) -> AsyncIterator[Serve]:
    """serve(text or script, **settings) -> Server; as many as a test wants."""
    async with AsyncExitStack() as stack:

        async def start(script: str | Script = TEXT, **settings: Any) -> Server:
            return await stack.enter_async_context(running(demo, script, settings))

        yield start
