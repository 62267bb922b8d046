"""Clients that mean harm, or are only slow: what they can make the router keep, and for how long."""

from __future__ import annotations

import asyncio
import errno
import resource
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from router_cluster import until

from diptych.errors import Unavailable
from diptych.net import listen_socket
from diptych.router.client import HttpUpstream
from diptych.router.config import RouterConfig, ServerAddress
from diptych.router.exchange import Client, ClientRequest, ServerLost
from diptych.router.limits import Gate
from diptych.router.server import MAX_HEAD_BYTES, MAX_PIPELINED, STALL_S, HttpServer

Serve = Callable[..., Awaitable[tuple[HttpServer, asyncio.StreamReader, asyncio.StreamWriter]]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve(handler)`: a server that answers by it, and a connection to it."""
    made: list[tuple[HttpServer, asyncio.StreamWriter]] = []

    async def start(handler: Any) -> Any:
        server = HttpServer(handler, max_body_bytes=1 << 20, body_timeout_s=60.0)
        sock = listen_socket("127.0.0.1", 0)
        await server.start(sock)
        reader, writer = await asyncio.open_connection(*sock.getsockname(), limit=1 << 16)
        made.append((server, writer))
        return server, reader, writer

    yield start
    for server, writer in made:
        writer.close()
        await server.close()


async def test_requests_that_are_sent_ahead_stay_few(serve: Serve) -> None:
    most = 0

    async def answer(request: ClientRequest, client: Client) -> None:
        nonlocal most
        most = max(most, server.num_active)
        client.send(200, [], b"")

    server, reader, writer = await serve(answer)
    one = b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 10_000 + b"\r\n\r\n"
    count = 1000
    writer.write(one * count)
    for _ in range(count):
        await reader.readuntil(b"\r\n\r\n")
    assert most <= MAX_PIPELINED + (256 << 10) // len(one) + 1  # uvloop reads 256 KiB at a time


async def test_a_client_that_reads_no_answers_gets_no_more(serve: Serve) -> None:
    kept = []

    async def answer(request: ClientRequest, client: Client) -> None:
        client.send(200, [], bytes(size))
        kept.append(sum(one._transport.get_write_buffer_size() for one in server.connections if one._transport))

    server, reader, writer = await serve(answer)
    size, count = 100_000, 500
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * count)
    await until(lambda: [one for one in server.connections if not one.writable.is_set()])
    other, ask = await asyncio.open_connection(*writer.get_extra_info("peername"), limit=1 << 20)
    for _ in range(20):  # time goes by
        ask.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await other.readuntil(b"\r\n\r\n")
        await other.readexactly(size)
    ask.close()
    for _ in range(count):  # all come once they are read
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(size)
    assert max(kept) < 4 * size


async def test_nothing_is_served_after_a_connections_last_answer(serve: Serve) -> None:
    """Also if that goes out slowly."""
    asked = []

    async def answer(request: ClientRequest, client: Client) -> None:
        asked.append(request.path)
        client.send(200, [], bytes(8 << 20))

    server, reader, writer = await serve(answer)
    server.draining = True
    writer.write(b"GET /1 HTTP/1.1\r\nhost: x\r\n\r\nGET /2 HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).count(b"connection: close") == 1
    await reader.readexactly(8 << 20)
    assert await reader.read() == b"" and asked == ["/1"]


@pytest.mark.parametrize("start", [b"0\r\nx: ", b"5;", b"5\r\nhello\r\n0\r\nx: "])
async def test_a_trailer_or_chunk_without_end_is_refused(serve: Serve, start: bytes) -> None:
    async def answer(request: ClientRequest, client: Client) -> None:
        raise AssertionError

    server, reader, writer = await serve(answer)
    writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + start)
    await until(lambda: [one for one in server.connections if one._head_done])
    writer.write(b"a" * (2 * MAX_HEAD_BYTES + 1))
    assert (await reader.read()).startswith(b"HTTP/1.1 431 ")


async def test_small_chunks_are_a_body_like_any_other(serve: Serve) -> None:
    """They cost no more memory than their bytes do."""
    bodies, peak = [], 0

    async def answer(request: ClientRequest, client: Client) -> None:
        nonlocal peak
        peak = tracemalloc.get_traced_memory()[1]
        bodies.append(request.body)
        client.send(200, [], b"")

    _, reader, writer = await serve(answer)
    writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    writer.write(b"2\r\nab\r\n" * 100_000 + b"0\r\nx: y\r\n\r\n")
    tracemalloc.start()
    try:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    finally:
        tracemalloc.stop()
    assert bodies == [b"ab" * 100_000] and peak < 2_000_000


async def test_a_client_is_cut_off_for_reading_nothing_not_for_reading_slowly(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.router.server.SWEEP_S", 1e6)  # the test looks instead

    async def answer(request: ClientRequest, client: Client) -> None:
        client.send(200, [], bytes(32 << 20))

    server, reader, writer = await serve(answer)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    await until(lambda: [one for one in server.connections if not one.writable.is_set()])
    [connection] = server.connections
    transport: Any = connection._transport
    now = asyncio.get_running_loop().time()
    connection.check_deadline(now)
    for _ in range(3):
        left, now = transport.get_write_buffer_size(), now + STALL_S
        while transport.get_write_buffer_size() == left:  # until what the sockets hold has been read
            await reader.read(1 << 20)
        connection.check_deadline(now)
        assert not transport.is_closing()
    connection.check_deadline(now + STALL_S / 2)
    assert not transport.is_closing()
    connection.check_deadline(now + 2 * STALL_S)
    assert transport.is_closing()


async def test_whoever_leaves_the_line_as_a_place_comes_free() -> None:
    gate = Gate(RouterConfig(max_concurrent_requests=1))
    await gate.enter()
    waiting = asyncio.create_task(gate.enter())
    await until(lambda: gate.num_waiting)
    waiting.cancel()
    gate.leave()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert gate.num_inside == gate.num_waiting == 0


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process can open none meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_router_without_sockets_blames_no_server(cluster: Any) -> None:
    """Clients can use them up. It says so, and takes nobody for dead: what runs goes on."""
    c = await cluster(1, 1, health_check_interval_secs=0.01)
    reader, writer = await asyncio.open_connection("127.0.0.1", c.router.port)
    upstream = c.router._upstream
    tries = []

    async def connect(server: Any) -> Any:
        tries.append(server)
        return await type(upstream)._connect(upstream, server)

    upstream._connect = connect
    with no_more_files():
        upstream.close()
        writer.write(b'POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 12\r\n\r\n{"text":"a"}')
        head = await reader.readuntil(b"\r\n\r\n")
        count = len(tries)
        await until(lambda: len(tries) > count + 20)  # checks of its servers
    assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in head
    assert b"out of sockets" in await reader.readuntil(b"}}")
    for server in c.router.fleet.servers:
        assert server.healthy and server.num_lives == 1 and server.num_failed == server.num_requests == 0
    assert c.router.metrics.retries == 0
    assert (await c.post("/generate", {"text": "a"}))[0] == 200
    writer.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_server_that_this_machine_has_no_address_for_is_lost(host: str) -> None:
    """Without IPv6 the error is that of a router without ports, which no server is blamed for."""
    upstream = HttpUpstream()

    async def connect(*_: Any) -> Any:
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    upstream._loop = SimpleNamespace(create_connection=connect, time=upstream._loop.time)
    with pytest.raises(ServerLost if ":" in host else Unavailable):
        await upstream._connect(ServerAddress(host, 1))
