"""The router as a process: its command line, signals and exit status."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import psutil
import pytest
from mock_server import Meeting, MockServer

BODY = {"text": "a"}
START_S = 20.0


class Running:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.port = 0

    async def line_with(self, pattern: str) -> re.Match[str]:
        """The next line of the log that matches."""
        assert self.process.stderr is not None
        async with asyncio.timeout(START_S):
            while line := (await self.process.stderr.readline()).decode():
                self.lines.append(line)
                if found := re.search(pattern, line):
                    return found
        raise AssertionError(f"no line with {pattern} in {self.lines}")

    async def ended(self) -> int:
        async with asyncio.timeout(START_S):
            return await self.process.wait()


@pytest.fixture
async def route() -> AsyncIterator[Callable[..., Awaitable[Running]]]:
    """`await route("--prefill", ...)`: a router process that listens."""
    made: list[Running] = []

    async def start(*words: str, listens: bool = True) -> Running:
        code = "from diptych.cli import entry; entry()"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, "route", *words, "--port", "0", stderr=asyncio.subprocess.PIPE
        )
        made.append(Running(process))
        if listens:
            made[-1].port = int((await made[-1].line_with(r"listening on \S+:(\d+)"))[1])
        return made[-1]

    yield start
    for running in made:
        if running.process.returncode is None:
            running.process.kill()
        await running.process.wait()
        transport = getattr(running.process, "_transport")  # noqa: B009
        transport.close()


@pytest.fixture
async def pair() -> AsyncIterator[tuple[MockServer, MockServer]]:
    meeting = Meeting()
    servers = MockServer("prefill", meeting, "p0"), MockServer("decode", meeting, "d0")
    for server in servers:
        await server.start()
    yield servers
    for server in servers:
        await server.stop()


def words(pair: tuple[MockServer, MockServer]) -> list[str]:
    return ["--prefill", pair[0].url, "--prefill-bootstrap-ports", "34000", "--decode", pair[1].url]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_drains_and_exits_with_0(route, pair, number):
    pair[1].gates = [asyncio.Event() for _ in range(2)]
    pair[1].gates[0].set()
    running = await route(*words(pair))
    await running.line_with("ready")
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{running.port}") as http,
        http.post("/generate", json={**BODY, "stream": True}) as response,
    ):
        first = await response.content.readany()
        running.process.send_signal(number)
        await running.line_with("shutting down: 1 requests are running")
        async with http.post("/generate", json=BODY) as refused:
            assert refused.status == 503 and refused.headers["connection"] == "close"
            assert "shutting down" in (await refused.json())["error"]["message"]
        async with http.get("/readiness") as probe:
            assert probe.status == 503
        async with http.get("/health") as probe:
            assert probe.status == 200
        pair[1].gates[1].set()
        whole = first + await response.read()
    assert whole == b"".join(pair[1].events("/generate", {**BODY, "stream": True}))
    assert await running.ended() == 0


async def test_serves_on_while_load_balancers_learn_that_it_leaves(route, pair):
    """Also on connections that clients keep: each ends with its answer, so that the next goes elsewhere."""
    running = await route(*words(pair), "--shutdown-delay-secs", "60")
    await running.line_with("ready")
    async with aiohttp.ClientSession(f"http://127.0.0.1:{running.port}") as http:
        async with http.post("/generate", json=BODY) as before:
            assert before.status == 200 and "connection" not in before.headers
        running.process.send_signal(signal.SIGTERM)
        await running.line_with("shutting down")
        async with http.post("/generate", json=BODY) as served:
            assert served.status == 200 and served.headers["connection"] == "close"
        async with http.get("/readiness") as probe:
            assert probe.status == 503
    running.process.send_signal(signal.SIGTERM)
    assert await running.ended() == 0


async def test_the_grace_period_ends(route, pair):
    pair[1].gates = [asyncio.Event() for _ in range(2)]
    pair[1].gates[0].set()
    running = await route(*words(pair), "--shutdown-grace-period-secs", "0.2")
    await running.line_with("ready")
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{running.port}") as http,
        http.post("/generate", json={**BODY, "stream": True}) as response,
    ):
        await response.content.readany()
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    assert await running.ended() == 0
    await pair[1].left.wait()


async def test_a_second_signal_ends_at_once(route, pair):
    pair[1].gates = [asyncio.Event() for _ in range(2)]
    pair[1].gates[0].set()
    running = await route(*words(pair))
    await running.line_with("ready")
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{running.port}") as http,
        http.post("/generate", json={**BODY, "stream": True}) as response,
    ):
        await response.content.readany()
        running.process.send_signal(signal.SIGTERM)
        await running.line_with("shutting down")
        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() == 0


async def test_is_unready_until_both_roles_are_there(route, pair):
    port = pair[1].port
    await pair[1].stop()
    running = await route(*words(pair), "--worker-startup-check-interval", "0.05")
    async with aiohttp.ClientSession(f"http://127.0.0.1:{running.port}") as http:
        async with http.get("/readiness") as probe:
            assert probe.status == 503
        await pair[1].start(port)
        await running.line_with("ready: 2 servers")
        async with http.get("/readiness") as probe:
            assert probe.status == 200
        async with http.post("/generate", json=BODY) as response:
            assert response.status == 200


async def test_gives_up_when_servers_never_come(route):
    nowhere = ["--worker-urls", "http://127.0.0.1:9"]
    running = await route(*nowhere, "--worker-startup-timeout-secs", "0.3")
    await running.line_with("no worker server became healthy in time")
    assert await running.ended() == 1


@pytest.mark.parametrize(
    ("flags", "told"), [(["--nonsense", "1"], "--nonsense"), (["--decode", "http://d:1"], "--prefill must name")]
)
async def test_wrong_flags_exit_with_2(route, flags, told):
    running = await route(*flags, listens=False)
    await running.line_with(told)
    assert await running.ended() == 2


async def test_a_taken_port_is_told(route, pair):
    running = await route(*words(pair), "--prometheus-port", str(pair[0].port), listens=False)
    await running.line_with("cannot listen on 127.0.0.1")
    assert await running.ended() == 2


async def test_holds_little_memory_and_imports_no_torch(route, pair):
    running = await route(*words(pair))
    await running.line_with("ready")
    async with aiohttp.ClientSession(f"http://127.0.0.1:{running.port}") as http:
        async with asyncio.TaskGroup() as group:
            for number in range(200):
                group.create_task(_ask(http, number % 2 == 0))
        async with http.post("/generate", json=BODY) as response:
            assert response.status == 200
    process = psutil.Process(running.process.pid)
    assert process.memory_info().rss < 150e6
    assert not any("torch" in item.path for item in process.memory_maps())


async def _ask(http: aiohttp.ClientSession, stream: bool) -> None:
    async with http.post("/generate", json={**BODY, "stream": stream}) as response:
        assert response.status == 200
        await response.read()
