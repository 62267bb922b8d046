"""A server over a mock engine, on a port that the kernel chooses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from mock_engine_client import EOS, MockEngineClient, Script, outputs_for

from diptych.api.app import build_app
from diptych.api.context import CONTEXT, Context
from diptych.api.site import start_site
from diptych.config import ServerConfig
from diptych.net import listen_socket
from diptych.text.tokenizer import Tokenizer
from diptych.types import Finish, Output, Request

DEMO = str(Path(__file__).parents[2] / "models" / "demo")
TEXT = "Hello, world! 你好 😀"
HEALTHY = ("/health", "/ready", "/health_generate")
INFERENCE: dict[str, dict[str, Any]] = {
    "/generate": {"text": "a"},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}


@dataclass
class Server:
    url: str
    engine: MockEngineClient
    ctx: Context
    app: web.Application
    http: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body, **kwargs) as reply:
            return reply.status, await reply.json()

    async def get(self, path: str, **kwargs: Any) -> tuple[int, Any]:
        async with self.http.get(self.url + path, **kwargs) as reply:
            return reply.status, await reply.json()

    async def events(self, path: str, body: Any) -> list[bytes]:
        """The data of a stream's events, in order."""
        async with self.http.post(self.url + path, json={**body, "stream": True}) as reply:
            assert reply.status == 200, await reply.text()
            assert reply.content_type == "text/event-stream"
            raw = await reply.read()
        assert raw.endswith(b"\n\n")
        found = raw.removesuffix(b"\n\n").split(b"\n\n")
        assert all(item.startswith(b"data: ") for item in found)
        return [item.removeprefix(b"data: ") for item in found]


def says(tokenizer: Tokenizer, text: str, *, step: int = 1) -> Script:
    """A script that answers every request with `text` and an end of sequence."""
    tokens = [*tokenizer.encode(text, special=False), EOS]

    def script(request: Request) -> list[Output | Exception]:
        return outputs_for(request, tokens, Finish("stop", matched=EOS), step=step)

    return script


Serve = Callable[..., Awaitable[Server]]


@asynccontextmanager
async def running(demo: Tokenizer, script: str | Script, settings: dict[str, Any]) -> AsyncIterator[Server]:
    engine = MockEngineClient(says(demo, script) if isinstance(script, str) else script)
    settings = {"model_path": DEMO, "served_model_name": "demo", "sampling_defaults": "openai", **settings}
    app = build_app(ServerConfig(**settings), engine, demo)
    sock = listen_socket("127.0.0.1", 0)
    runner = await start_site(app, sock)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        async with aiohttp.ClientSession() as http:
            yield Server(url, engine, app[CONTEXT], app, http)
    finally:
        await engine.open_gate()
        await runner.cleanup()
