"""Probes against real servers, and what follows from their answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from diptych.group.local.probes import Health, Probing, Target, ask
from diptych.group.pod import (
    Container,
    ContainerPort,
    ExecAction,
    HttpGetAction,
    HttpHeader,
    Probe,
    TcpSocketAction,
)

QUICK = Probing(fast_period_s=0.01, fast_exec_period_s=0.02)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def target(port: int = 0, **probes: Probe) -> Target:
    ports = (ContainerPort(container_port=port, name="http"),) if port else ()
    container = Container(name="c", ports=ports, **probes)
    return Target("127.0.0.1", container, {"PATH": "/usr/bin:/bin"}, lambda text: text, "/")


@contextlib.asynccontextmanager
async def http(answer: bytes, port: int = 0) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that gives one answer to everything; its port, and what it was asked."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            if answer:
                writer.write(answer)
                await writer.drain()
            else:
                await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield server.sockets[0].getsockname()[1], asked
    finally:
        server.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.1 302 Found\r\n\r\n", ""),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP status 404"),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "HTTP status 503"),
        (b"SSH-2.0\r\n\r\n", "the answer is no HTTP"),
        (b"x" * 40_000, "the answer is no HTTP"),
        (b"", "no answer within 1 s"),
    ],
)
async def test_http(answer: bytes, expected: str) -> None:
    async with http(answer) as (port, asked):
        headers = (HttpHeader(name="X-Who", value="probe"),)
        action = HttpGetAction(port="http", path="ready", http_headers=headers)
        assert await ask(Probe(http_get=action), target(port)) == expected
        assert asked[0].startswith(b"GET /ready HTTP/1.1\r\n")
        assert b"x-who: probe\r\n" in asked[0]


async def test_tcp() -> None:
    async with http(b"") as (port, _):
        assert await ask(Probe(tcp_socket=TcpSocketAction(port=port)), target()) == ""
    assert await ask(Probe(tcp_socket=TcpSocketAction(port=free_port())), target()) != ""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("true",), ""),
        (("sh", "-c", "exit 3"), "sh ended with 3"),
        (("sleep", "60"), "no answer within 1 s"),
        (("no-such-program",), "No such file or directory"),
    ],
)
async def test_exec(command: tuple[str, ...], expected: str) -> None:
    assert await ask(Probe(exec=ExecAction(command=command)), target()) == expected


class Seen:
    """What a container's health has reported."""

    def __init__(self, asked: Target, readiness: Probe | None) -> None:
        self.events: asyncio.Queue[object] = asyncio.Queue()
        self._health = Health(asked, readiness, QUICK, self.events.put_nowait, self.events.put_nowait)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[Seen]:
        task = asyncio.create_task(self._health.follow())
        try:
            async with asyncio.timeout(10):
                yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def test_ready_at_once_without_a_probe() -> None:
    async with Seen(target(), None).following() as seen:
        assert await seen.events.get() is True


async def test_readiness_is_asked_at_once_and_fast_until_the_first_success() -> None:
    """The manifest would wait 30 s and then ask every 60 s."""
    port = free_port()
    probe = Probe(tcp_socket=TcpSocketAction(port=port), initial_delay_seconds=30, period_seconds=60)
    async with Seen(target(), probe).following() as seen, http(b"", port):
        assert await seen.events.get() is True


async def test_readiness_is_lost_after_failure_threshold() -> None:
    port = free_port()
    probe = Probe(tcp_socket=TcpSocketAction(port=port), period_seconds=1, failure_threshold=1)
    async with Seen(target(), probe).following() as seen:
        async with http(b"", port):
            assert await seen.events.get() is True
        assert await seen.events.get() is False


async def test_startup_gates_readiness(tmp_path: Path) -> None:
    flag = tmp_path / "started"
    startup = Probe(exec=ExecAction(command=("test", "-e", str(flag))))
    async with Seen(target(startup_probe=startup), None).following() as seen:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await seen.events.get()
        flag.touch()
        assert await seen.events.get() is True


async def test_startup_gives_up_when_kubernetes_would() -> None:
    startup = Probe(exec=ExecAction(command=("false",)), period_seconds=1, failure_threshold=1)
    async with Seen(target(startup_probe=startup), None).following() as seen:
        assert await seen.events.get() == "startup probe: no success within 1 s"


async def test_liveness_fails_after_its_threshold() -> None:
    probe = Probe(exec=ExecAction(command=("false",)), period_seconds=1, failure_threshold=2)
    async with Seen(target(liveness_probe=probe), None).following() as seen:
        assert await seen.events.get() is True
        assert await seen.events.get() == "liveness probe failed 2 times: false ended with 1"


async def test_readiness_counts_only_after_startup(tmp_path: Path) -> None:
    flag = tmp_path / "started"
    startup = Probe(exec=ExecAction(command=("test", "-e", str(flag))))
    async with http(b"HTTP/1.1 200 OK\r\n\r\n") as (port, asked):
        readiness = Probe(http_get=HttpGetAction(port="http", path="/health"))
        async with Seen(target(port, startup_probe=startup), readiness).following() as seen:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await seen.events.get()
            assert asked == []
            flag.touch()
            assert await seen.events.get() is True
