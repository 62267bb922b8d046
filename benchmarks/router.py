"""What the router costs: its CPU time for each request and each streamed part, and what it adds to a direct connection.

Two mock servers (a bare protocol that parses next to nothing, so that they cost little) stand behind a router process.
The same load goes to the router and straight to the decode mock. The router's CPU time is read from the kernel before
and after. Prints JSON.

    python benchmarks/router.py [--requests 3000] [--streams 16] [--parts 1000] [--output FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import uvloop

CHAT = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Tell me about the sea. " * 40}],
    "max_tokens": 128,
    "temperature": 0.7,
}
ANSWER = json.dumps(
    {"id": "0" * 32, "choices": [{"index": 0, "message": {"role": "assistant", "content": "x" * 400}}]}
).encode()
PART = b'data: {"id":"%b","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" sea"}}]}\n\n' % (
    b"0" * 32
)
DONE = b"data: [DONE]\n\n"
SETTLE_S = 0.5


class Mock(asyncio.Protocol):
    """Answers anything: GET with 200; a body that asks for a stream with parts `gap_s` apart; else with ANSWER."""

    num_parts = 0
    gap_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._held = b""

    def data_received(self, data: bytes) -> None:
        self._held += data
        head, mark, rest = self._held.partition(b"\r\n\r\n")
        if not mark:
            return
        if head.startswith(b"GET"):
            self._held = b""
            self._transport.write(_whole(b""))
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(rest) < length:
            return
        self._held = b""
        if b'"stream":true' in rest:
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            self._part(0)
        else:
            self._transport.write(_whole(ANSWER))

    def _part(self, number: int) -> None:
        if self._transport.is_closing():
            return
        if number == self.num_parts:
            self._transport.write(_chunk(DONE) + b"0\r\n\r\n")
            return
        self._transport.write(_chunk(PART))
        asyncio.get_running_loop().call_later(self.gap_s, self._part, number + 1)


class PrefillMock(Mock):
    """A prefill server streams one token, whatever is asked for."""

    def _part(self, number: int) -> None:
        self._transport.write(_chunk(PART) + _chunk(DONE) + b"0\r\n\r\n")


def _whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Caller(asyncio.Protocol):
    """A client of one connection: sends a request, counts what comes back until the answer is whole."""

    def __init__(self) -> None:
        self.bytes = 0
        self.first_at = 0.0
        self._end = b""
        self._tail = b""
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        if not self.first_at:
            self.first_at = time.perf_counter()
        self.bytes += len(data)
        self._tail = (self._tail + data)[-len(self._end) :]
        if self._tail == self._end and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("the connection closed before the answer was whole"))

    async def ask(self, request: bytes, end: bytes) -> float:
        """Send and wait; returns the seconds it took."""
        self._end, self._tail, self.first_at = end, b"", 0.0
        self._done = asyncio.get_running_loop().create_future()
        start = time.perf_counter()
        self.transport.write(request)
        async with asyncio.timeout(120):
            await self._done
        return time.perf_counter() - start


def _request(stream: bool) -> bytes:
    body = json.dumps({**CHAT, "stream": stream}, separators=(",", ":")).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        b"accept: */*\r\nuser-agent: bench\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    )


async def _callers(port: int, count: int) -> list[Caller]:
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(Caller, "127.0.0.1", port))[1] for _ in range(count)]


async def _requests(port: int, total: int, at_once: int) -> list[float]:
    request, end = _request(False), ANSWER[-16:]
    callers = await _callers(port, at_once)
    latencies: list[float] = []

    async def work(caller: Caller) -> None:
        for _ in range(total // at_once):
            latencies.append(await caller.ask(request, end))

    await asyncio.gather(*(work(caller) for caller in callers))
    for caller in callers:
        caller.transport.close()
    return latencies


async def _streams(port: int, count: int) -> list[float]:
    """First-part latencies of `count` streams at once."""
    request, end = _request(True), DONE + b"\r\n0\r\n\r\n"
    callers = await _callers(port, count)
    start = time.perf_counter()
    await asyncio.gather(*(caller.ask(request, end) for caller in callers))
    for caller in callers:
        caller.transport.close()
    return [caller.first_at - start for caller in callers]


class Timer:
    """CPU and wall seconds that a process spends inside a `with`."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process

    def __enter__(self) -> Timer:
        self._cpu, self._wall = self._spent(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s, self.wall_s = self._spent() - self._cpu, time.perf_counter() - self._wall

    def _spent(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def _ready(port: int) -> None:
    """Wait until the router says that it is ready."""
    async with asyncio.timeout(60):
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /ready HTTP/1.0\r\n\r\n")
                answer = await reader.read()
                writer.close()
                if b" 200 " in answer[:16]:
                    return
            except OSError:
                pass
            await asyncio.sleep(0.05)


def _milliseconds(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"median": round(cuts[49] * 1e3, 3), "p99": round(cuts[98] * 1e3, 3)}


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    mocks = [await loop.create_server(kind, "127.0.0.1", 0) for kind in (PrefillMock, Mock)]
    prefill, decode = (mock.sockets[0].getsockname()[1] for mock in mocks)
    port = _free_port()
    command = [sys.executable, "-c", "from diptych.cli import entry; entry()", "route"]
    command += ["--prefill", f"http://127.0.0.1:{prefill}", "34000", "--decode", f"http://127.0.0.1:{decode}"]
    command += ["--port", str(port), "--log-level", "warning", *args.router_flags]
    router = subprocess.Popen(command)  # noqa: ASYNC220  nothing else runs yet
    try:
        await _ready(port)
        process = psutil.Process(router.pid)
        await _requests(port, 200, args.at_once)
        await asyncio.sleep(SETTLE_S)
        return await _measure_all(args, process, port, decode)
    finally:
        router.send_signal(signal.SIGTERM)
        router.wait(30)
        for mock in mocks:
            mock.close()


async def _measure_all(args: argparse.Namespace, process: psutil.Process, port: int, decode: int) -> dict[str, Any]:
    with Timer(process) as whole:
        through = await _requests(port, args.requests, args.at_once)
    direct = await _requests(decode, args.requests, args.at_once)
    Mock.num_parts, Mock.gap_s = args.parts, args.gap_ms / 1000
    with Timer(process) as long:
        await _streams(port, args.streams)
    Mock.num_parts = 1
    with Timer(process) as short:
        await _streams(port, args.streams)
    parts = args.streams * (args.parts - 1)
    return {
        "router_cpu_s_per_1000_requests": round(whole.cpu_s / len(through) * 1000, 4),
        "router_cpu_us_per_streamed_part": round((long.cpu_s - short.cpu_s) / parts * 1e6, 2),
        "requests_per_s": round(len(through) / whole.wall_s, 1),
        "parts_per_s": round(parts / long.wall_s, 1),
        "latency_through_router_ms": _milliseconds(through),
        "latency_direct_ms": _milliseconds(direct),
        "router_rss_mb": round(process.memory_info().rss / 1e6, 1),
        "load": {name: getattr(args, name) for name in ("requests", "at_once", "streams", "parts", "gap_ms")},
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What the router costs.")
    parser.add_argument("--requests", type=int, default=3000, help="requests that are not streamed")
    parser.add_argument("--at-once", type=int, default=16, help="of those at a time")
    parser.add_argument("--streams", type=int, default=16, help="streams at a time")
    parser.add_argument("--parts", type=int, default=1000, help="parts of one stream")
    parser.add_argument("--gap-ms", type=float, default=2.0, help="time between two parts of one stream")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    parser.add_argument("router_flags", nargs="*", help="more flags for the router, after --")
    args = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(measure(args))
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
