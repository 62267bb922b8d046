"""Whole hand-overs of Qwen3-32B's pages between two GPUs, without the model: what the protocol adds to the copies.

    python -m benchmarks.gpu.handover [--backend cuda|shm|tcp] [--json FILE]

Two processes, one GPU each (or both on one), with the servers' own hubs, data planes and stores. A room's time is
decode's: from the reservation of its pages until all are here and the first token too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvloop

from benchmarks.gpu.ipc import HEADS, LAYERS, PAGE_TOKENS, PAGES, new_store
from diptych.kv.share import Grid
from diptych.transfer import wire
from diptych.transfer.bootstrap import Route
from diptych.transfer.commands import AnyEvent
from diptych.transfer.plane import DataPlane
from diptych.transfer.receive_hub import ReceiveHub
from diptych.transfer.room import KVPoll
from diptych.transfer.send_hub import SendHub
from diptych.transfer.tcp import TcpTransport
from diptych.transfer.transports import data_transports
from diptych.types import Bootstrap, FirstToken

LENGTHS = (1024, 4096, 16384)
TURNS = 9  # of each length; the first opens links and maps
TIMEOUT_S = 60.0


class Side:
    def __init__(self, backend: str) -> None:
        self.store, self.memory = new_store(0)
        self.hub: SendHub | ReceiveHub | None = None
        self.plane = DataPlane(
            self.store,
            data_transports(backend, "cuda"),
            0,
            Grid(HEADS, LAYERS),
            self.on_event,
            executor=ThreadPoolExecutor(2),
        )
        self.terms = wire.Terms(self.store.layout, "qwen3-32b", PAGE_TOKENS, HEADS, LAYERS)
        self.changed = asyncio.Event()

    def on_event(self, event: AnyEvent) -> None:
        assert self.hub is not None
        self.hub.handle_event(0, event)

    def on_change(self, room: int) -> None:
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def until_met(self, end: Any) -> None:
        await self.until(lambda: end.state >= KVPoll.WaitingForInput or end.ended)

    async def until_ended(self, end: Any) -> None:
        await self.until(lambda: end.ended)
        if end.error:
            sys.exit(f"a hand-over failed: {end.error.message}")


def rooms() -> list[tuple[int, int]]:
    """(room, tokens)"""
    return [(number + 1, tokens) for number, tokens in enumerate(t for t in LENGTHS for _ in range(TURNS))]


async def prefill(backend: str) -> None:
    side = Side(backend)
    generator = torch.Generator(device=side.memory.device).manual_seed(1)
    side.memory.view(torch.int32).random_(generator=generator)
    torch.cuda.synchronize()
    side.hub = hub = SendHub(side.terms, 1, side.plane.execute, side.on_change, boot_id="prefill")
    print(await hub.start(TcpTransport(), "127.0.0.1"), flush=True)
    for room, tokens in rooms():
        sender = hub.open(room, tokens // PAGE_TOKENS)
        sender.send(range(tokens // PAGE_TOKENS), 0)
        sender.finish(FirstToken(room, 0))
        await side.until_ended(sender)
    await hub.close()
    await side.plane.close()


async def decode(backend: str, control: str) -> None:
    side = Side(backend)
    addresses = [await side.plane.start("127.0.0.1")]

    async def fetch(host: str, port: int, timeout_s: float) -> Route:
        return Route(attn_tp_size=1, page_size=PAGE_TOKENS, kv_cache_dtype="bfloat16", control_address=control)

    side.hub = hub = ReceiveHub(
        side.terms,
        addresses,
        side.plane.execute,
        side.on_change,
        boot_id="decode",
        vocab_size=1000,
        transport=TcpTransport(),
        fetch_route=fetch,
    )
    found: dict[int, list[float]] = {}
    for room, tokens in rooms():
        receiver = hub.open(Bootstrap("127.0.0.1", 1, room))
        pages = [(7 * room + 3 * page) % PAGES for page in range(tokens // PAGE_TOKENS)]  # 320 and 3: all different
        await side.until_met(receiver)
        started = time.perf_counter()  # not the event loop's clock: uvloop's counts milliseconds
        receiver.reserve(pages, [room] * len(pages))
        await side.until_ended(receiver)
        found.setdefault(tokens, []).append((time.perf_counter() - started) * 1e3)
        print(json.dumps({"room": room, "sums": sums(side.memory, pages)}), flush=True)
    links = [type(link).__name__ for link in side.plane._links]
    mib = side.store.head_bytes * HEADS >> 20
    for tokens, times in found.items():
        median = statistics.median(times[1:])
        row = {
            "tokens": tokens,
            "first_ms": round(times[0], 2),
            "ms": round(median, 3),
            "most_ms": round(max(times[1:]), 3),
        }
        print(
            json.dumps({"row": row | {"gb_per_s": round((tokens // PAGE_TOKENS * mib << 20) / median / 1e6, 1)}}),
            flush=True,
        )
    print(json.dumps({"links": links, "sums": None}), flush=True)
    await hub.close()
    await side.plane.close()


def sums(memory: torch.Tensor, pages: list[int]) -> list[int]:
    """Of each page, so that the parent can tell whether the right ones arrived."""
    words = memory.view(torch.int32).view(PAGES, -1)
    return [int(words[page].sum(dtype=torch.int64)) for page in pages[:: max(1, len(pages) // 8)]]


def expected_sums() -> list[int]:
    """Of prefill's pages: the same numbers, drawn again."""
    _, memory = new_store(0)
    generator = torch.Generator(device=memory.device).manual_seed(1)
    memory.view(torch.int32).random_(generator=generator)
    return [int(page.sum(dtype=torch.int64)) for page in memory.view(torch.int32).view(PAGES, -1)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="cuda", choices=("cuda", "shm", "tcp"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+")
    options = parser.parse_args()
    if options.child:
        what, *more = options.child
        uvloop.run(prefill(options.backend) if what == "prefill" else decode(options.backend, more[0]))
        return
    gpus = int(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.count("GPU "))
    command = [sys.executable, "-m", "benchmarks.gpu.handover", "--backend", options.backend, "--child"]
    prefilling = subprocess.Popen(
        [*command, "prefill"], env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"}, stdout=subprocess.PIPE, text=True
    )
    assert prefilling.stdout is not None
    control = prefilling.stdout.readline().strip()
    decoding = subprocess.run(
        [*command, "decode", control],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "1" if gpus > 1 else "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    codes = decoding.returncode, prefilling.wait(TIMEOUT_S)
    said = [json.loads(line) for line in decoding.stdout.splitlines()]
    whole = expected_sums()
    wrong = 0
    for message, (_, tokens) in zip([m for m in said if "room" in m], rooms(), strict=True):
        count = tokens // PAGE_TOKENS
        wrong += message["sums"] != whole[:count][:: max(1, count // 8)]
    rows = [message["row"] for message in said if "row" in message]
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in row.items()))
    print(f"links {said[-1]['links'] if said else '?'}; {wrong} rooms with wrong pages; exit codes {codes}")
    if options.json:
        options.json.write_text(json.dumps({"backend": options.backend, "rows": rows, "wrong": wrong}, indent=1))
    sys.exit(bool(wrong or any(codes)))


if __name__ == "__main__":
    main()
