"""Pairs of links over every transport, and what a process holds that links could leak."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from pathlib import Path

from diptych.testing.network import MemoryNetwork
from diptych.transfer.cuda import CudaTransport
from diptych.transfer.shm import ShmTransport
from diptych.transfer.tcp import TcpTransport
from diptych.transfer.wire import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES

ONE_MIB = bytes(range(256)) * 4096
KINDS = ["memory", "tcp", "shm", "cuda"]
SOCKET_KINDS = ["tcp", "shm", "cuda"]


def transports(kind):
    """(for the side that listens, for the side that connects)."""
    if kind == "memory":
        network = MemoryNetwork(seed=1)
        return network.transport("server"), network.transport("client")
    made = {"tcp": TcpTransport, "shm": ShmTransport, "cuda": CudaTransport}[kind]
    return made(), made()


def trust(link):
    """As after the handshake."""
    link.max_header_bytes, link.max_payload_bytes = MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES


@asynccontextmanager
async def linked(kind, count=1):
    """`count` connected (caller's end, called end) pairs, trusted; all closed at the end."""
    server, client = transports(kind)
    called: asyncio.Queue = asyncio.Queue()
    listener = await server.listen("127.0.0.1", called.put_nowait)
    pairs = []
    try:
        for _ in range(count):
            ours = await client.connect(listener.address, 5.0)
            theirs = await asyncio.wait_for(called.get(), 5.0)
            trust(ours)
            trust(theirs)
            pairs.append((ours, theirs))
        yield pairs if count > 1 else pairs[0]
    finally:
        listener.close()
        for ours, theirs in pairs:
            ours.close()
            theirs.close()


def num_fds():
    """Open descriptors; libuv keeps /dev/null open once it has served a connection of its own."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}") != "/dev/null"
        except FileNotFoundError:  # of the listing itself
            continue
    return count


def held():
    """File descriptors, ring mappings, files in /dev/shm, tasks."""
    rings = Path("/proc/self/maps").read_text().count("memfd:diptych-kv")
    shared = sorted(name for name in os.listdir("/dev/shm") if "diptych" in name)
    return num_fds(), rings, shared, len(asyncio.all_tasks())


async def settle():
    """Let callbacks and cancelled tasks finish."""
    for _ in range(10):
        await asyncio.sleep(0)


async def send_until_blocked(link, most=120):
    """Sends numbered messages of 1 MiB. Returns (the task, a list that grows by each message taken)."""
    taken: list[int] = []

    async def send():
        for i in range(most):
            await link.send(b"%d" % i, memoryview(ONE_MIB))
            taken.append(i)

    task = asyncio.create_task(send())
    before = -1
    while len(taken) != before:
        before = len(taken)
        await asyncio.wait({task}, timeout=0.2)
    assert not task.done(), "nothing stopped the sender"
    return task, taken
