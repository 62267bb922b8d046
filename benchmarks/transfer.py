"""How fast KV pages move between two processes of this machine: `python benchmarks/transfer.py [--json FILE]`.

`link` is the bare transport (2 MiB messages); `hand_over` is all of it: handshake, reservation, gathering pages, two
checksums, frames, scattering, acknowledgement; `small` is the latency of a hand-over of one page once the two servers
are connected.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvloop

from diptych.kv.share import Grid
from diptych.testing.store import ArrayStore
from diptych.transfer import wire
from diptych.transfer.bootstrap import Route
from diptych.transfer.link import Link, LinkClosed
from diptych.transfer.plane import DataPlane
from diptych.transfer.receive_hub import ReceiveHub
from diptych.transfer.room import RoomEnd
from diptych.transfer.send_hub import SendHub
from diptych.transfer.tcp import TcpTransport
from diptych.transfer.transports import data_transports
from diptych.types import Bootstrap, FirstToken

HEAD_BYTES, NUM_HEADS, PAGES = 16384, 8, 800  # 128 KiB a page, 100 MiB in all
CHUNK = 64  # pages a chunk of prefill completes


class Side:
    """One server's transfer half over one rank."""

    hub: SendHub | ReceiveHub

    def __init__(self, backend: str, threads: int) -> None:
        self.store = ArrayStore(PAGES, NUM_HEADS, HEAD_BYTES)
        self.store.fill(1)
        executor = ThreadPoolExecutor(threads) if threads else None
        self.plane = DataPlane(
            self.store,
            data_transports(backend),
            0,
            Grid(NUM_HEADS, 1),
            lambda event: self.hub.handle_event(0, event),
            executor=executor,
        )
        self.terms = wire.Terms(self.store.layout, "bench", 16, NUM_HEADS, 1)
        self.changed = asyncio.Event()

    def on_change(self, room: int) -> None:
        self.changed.set()

    async def until_ended(self, end: RoomEnd) -> None:
        async with asyncio.timeout(120):
            while not end.ended:
                self.changed.clear()
                await self.changed.wait()
        if end.error:
            raise SystemExit(end.error.message)


async def prefill(backend: str, threads: int, rounds: int, pages: int) -> None:
    """The child: prints its control address, then sends one room after the other."""
    side = Side(backend, threads)
    side.hub = SendHub(side.terms, 1, side.plane.execute, side.on_change, boot_id="p")
    print(await side.hub.start(TcpTransport(), "127.0.0.1"), flush=True)
    for room in range(rounds):
        sender = side.hub.open(room, pages)
        for first in range(0, pages, CHUNK):
            sender.send(range(first, min(first + CHUNK, pages)), first)
        sender.finish(FirstToken(1, 0))
        await side.until_ended(sender)
    await side.hub.close()
    await side.plane.close()


async def decode(backend: str, threads: int, rounds: int, pages: int) -> list[float]:
    """Seconds each hand-over took, the first (which connects) left out."""
    child = await spawn("prefill", backend, str(threads), str(rounds), str(pages))
    assert child.stdout is not None
    control = (await child.stdout.readline()).decode().strip()

    async def fetch_route(host: str, port: int, timeout_s: float) -> Route:
        return Route(attn_tp_size=1, page_size=16, kv_cache_dtype="bytes", control_address=control)

    side = Side(backend, threads)
    hub = side.hub = ReceiveHub(
        side.terms,
        [await side.plane.start("127.0.0.1")],
        side.plane.execute,
        side.on_change,
        boot_id="d",
        vocab_size=100,
        transport=TcpTransport(),
        fetch_route=fetch_route,
    )
    times = []
    for room in range(rounds):
        begin = time.perf_counter()
        receiver = hub.open(Bootstrap("prefill", 1, room))
        receiver.reserve(range(pages), [1] * pages)
        await side.until_ended(receiver)
        times.append(time.perf_counter() - begin)
    await child.wait()
    await hub.close()
    await side.plane.close()
    return times[1:]


async def link_sender(backend: str, address: str, num_messages: int) -> None:
    """The child: sends 2 MiB messages until it is done and the other side has hung up."""
    link = await data_transports(backend)[0].connect(address, 5.0)
    payload = memoryview(os.urandom(wire.FRAME_BYTES))
    for _ in range(num_messages):
        await link.send(b"x", payload)
    try:
        await link.recv()
    except LinkClosed:
        link.close()


async def link_speed(backend: str, num_messages: int) -> float:
    """GB/s of bare messages."""
    links: asyncio.Queue[Link] = asyncio.Queue()
    listener = await data_transports(backend)[0].listen("127.0.0.1", links.put_nowait)
    child = await spawn("link", backend, listener.address, str(num_messages))
    link = await links.get()
    link.max_header_bytes, link.max_payload_bytes = wire.MAX_HEADER_BYTES, wire.MAX_PAYLOAD_BYTES
    await link.recv()
    begin = time.perf_counter()
    for _ in range(num_messages - 1):
        await link.recv()
    took = time.perf_counter() - begin
    link.close()
    listener.close()
    await child.wait()
    return (num_messages - 1) * wire.FRAME_BYTES / took / 1e9


async def spawn(*args: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, __file__, "--child", *args, stdout=-1)


def cpu_s() -> float:
    """Of this process and of the children that have ended; their start-up and the pools' random bytes are in it."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


async def measure(backends: list[str], rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    num_bytes = PAGES * NUM_HEADS * HEAD_BYTES
    for backend in backends:
        link = [await link_speed(backend, 300) for _ in range(3)]
        one: dict[str, Any] = {"link_gb_s": round(statistics.median(link), 2)}
        for threads in (0, 2):
            before = cpu_s()
            times = await decode(backend, threads, rounds + 1, PAGES)
            gigabytes = num_bytes * (rounds + 1) / 1e9
            one[f"hand_over_{threads}_threads"] = {
                "gb_s": round(num_bytes / statistics.median(times) / 1e9, 2),
                "best_gb_s": round(num_bytes / min(times) / 1e9, 2),
                "cpu_s_per_gb": round((cpu_s() - before) / gigabytes, 2),
            }
        small = sorted(await decode(backend, 0, 301, 1))
        one["small_ms"] = {"p50": round(small[150] * 1e3, 2), "p99": round(small[296] * 1e3, 2)}
        results[backend] = one
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--backends", nargs="+", default=["shm", "tcp"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", default="", help="file for the results")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        role, backend, *rest = args.child
        if role == "link":
            return uvloop.run(link_sender(backend, rest[0], int(rest[1])))
        return uvloop.run(prefill(backend, *(int(number) for number in rest)))
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    results = {"machine": machine, "total_mib": 100, "results": uvloop.run(measure(args.backends, args.rounds))}
    print(json.dumps(results, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
