"""The API process's watch over its engine processes."""

from __future__ import annotations

import asyncio

from diptych.config import ServerConfig
from diptych.engine.client import EngineLink
from diptych.engine.launch import SILENCE_S, STALL_S, EngineProcesses
from diptych.testing.mock_runner import MockRunner
from diptych.testing.virtual import run_virtual
from diptych.types import Outputs


def test_an_engine_that_falls_silent_is_taken_for_dead() -> None:
    """Its process lives and its channel is open, but its loop hangs: nothing else would notice."""

    async def story() -> None:
        engine = EngineProcesses(ServerConfig(model_path="m", watchdog_timeout=30.0))
        engine.link = EngineLink(lambda _: None, MockRunner(4, 4, context_len=16).info, 16)
        died = asyncio.Event()
        engine.on_death = died.set
        watch = asyncio.ensure_future(engine.watch_silence())
        for _ in range(20):
            engine._receive(Outputs([]))
            await asyncio.sleep(30)  # as long as a step may take
        assert not watch.done() and engine.link.alive and engine.link.stalled
        engine._receive(Outputs([]))
        await asyncio.sleep(2)
        assert not engine.link.stalled
        await asyncio.sleep(STALL_S)
        assert engine.link.stalled and engine.link.alive
        await died.wait()
        assert asyncio.get_running_loop().time() < 602 + 30 + SILENCE_S + 2
        assert "said nothing for 45 s" in engine.failure and not engine.link.alive
        await watch

    run_virtual(story())


async def test_stopping_an_engine_that_still_loads_does_not_wait() -> None:
    """It is somewhere in torch and hears nothing; with a grace every Ctrl-C at the start would take ten seconds."""
    engine = EngineProcesses(ServerConfig(model_path="models/demo", tp_size=2))
    start = asyncio.ensure_future(engine.start())
    while len(engine._processes) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await engine.stop()
    assert [process.returncode for process in engine._processes] == [-9, -9]
