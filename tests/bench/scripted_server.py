"""A server that plays a script, and a clock that goes with it: for tests of the benchmark's client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Step = bytes | Callable[[], Awaitable[None]]


class ScriptedClock:
    """Each reading gives the next of `times`; `read(n)` is a step that waits until n readings were taken."""

    def __init__(self, times: list[float]) -> None:
        self._times = times
        self._readings = 0
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self) -> float:
        value = self._times[min(self._readings, len(self._times) - 1)]
        self._readings += 1
        task = asyncio.get_running_loop().create_task(self._notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return value

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def read(self, num: int) -> Callable[[], Awaitable[None]]:
        async def wait() -> None:
            async with self._changed, asyncio.timeout(10):
                await self._changed.wait_for(lambda: self._readings >= num)

        return wait


def event(payload: Any) -> bytes:
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


def generated(text: str, total: int, finish: dict[str, Any] | None = None, **meta: Any) -> dict[str, Any]:
    """A cumulative frame of /generate."""
    info = {"completion_tokens": total, "prompt_tokens": 5, "cached_tokens": 2, "finish_reason": finish, **meta}
    return {"text": text, "output_ids": list(range(total)), "meta_info": info}


def chat_chunk(content: str | None, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content, **delta}, "finish_reason": finish}], "usage": None}


class ScriptedServer:
    """Answers every POST with `steps` (a stream) or with `status` and `body`. An async context manager."""

    def __init__(self, steps: list[Step] | None = None, *, status: int = 200, body: bytes = b"") -> None:
        self.steps, self.status, self.body = steps, status, body
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.running = self.peak = 0
        self.gets: dict[str, Any] = {"/v1/models": {"data": [{"id": "scripted"}]}}
        self.posts: list[str] = []
        self.cut = False  # drop the connection after the steps

    async def __aenter__(self) -> ScriptedServer:
        app = web.Application()
        app.router.add_post("/flush_cache", self._flush)
        app.router.add_post("/{path:.*}", self._answer)
        app.router.add_get("/{path:.*}", self._get)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _flush(self, request: web.Request) -> web.Response:
        self.posts.append(request.path)
        return web.Response()

    async def _get(self, request: web.Request) -> web.Response:
        if request.path not in self.gets:
            return web.Response(status=404)
        return web.json_response(self.gets[request.path])

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.path, await request.json(), dict(request.headers)))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            if self.steps is None:
                return web.Response(status=self.status, body=self.body, content_type="application/json")
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for step in self.steps:
                if isinstance(step, bytes):
                    await response.write(step)
                else:
                    await step()
            if self.cut and request.transport is not None:
                request.transport.abort()
            return response
        finally:
            self.running -= 1
