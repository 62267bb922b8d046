"""Clients: slow ones, ones that leave, and what HTTP/1.1 lets them do."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest
from aiohttp import web
from mock_server import TOKENS, hang
from router_cluster import until

from diptych.testing.processes import assert_backlog

BODY = {"text": "a"}
PART = b"data: " + b"x" * 65_000 + b"\n\n"


def request(body: object = BODY, *lines: str, path: str = "/generate", version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    head = [f"POST {path} HTTP/{version}", "host: x", f"content-length: {len(data)}", *lines, "", ""]
    return "\r\n".join(head).encode() + data


@pytest.fixture
async def connect():
    """`await connect(cluster)`: a reader and a writer of a connection to its router, closed after the test."""
    writers: list[asyncio.StreamWriter] = []

    async def open_one(c, **options):
        reader, writer = await asyncio.open_connection(
            **(options or {"host": "127.0.0.1", "port": c.router.port}), limit=1 << 20
        )
        writers.append(writer)
        return reader, writer

    yield open_one
    for writer in writers:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """An answer with a length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def test_a_burst_of_clients_finds_room(cluster):
    c = await cluster(1, 1, prometheus_port=0)
    for port in (c.router.port, c.router.metrics_port):
        assert_backlog(port)


@pytest.mark.parametrize("when", ["before the answer", "in the stream"])
async def test_a_client_that_leaves_ends_both_exchanges_at_once(cluster, when, connect):
    c = await cluster(1, 1)
    c.prefill[0].scripts.append(hang())
    if when == "in the stream":
        c.prefill[0].scripts.clear()

        async def meet_and_hang(server, request, body):
            await server._meet(body)
            await asyncio.Event().wait()

        c.prefill[0].scripts.append(meet_and_hang)
        c.decode[0].gates = [asyncio.Event() for _ in range(2)]
        c.decode[0].gates[0].set()
    else:
        c.decode[0].scripts.append(hang())
    reader, writer = await connect(c)
    writer.write(request({**BODY, "stream": True}))
    if when == "in the stream":
        await reader.readuntil(b"\n\n")
    else:
        await until(lambda: c.prefill[0].bodies and c.decode[0].bodies)
    left_at = time.monotonic()
    writer.close()
    await asyncio.gather(c.prefill[0].left.wait(), c.decode[0].left.wait())
    assert time.monotonic() - left_at < 0.25
    await until(lambda: all(server.num_requests == 0 for server in c.router.fleet.servers))
    assert all(server.num_failed == 0 for server in c.router.fleet.servers)
    assert c.router.metrics.disconnects == 1


async def test_many_clients_that_leave_at_random_points_leave_nothing_behind(cluster, connect):
    c = await cluster(2, 2, policy="random")
    rng = __import__("random").Random(5)
    baseline = len(asyncio.all_tasks())

    async def one() -> None:
        _, writer = await connect(c)
        writer.write(request({**BODY, "stream": rng.random() < 0.5}))
        for _ in range(rng.randrange(0, 30)):
            await asyncio.sleep(0)
        writer.close() if rng.random() < 0.5 else writer.transport.abort()

    for _ in range(10):
        await asyncio.gather(*(one() for _ in range(30)))
    assert (await c.post("/generate", BODY))[0] == 200
    await until(lambda: all(server.num_requests == 0 and not server.legs for server in c.router.fleet.servers))
    await until(lambda: c.router.num_active == 0)
    await until(lambda: len(asyncio.all_tasks()) <= baseline + 10)  # the mocks' kept connections
    assert all(server.breaker.allows(1e9) for server in c.router.fleet.servers)


async def test_a_slow_client_holds_the_server_back(cluster, connect):
    c = await cluster(1, 1)
    total, written = 1000, 0

    async def pour(server, request, body):
        nonlocal written
        await server._meet(body)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(total):
            await response.write(PART)
            written += 1
        await response.write_eof()
        return response

    c.decode[0].scripts.append(pour)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", c.router.port))
    reader, writer = await connect(c, sock=sock)
    writer.write(request({**BODY, "stream": True}))
    await reader.readuntil(b"\r\n\r\n")
    stuck = -1
    while stuck != written:  # until a while has gone by without a write
        stuck = written
        await asyncio.sleep(0.2)
    assert written < total / 2
    data = bytearray()
    while size := int(await reader.readuntil(b"\r\n"), 16):
        data += (await reader.readexactly(size + 2))[:-2]
    assert data == PART * total and written == total


async def test_requests_share_a_connection(cluster, connect):
    c = await cluster(1, 1)
    reader, writer = await connect(c)
    for _ in range(3):
        writer.write(request())
        assert (await read_answer(reader))[0] == 200
    writer.close()


async def test_pipelined_requests_are_answered_in_order(cluster, connect):
    c = await cluster(1, 1)
    reader, writer = await connect(c)
    count = 40
    writer.write(b"".join(request({"text": "a", "mark": i}) for i in range(count)))
    for _ in range(count):
        assert (await read_answer(reader))[0] == 200
    assert [body["mark"] for body in c.decode[0].bodies] == list(range(count))
    writer.close()


async def test_a_request_may_come_byte_by_byte(cluster, connect):
    c = await cluster(1, 1)
    reader, writer = await connect(c)
    for byte in request():
        writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert (await read_answer(reader))[0] == 200
    writer.close()


async def test_a_chunked_request_is_passed_on_with_a_length(cluster):
    c = await cluster(1, 1)

    async def parts():
        yield b'{"te'
        yield b'xt": "a"}'

    async with c.http.post("/generate", data=parts()) as response:
        assert response.status == 200
    assert "transfer-encoding" not in c.decode[0].headers[0] and c.decode[0].bodies[0]["text"] == "a"


