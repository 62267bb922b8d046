"""Whole hand-overs over real transports: what arrives is, bit for bit, what was sent, and nothing else changes."""

import asyncio
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transfer_links import KINDS, transports
from transfer_pair import Pair

from diptych.transfer.link import LinkClosed
from diptych.transfer.room import KVPoll
from diptych.transfer.shm import ShmTransport
from diptych.transfer.tcp import TcpTransport, advertised_host, join_host_port, split_host_port
from diptych.transfer.unix import machine_id
from diptych.types import FirstToken

SRC, DST = [3, 9, 1, 20, 7, 5, 11], [30, 2, 17, 4, 0, 31, 8]


def over(kind):
    """Data over `kind`, control over the same, or over TCP where addresses must be host:port."""
    made = {}

    def choose(side, rank):
        if (side, rank) not in made:
            first = made["memory"] if kind == "memory" and "memory" in made else transports(kind)
            made["memory"] = first
            made[side, rank] = [first[0]] if kind in ("memory", "tcp") else [first[0], TcpTransport()]
        return made[side, rank]

    return choose


@pytest.mark.parametrize(
    ("tp", "pp"),
    [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 2), (1, 1)), ((4, 2), (1, 1)), ((2, 4), (1, 1)), ((2, 1), (2, 3))],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
async def test_pages_arrive_whole(kind, tp, pp, nothing_left):
    pair = await Pair.start(over(kind), tp=tp, pp=pp, num_layers=max(pp))
    try:
        for room, prefix in ((5, 0), (6, 2)):
            expected = pair.decode.whole.copy()
            await pair.hand_over(room, SRC, DST, prefix_pages=prefix)
            expected[DST[prefix:]] = pair.prefill.whole[SRC[prefix:]]
            pair.decode.check_pool(expected)
            pair.prefill.check_pool(pair.prefill.whole)
            for rank, store in enumerate(pair.decode.stores):
                store.data[:] = pair.decode.part(pair.decode.whole, rank)
    finally:
        await pair.close()
    assert pair.prefill.snapshot() == pair.decode.snapshot() == {"rooms": 0, "links": 0, "tasks": 0}


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
async def test_big_pages_and_many_rooms(kind, threads, nothing_left):
    """Several frames a chunk, rooms side by side on one link, and every third aborted."""
    executor = ThreadPoolExecutor(threads) if threads else None
    pair = await Pair.start(over(kind), num_pages=(8, 48), head_bytes=200_000, executor=executor)
    try:
        expected = pair.decode.whole.copy()

        async def one(room):
            src, dst = [room % 8, (room + 3) % 8, (room + 5) % 8], [3 * room, 3 * room + 1, 3 * room + 2]
            if room % 3:
                await pair.hand_over(room, src, dst, chunk=1 + room % 3)
                expected[dst] = pair.prefill.whole[src]
                return
            sender, receiver = pair.prefill.hub.open(room, 3), pair.decode.hub.open(pair.bootstrap(room))
            receiver.reserve(dst, [1, 1, 1])
            sender.send(src, 0)
            await pair.prefill.until(lambda: sender.state >= KVPoll.Transferring)
            (sender if room % 2 else receiver).abort("the client went away")
            sender.finish(FirstToken(1, 0))
            await pair.decode.until(lambda: receiver.ended and receiver.drained)
            await pair.prefill.until(lambda: sender.ended)
            assert sender.error.message == receiver.error.message == "the client went away"
            for store in pair.decode.stores:
                store.data[dst] = 7
            expected[dst] = 7

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for room in range(15):
                group.create_task(one(room))
        pair.decode.check_pool(expected)
        received = sum(plane.counters.corrupt_frames + plane.counters.failures for plane in pair.decode.planes)
        assert received == 0
    finally:
        await pair.close()
        if executor:
            executor.shutdown()
    assert pair.prefill.snapshot() == pair.decode.snapshot() == {"rooms": 0, "links": 0, "tasks": 0}


