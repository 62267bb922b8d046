"""A group under a supervisor in the test's own event loop, and its state folder."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from diptych.group.actions import Backoff
from diptych.group.local.launch import Launch, prepare
from diptych.group.local.paths import GroupFolder, state_root
from diptych.group.local.state import PodView, Snapshot
from diptych.group.local.strays import find_strays
from diptych.group.local.supervisor import Supervisor

WAIT_S = 20.0
QUICK = Backoff(base_s=0.2, cap_s=0.4, stable_s=60.0)


class RunningGroup:
    """A supervisor and everything it has told so far."""

    def __init__(self, launch: Launch) -> None:
        self.prepared = prepare(launch)
        self.folder = GroupFolder(state_root(), self.prepared.group)
        self.history: list[Snapshot] = []
        self._news = asyncio.Condition()
        self.task: asyncio.Task[None]
        self._loop = asyncio.get_running_loop()
        self.supervisor = Supervisor(self.prepared, self.folder, self._on_change)

    def _on_change(self, snapshot: Snapshot) -> None:
        self.history.append(snapshot)
        self._loop.create_task(self._tell())

    def start(self) -> None:
        self.task = asyncio.create_task(self.supervisor.run())
        self.task.add_done_callback(lambda _: self._loop.create_task(self._tell()))

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    @property
    def now(self) -> Snapshot:
        return self.history[-1]

    def pod(self, name: str) -> PodView:
        return next(pod for pod in self.now.pods if pod.name == name)

    async def until(self, predicate: Callable[[Snapshot], object]) -> Snapshot:
        """Waits for a snapshot that satisfies the predicate, the present one included."""
        async with asyncio.timeout(WAIT_S), self._news:
            await self._news.wait_for(lambda: self.task.done() or (self.history and predicate(self.now)))
        if self.task.done():
            await self.task
            raise AssertionError("the supervisor has ended")
        return self.now

    async def until_ready(self) -> Snapshot:
        return await self.until(lambda snapshot: snapshot.status == "ready")

    def address(self, pod: str, port: int = 8000) -> str:
        return f"http://{self.pod(pod).ip}:{port}"


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setenv("DIPTYCH_STATE_DIR", str(folder))
    return folder


@asynccontextmanager
async def _run(text: str, **options: Any) -> AsyncIterator[RunningGroup]:
    options = {"backoff": QUICK, "cwd": str(Path.cwd()), "source": "test"} | options
    running = RunningGroup(Launch(manifest=text, **options))
    lock = running.folder.take_lock()
    running.start()
    try:
        yield running
    finally:
        running.supervisor.down()
        try:
            async with asyncio.timeout(WAIT_S):
                await asyncio.wait([running.task])
        finally:
            os.close(lock)
    await running.task
    assert find_strays(running.folder) == []


@pytest.fixture
def run_group() -> Callable[..., AbstractAsyncContextManager[RunningGroup]]:
    """`async with run_group(manifest text, **launch) as running`: at its end the group is down and nothing is left."""
    return _run


async def get(url: str) -> dict[str, Any]:
    """The JSON that a toy pod answers."""
    async with aiohttp.ClientSession() as session, session.get(url, timeout=aiohttp.ClientTimeout(10)) as reply:
        return dict(json.loads(await reply.text()))


@pytest.fixture
def fetch() -> Callable[[str], Any]:
    return get