async def test_http_1_0_streams_until_the_connection_ends(cluster, connect):
    c = await cluster(1, 1)
    reader, writer = await connect(c)
    writer.write(request({**BODY, "stream": True}, version="1.0"))
    head, _, data = (await reader.read()).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower() and b"connection: close" in head.lower()
    assert data == b"".join(c.decode[0].events("/generate", {**BODY, "stream": True}))
    writer.close()


async def test_connection_close_is_kept(cluster, connect):
    c = await cluster(1, 1)
    reader, writer = await connect(c)
    writer.write(request(BODY, "connection: close"))
    assert b"connection: close" in (await reader.read()).lower()
    writer.close()


async def test_expect_100_continue(cluster, connect):
    c = await cluster(1, 1)
    reader, writer = await connect(c)
    whole = request(BODY, "expect: 100-continue")
    head, _, body = whole.partition(b"\r\n\r\n")
    writer.write(head + b"\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await read_answer(reader))[0] == 200
    assert "expect" not in c.decode[0].headers[0]
    writer.close()


async def test_an_upgrade_is_not_taken_but_the_request_is(cluster, connect):
    c = await cluster(1, 1)
    reader, writer = await connect(c)
    writer.write(request(BODY, "connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABk"))
    assert (await read_answer(reader))[0] == 200
    assert not {"upgrade", "http2-settings"} & {name.lower() for name in c.decode[0].headers[0]}
    assert await reader.read() == b""
    writer.close()


async def test_bodies_are_bounded(cluster, connect):
    c = await cluster(1, 1, max_payload_size=1000)
    body = {"text": "x" * (1000 - len(json.dumps({"text": ""})))}
    assert (await c.post("/generate", body))[0] == 200
    body["text"] += "x"
    for lines in (request(body), _chunked(body)):
        reader, writer = await connect(c)
        writer.write(lines)
        assert (await read_answer(reader))[0] == 413
        assert await reader.read() == b""
        writer.close()
    assert len(c.decode[0].bodies) == 1


def _chunked(body: object) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
        len(data),
        data,
    )


@pytest.mark.parametrize("what", ["one header", "many headers", "the target", "without end"])
async def test_heads_are_bounded(cluster, what, connect):
    c = await cluster(1, 1)
    head = {
        "one header": request(BODY, "x: " + "a" * (16 << 10)),
        "many headers": request(BODY, *(f"x{i}: a" for i in range(130))),
        "the target": request(BODY, path="/" + "a" * (16 << 10)),
        "without end": b"GET / HTTP/1.1\r\nx: " + b"a" * (33 << 10),
    }[what]
    reader, writer = await connect(c)
    writer.write(head)
    assert (await read_answer(reader))[0] == 431
    assert await reader.read() == b""
    writer.close()
    big = request(BODY, *(f"x{i}: " + "a" * (5 << 10) for i in range(3)))
    reader, writer = await connect(c)
    writer.write(big)
    assert (await read_answer(reader))[0] == 200
    writer.close()


async def test_connections_without_progress_end(cluster, monkeypatch, connect):
    for name in ("IDLE_S", "RECEIVE_S", "SWEEP_S"):
        monkeypatch.setattr(f"diptych.router.server.{name}", 0.05)
    c = await cluster(1, 1)
    for start in (b"", b"POST /generate HT", request()[:-3]):
        reader, writer = await connect(c)
        writer.write(start)
        async with asyncio.timeout(2):
            assert await reader.read() == b""
        writer.close()
    c.decode[0].gates = [asyncio.Event()]
    async with asyncio.TaskGroup() as group:  # a request that is being served is not without progress
        answer = group.create_task(c.post("/generate", {**BODY, "stream": True}))
        await until(lambda: c.decode[0].bodies)
        await asyncio.sleep(0.3)
        c.decode[0].gates[0].set()
    assert answer.result()[0] == 200 and answer.result()[1].count(b"data:") == len(TOKENS) + 1


@pytest.mark.parametrize("framing", ["a length", "chunks"])
async def test_a_body_that_drips_has_a_deadline(cluster, monkeypatch, connect, framing):
    """Bytes that keep coming are progress, but not for ever. A request that is there in time is not concerned."""
    monkeypatch.setattr("diptych.router.server.SWEEP_S", 0.01)
    c = await cluster(1, 1, body_timeout_secs=0.1)
    reader, writer = await connect(c)
    writer.write(request())
    assert (await read_answer(reader))[0] == 200
    head = "transfer-encoding: chunked" if framing == "chunks" else "content-length: 1000000"
    writer.write(f"POST /generate HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n".encode())

    async def drip():
        while not writer.is_closing():
            writer.write(b"1\r\na\r\n" if framing == "chunks" else b"a")
            await asyncio.sleep(0.005)

    dripping = asyncio.create_task(drip())
    async with asyncio.timeout(10):
        status, data = await read_answer(reader)
    dripping.cancel()
    await asyncio.gather(dripping, return_exceptions=True)
    assert status == 408 and json.loads(data)["error"]["code"] == "body_timeout"
    assert len(c.decode[0].bodies) == 1
    assert (await c.post("/generate", BODY))[0] == 200


async def test_a_client_that_never_reads_is_left(cluster, monkeypatch):
    monkeypatch.setattr("diptych.router.server.STALL_S", 0.2)
    monkeypatch.setattr("diptych.router.server.SWEEP_S", 0.05)
    c = await cluster(1, 1)

    async def pour(server, request, body):
        await server._meet(body)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(PART)

    c.decode[0].scripts.append(pour)
    sock = socket.create_connection(("127.0.0.1", c.router.port))
    sock.sendall(request({**BODY, "stream": True}))
    await c.decode[0].left.wait()
    sock.close()