async def test_shared_memory_is_taken_where_it_reaches():
    """Prefill uses the first of decode's addresses that answers: shm on one machine, else TCP."""
    pair = await Pair.start(lambda side, rank: [ShmTransport(), TcpTransport()])
    try:
        await pair.hand_over(5, SRC, DST)
        assert [type(link).__name__ for link in pair.decode.planes[0]._links] == ["ShmLink"]
        shm, tcp = pair.decode.hub.addresses[0]
        assert shm.startswith(f"shm://{machine_id()}/") and tcp.startswith("tcp://127.0.0.1:")
    finally:
        await pair.close()


@pytest.mark.parametrize("address", ["shm://another-machine/x", f"shm://{machine_id()}/nobody-there"])
async def test_tcp_is_taken_where_shared_memory_does_not_reach(address):
    pair = await Pair.start(lambda side, rank: [ShmTransport(), TcpTransport()])
    try:
        pair.decode.hub.addresses[0][0] = address
        await pair.hand_over(5, SRC, DST)
        assert [type(link).__name__ for link in pair.decode.planes[0]._links] == ["StreamLink"]
    finally:
        await pair.close()


def test_addresses():
    assert join_host_port("::1", 5) == "[::1]:5" and join_host_port("a", 5) == "a:5"
    assert split_host_port("[::1]:5") == ("::1", 5) and split_host_port("a:5") == ("a", 5)
    assert advertised_host("10.1.2.3") == "10.1.2.3"
    assert advertised_host("0.0.0.0") not in ("0.0.0.0", "")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp://",
        "tcp://a",
        "tcp://a:",
        "tcp://:5",
        "tcp://a:²",
        "tcp://a:70000",
        f"tcp://{'a' * 100}:5",
        "tcp://\0:5",
    ],
)
async def test_addresses_that_lead_nowhere(address):
    """They come from the other server."""
    with pytest.raises(LinkClosed):
        await TcpTransport().connect(address, 5.0)


async def test_ipv6():
    try:
        listener = await TcpTransport().listen("::1", lambda link: link.close())
    except Exception as error:
        pytest.skip(f"no IPv6 here: {error}")
    listener.close()
    pair = await Pair.start(lambda side, rank: [TcpTransport()], host="::1")
    try:
        await pair.hand_over(5, SRC, DST)
    finally:
        await pair.close()


# ---- two network namespaces ----


def join_namespaces(names):
    """Two namespaces joined by a veth pair. Returns the reason why there cannot be any, or ""."""
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add veth-p netns {names[0]} type veth peer name veth-d netns {names[1]}",
        f"ip -n {names[0]} addr add 10.213.7.1/24 dev veth-p",
        f"ip -n {names[1]} addr add 10.213.7.2/24 dev veth-d",
        *(f"ip -n {name} link set lo up" for name in names),
        f"ip -n {names[0]} link set veth-p up",
        f"ip -n {names[1]} link set veth-d up",
    ]
    for command in commands:
        try:
            subprocess.run(command.split(), check=True, capture_output=True, text=True)
        except FileNotFoundError:
            return "the ip command is not installed (iproute2)"
        except subprocess.CalledProcessError as error:
            return f"not permitted: {command}: {error.stderr.strip()}"
    return ""


@pytest.fixture
def namespaces():
    names = [f"diptych-{os.getpid()}-{side}" for side in ("p", "d")]
    reason = join_namespaces(names)
    try:
        if reason:
            pytest.skip(reason)
        yield names
    finally:
        for name in names:
            try:
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            except FileNotFoundError:
                break


def test_across_network_namespaces(namespaces, tmp_path):
    """Two processes on one machine that share no network: shm is offered, does not reach, and TCP carries the pages."""
    child = str(Path(__file__).parent / "transfer_child.py")
    sides = {"prefill": (namespaces[0], "10.213.7.1"), "decode": (namespaces[1], "10.213.7.2")}
    running = {
        side: subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, child, side, host, "10.213.7.1", str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for side, (name, host) in sides.items()
    }
    try:
        said = {side: process.communicate(timeout=60)[0] for side, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    assert {side: process.returncode for side, process in running.items()} == {"prefill": 0, "decode": 0}, said
    assert said["decode"].split() == ["StreamLink", "Success"] and said["prefill"].split() == ["Success"]
    sent, received = np.load(tmp_path / "prefill.npy"), np.load(tmp_path / "decode.npy")
    assert np.array_equal(received[DST], sent[SRC])
