"""A mock of one SGLang-style server: speaks the PD contract over real sockets, but computes nothing.

A decode mock answers only once its prefill has been asked with the same room, so that a wrong room shows as a timeout.
Tests script failures and hold streams back by events.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

MEET_S = 5.0
TOKENS = ["The", " capital", " is", " Paris", "."]

Script = Callable[["MockServer", web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]]


class Meeting:
    """Rooms that the pairs of one cluster share."""

    def __init__(self) -> None:
        self.rooms: dict[int, asyncio.Event] = {}

    def room(self, number: int) -> asyncio.Event:
        return self.rooms.setdefault(number, asyncio.Event())


class MockServer:
    def __init__(self, role: str, meeting: Meeting, name: str) -> None:
        self.role = role
        self.name = name
        self.meeting = meeting
        self.scripts: deque[Script] = deque()  # one a request; when there is none the request is served
        self.bodies: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.headers: list[Any] = []
        self.controls: list[tuple[str, str, bytes]] = []
        self.peers: set[tuple[str, int]] = set()  # who has connected
        self.num_cancelled = 0
        self.left = asyncio.Event()  # a client has gone while its request was being served
        self.healthy = True
        self.local_prefill = False  # as our decode servers can
        self.info = ""  # in place of what control requests are answered
        self.refusal: tuple[int, str] | None = None  # status and message of every answer, health checks too
        self.gates: list[asyncio.Event] = []  # gates[i] holds token i of a stream back
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/health", self._health)
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._serve)
        app.router.add_route("*", "/{path:.*}", self._control)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def running(self) -> bool:
        return self._runner is not None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def rooms(self) -> list[int]:
        """All rooms this server has been asked to meet in."""
        found: list[int] = []
        for body in self.bodies:
            room = body.get("bootstrap_room")
            found += room if isinstance(room, list) else [room]
        return found

    async def _health(self, request: web.Request) -> web.Response:
        if self.refusal is not None:
            return self._refused()
        if self.local_prefill:
            return web.json_response({"status": "ok", "local_prefill": True})
        return web.Response(status=200 if self.healthy else 503)

    def _refused(self) -> web.Response:
        assert self.refusal is not None
        status, message = self.refusal
        return web.json_response({"error": {"message": message, "code": "service_unavailable"}}, status=status)

    async def _control(self, request: web.Request) -> web.Response:
        self.controls.append((request.method, request.path_qs, await request.read()))
        if self.info:
            return web.Response(text=self.info)
        if request.path in ("/server_info", "/get_server_info"):
            return web.json_response(
                {"name": self.name, "internal_states": [{"last_gen_throughput": 1.0, "of": self.name}]}
            )
        return web.json_response({"path": request.path, "by": self.name})

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.peers.add(request.transport.get_extra_info("peername"))
        raw = await request.read()
        body = json.loads(raw)
        self.raw.append(raw)
        self.bodies.append(body)
        self.headers.append(request.headers)
        if self.refusal is not None:
            return self._refused()
        try:
            if self.scripts:
                answer = await self.scripts.popleft()(self, request, body)
                if answer is not None:
                    return answer
            await self._meet(body)
            if body.get("stream"):
                return await self._stream(request, body)
            return web.json_response(self.answer(request.path, body), headers={"x-served-by": self.name})
        except asyncio.CancelledError:
            self.num_cancelled += 1
            self.left.set()
            raise

    async def _meet(self, body: dict[str, Any]) -> None:
        if self.role == "worker":
            assert "bootstrap_room" not in body
            return
        if self.local_prefill and body["bootstrap_host"] is None:
            assert "bootstrap_room" not in body and "bootstrap_port" not in body
            return
        rooms = body["bootstrap_room"]
        for room in rooms if isinstance(rooms, list) else [rooms]:
            if self.role == "prefill":
                self.meeting.room(room).set()
            else:
                async with asyncio.timeout(MEET_S):
                    await self.meeting.room(room).wait()

    # answers

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/generate":
            rooms = body.get("bootstrap_room")
            items = [self.generated(body, i) for i in range(len(rooms) if isinstance(rooms, list) else 1)]
            return items if isinstance(rooms, list) else items[0]
        text = "".join(TOKENS)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "text": text, "logprobs": None}
        return {"id": "x", "object": "completion", "choices": [choice], "usage": {"completion_tokens": len(TOKENS)}}

    def generated(self, body: dict[str, Any], index: int, count: int = len(TOKENS)) -> dict[str, Any]:
        meta: dict[str, Any] = {"id": "x", "prompt_tokens": 3}
        if body.get("return_logprob"):
            prefill = self.role != "decode"
            meta["input_token_logprobs"] = (
                [[None, 1, None], [-0.5, 2 + index, None], [-1.5, 3, None]] if prefill else []
            )
            meta["input_top_logprobs"] = [None, [[-0.5, 2, None]], [[-1.5, 3, None]]] if prefill else []
            meta["output_token_logprobs"] = [[-0.25, 10 + i, None] for i in range(count)]
        return {"text": "".join(TOKENS[:count]), "index": index, "output_ids": list(range(count)), "meta_info": meta}

    def events(self, path: str, body: dict[str, Any]) -> list[bytes]:
        """The parts of a stream, each as it is written to the socket."""
        num = 1 if self.role == "prefill" else len(TOKENS)
        if path == "/generate":
            items: list[Any] = [self.generated(body, 0, i + 1) for i in range(num)]
        else:
            items = [{"choices": [{"index": 0, "delta": {"content": TOKENS[i]}}]} for i in range(num)]
        return [b"data: " + json.dumps(item).encode() + b"\n\n" for item in items] + [b"data: [DONE]\n\n"]

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "x-served-by": self.name})
        await response.prepare(request)
        for number, event in enumerate(self.events(request.path, body)):
            if number < len(self.gates):
                await self.gates[number].wait()
            await response.write(event)
        await response.write_eof()
        return response


# scripts


def refuse(status: int, message: str = "scripted", code: str = "scripted", sse: bool = False) -> Script:
    async def run(server: MockServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        error = {"error": {"message": message, "type": "x", "code": status if sse else code}}
        if sse:
            return web.Response(body=b"data: " + json.dumps(error).encode() + b"\n\n", content_type="text/event-stream")
        return web.json_response(error, status=status)

    return run


def reset() -> Script:
    """The connection breaks before any answer."""

    async def run(server: MockServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        await asyncio.sleep(0)
        return web.Response()

    return run


def hang() -> Script:
    """No answer, until the client goes away."""

    async def run(server: MockServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    return run


def die_after(parts: list[bytes], headers: dict[str, str] | None = None) -> Script:
    """A stream that begins with `parts` and breaks."""

    async def run(server: MockServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await server._meet(body)
        response = web.StreamResponse(headers=headers or {"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        assert request.transport is not None
        request.transport.close()  # what was written still arrives
        return response

    return run


def say(body_bytes: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Script:
    async def run(server: MockServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await server._meet(body)
        return web.Response(body=body_bytes, status=status, headers=headers or {"content-type": "application/json"})

    return run
