"""Strangers at the ports: whatever they send, both servers live, nothing is written, and honest rooms go on."""

import array
import asyncio
import fcntl
import os
import pickle
import random
import socket

import pytest
from transfer_links import held, linked, settle
from transfer_pair import Pair

from diptych.errors import ProtocolError
from diptych.transfer import wire
from diptych.transfer.room import HubOptions
from diptych.transfer.shm import _GREETING, _PLACE, _SEALS, RING_BYTES, ShmTransport
from diptych.transfer.stream import MAGIC, PREFIX
from diptych.transfer.tcp import TcpTransport, split_host_port

SRC, DST = [3, 9, 1, 20], [30, 2, 17, 4]
OPTIONS = HubOptions(bootstrap_timeout_s=10.0, heartbeat_timeout_s=0.5)


def message(header, payload=b"", /, **prefix):
    values = {"magic": MAGIC, "version": wire.VERSION, "header": len(header), "payload": len(payload)} | prefix
    return PREFIX.pack(*values.values()) + header + payload


def attacks(canary):
    """Name -> bytes."""
    rng = random.Random(3)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(canary),))

    hello = wire.encode(wire.Hello(wire.VERSION, "kv data", bytes(32)))
    frame = wire.pack_frame(wire.Frame(1, 1, 0, 0, [0], [0], 0, 4, 0, 1, 0))
    made = {
        "nothing": b"",
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "noise": rng.randbytes(100_000),
        "another version": message(hello, version=9),
        "half a prefix": message(hello)[:5],
        "half a message": message(hello)[:-5],
        "a header of 4 GiB": message(b"", header=2**32 - 1),
        "a payload of 4 GiB": message(hello, payload=2**32 - 1),
        "a frame at once": message(frame, bytes(1000)),
        "a hello and a frame": message(hello) + message(frame),
        "a hello, then silence": message(hello),
        "a wrong proof": message(hello) + message(wire.encode(wire.Proof(bytes(32)))),
        "a hello for another purpose": message(wire.encode(wire.Hello(wire.VERSION, "x" * 1000, bytes(32)))),
        "control without a proof": message(wire.encode(wire.Open(1, 1))),
        "deep nesting": message(b"\x91" * 4000),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        made[f"pickle {protocol}"] = pickle.dumps(Bomb(), protocol)
        made[f"pickle {protocol} framed"] = message(pickle.dumps(Bomb(), protocol))
    for number in range(30):
        mutated = bytearray(message(hello))
        for _ in range(3):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        made[f"mutated {number}"] = bytes(mutated)
    return made


async def attack(address, data):
    """Connect, send, and stay until the server hangs up; it must, soon."""
    host, port = split_host_port(address.removeprefix("tcp://"))
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(data)
        async with asyncio.timeout(5):
            while await reader.read(65536):
                pass
    except ConnectionError:
        pass
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass


@pytest.mark.parametrize("secret", ["", "s3cret"])
async def test_strangers_at_every_tcp_port(tmp_path, secret):
    before = held()
    canary = tmp_path / "canary"
    pair = await Pair.start(
        lambda side, rank: [TcpTransport()], options=OPTIONS, secrets=(secret, secret), send_timeout_s=0.5
    )
    try:
        ports = [pair.routes["prefill", 1].control_address, pair.decode.hub.addresses[0][0]]
        attempts = [(port, data) for port in ports for data in attacks(canary).values()]
        expected = pair.decode.whole.copy()
        async with asyncio.TaskGroup() as group:
            for port, data in attempts:
                group.create_task(attack(port, data))
            await pair.hand_over(5, SRC, DST)  # in the middle of it
        expected[DST] = pair.prefill.whole[SRC]
        pair.decode.check_pool(expected)
        await pair.hand_over(6, SRC, DST)
        assert not canary.exists()
        assert pair.decode.planes[0].counters.protocol_errors > 10
    finally:
        await pair.close()
    await settle()
    assert held() == before


# ---- shared memory: strangers of the same user ----


def memfd(size, seals=0):
    fd = os.memfd_create("stranger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def greetings(tmp_path):
    """Name -> (bytes, descriptors)."""
    pipe = os.pipe()
    plain = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, RING_BYTES)
    event = os.eventfd(0)
    return {
        "noise": (b"x" * 16, []),
        "no descriptors": (_GREETING, []),
        "one descriptor": (_GREETING, [memfd(RING_BYTES, _SEALS)]),
        "memory that can shrink": (_GREETING, [memfd(RING_BYTES), event]),
        "small memory": (_GREETING, [memfd(4096, _SEALS), event]),
        "a plain file": (_GREETING, [plain, event]),
        "pipes": (_GREETING, list(pipe)),
        "too many descriptors": (_GREETING, [memfd(RING_BYTES, _SEALS), event, event, event]),
        "half a greeting": (_GREETING[:5], [event]),
    }


async def greet_wrongly(name, data, fds):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, "\0" + name)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
    try:
        async with asyncio.timeout(8):
            while await loop.sock_recv(sock, 4096):
                pass
    except ConnectionError:
        pass
    finally:
        sock.close()


async def test_strangers_at_the_shared_memory_socket(tmp_path):
    before = held()
    pair = await Pair.start(lambda side, rank: [ShmTransport(), TcpTransport()], options=OPTIONS, send_timeout_s=0.5)
    made = greetings(tmp_path)
    try:
        address = pair.decode.hub.addresses[0][0]
        name = address.rpartition("/")[2]
        async with asyncio.TaskGroup() as group:
            for data, fds in made.values():
                group.create_task(greet_wrongly(name, data, fds))
        await pair.hand_over(5, SRC, DST)
    finally:
        await pair.close()
        for fd in {fd for _, fds in made.values() for fd in fds}:
            os.close(fd)
    await settle()
    assert held() == before


async def test_memory_given_back_twice_ends_the_link():
    async with linked("shm") as (ours, theirs):
        await ours.send(b"x", memoryview(bytes(1000)))
        await theirs.recv()
        os.eventfd_write(theirs._their_freed_fd, 1 << 40)
        with pytest.raises(ProtocolError, match="never had"):
            await ours.send(b"x", memoryview(bytes(1000)))


async def test_a_place_outside_the_ring_ends_the_link():
    for place in ((RING_BYTES, 1, 64), (RING_BYTES - 10, 11, 64), (2**63, 5, 64), (0, 2**32 - 1, 64)):
        async with linked("shm") as (ours, theirs):
            await ours._control.send(_PLACE.pack(*place) + b"header")
            with pytest.raises(ProtocolError, match="beyond this link's limits"):
                await theirs.recv()
