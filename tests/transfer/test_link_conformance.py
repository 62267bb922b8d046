"""What diptych/transfer/link.py promises, asked of every transport."""

import asyncio

import pytest
from transfer_links import KINDS, ONE_MIB, linked, send_until_blocked, settle, transports

from diptych.errors import ProtocolError
from diptych.transfer.link import LinkClosed
from diptych.transfer.wire import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES

pytestmark = pytest.mark.parametrize("kind", KINDS)


def pattern(number, size):
    return bytes((number * 31 + i) % 251 for i in range(min(size, 997))) * (size // 997 + 1)


async def test_messages_keep_their_order_both_ways(kind, nothing_left):
    async with linked(kind) as (ours, theirs):

        async def speak(link, side):
            for i in range(200):
                size = (0, 1, 63, 64, 65, 4096, 70000)[i % 7]
                await link.send(f"{side} {i}".encode(), memoryview(pattern(i, size))[:size] if size else None)

        async def hear(link, side):
            for i in range(200):
                size = (0, 1, 63, 64, 65, 4096, 70000)[i % 7]
                header, payload = await link.recv()
                assert header == f"{side} {i}".encode()
                assert bytes(payload) == pattern(i, size)[:size]

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for work in (speak(ours, "a"), speak(theirs, "b"), hear(theirs, "a"), hear(ours, "b")):
                group.create_task(work)


@pytest.mark.parametrize("size", [1, 65535, 65536, 65537, 1 << 21, MAX_PAYLOAD_BYTES])
async def test_payloads_of_every_size_arrive(kind, size):
    payload = memoryview(pattern(size, size))[:size]
    async with asyncio.timeout(30), linked(kind) as (ours, theirs):
        for i in range(3):  # a ring goes round
            sending = asyncio.create_task(ours.send(b"%d" % i, payload))
            header, received = await theirs.recv()
            assert header == b"%d" % i
            assert received == payload
            await sending


async def test_a_header_of_the_largest_size_arrives(kind):
    header = pattern(3, MAX_HEADER_BYTES)[: MAX_HEADER_BYTES - 64]
    async with asyncio.timeout(30), linked(kind) as (ours, theirs):
        sending = asyncio.create_task(ours.send(header, memoryview(b"x")))
        assert await theirs.recv() == (header, b"x")
        await sending


async def test_what_is_beyond_the_limits_is_not_sent(kind):
    async with linked(kind) as (ours, theirs):
        with pytest.raises(ProtocolError, match="beyond the limits"):
            await ours.send(b"", memoryview(bytes(MAX_PAYLOAD_BYTES + 1)))
        with pytest.raises(ProtocolError, match="beyond the limits"):
            await ours.send(bytes(MAX_HEADER_BYTES + 1))
        await ours.send(b"still fine")
        assert (await theirs.recv())[0] == b"still fine"


@pytest.mark.parametrize("header, payload", [(101, 0), (0, 11), (5, 11), (101, 11)])
async def test_what_is_beyond_the_receivers_limits_closes_the_link(kind, header, payload):
    async with asyncio.timeout(10), linked(kind) as (ours, theirs):
        theirs.max_header_bytes, theirs.max_payload_bytes = 100, 10
        await ours.send(bytes(100), memoryview(bytes(10)))
        assert len((await theirs.recv())[1]) == 10
        await ours.send(bytes(header), memoryview(bytes(payload)))
        with pytest.raises(ProtocolError, match="beyond this link's limits"):
            await theirs.recv()
        with pytest.raises(LinkClosed):
            await ours.recv()


async def test_a_new_link_takes_only_small_messages(kind):
    server, client = transports(kind)
    called: asyncio.Queue = asyncio.Queue()
    listener = await server.listen("127.0.0.1", called.put_nowait)
    async with asyncio.timeout(10):
        ours = await client.connect(listener.address, 5.0)
        theirs = await called.get()
        assert theirs.max_header_bytes <= 4096 and theirs.max_payload_bytes == 0
        await ours.send(b"x", memoryview(b"y"))
        with pytest.raises(ProtocolError):
            await theirs.recv()
    listener.close()
    ours.close()


async def test_many_links_at_once(kind, nothing_left):
    async with asyncio.timeout(30), linked(kind, 24) as pairs:

        async def talk(number, ours, theirs):
            for i in range(10):
                await ours.send(b"%d %d" % (number, i), memoryview(ONE_MIB)[: 1000 * number])
                header, payload = await theirs.recv()
                assert header == b"%d %d" % (number, i) and len(payload) == 1000 * number
                await theirs.send(b"ok")
                assert (await ours.recv())[0] == b"ok"

        async with asyncio.TaskGroup() as group:
            for number, (ours, theirs) in enumerate(pairs):
                group.create_task(talk(number, ours, theirs))


async def test_a_receiver_that_does_not_read_stops_the_sender(kind, nothing_left):
    async with asyncio.timeout(60), linked(kind) as (ours, theirs):
        task, taken = await send_until_blocked(ours)
        assert len(taken) <= 64  # of 120 MiB
        for i in range(120):
            header, payload = await theirs.recv()
            assert header == b"%d" % i and payload == ONE_MIB
        await task


async def test_sends_of_several_tasks_take_turns(kind):
    async with asyncio.timeout(30), linked(kind) as (ours, theirs):

        async def send(who):
            for i in range(20):
                await ours.send(b"%d %d" % (who, i), memoryview(bytes([who])))
                await ours.send(b"%d %d big" % (who, i), memoryview(bytes([who]) * 300_000))

        async with asyncio.TaskGroup() as group:
            for who in range(4):
                group.create_task(send(who))
            seen: dict[int, list] = {who: [] for who in range(4)}
            for _ in range(160):
                header, payload = await theirs.recv()
                who = int(header.split()[0])
                assert set(bytes(payload)) == {who}
                seen[who].append(header)
        for who, headers in seen.items():
            assert headers == [b"%d %d%s" % (who, i, end) for i in range(20) for end in (b"", b" big")]


async def test_closing_wakes_this_sides_receiver(kind, nothing_left):
    async with asyncio.timeout(10), linked(kind) as (ours, theirs):
        receiving = asyncio.create_task(ours.recv())
        await settle()
        ours.close()
        with pytest.raises(LinkClosed):
            await receiving
        for call in (ours.recv(), ours.send(b"x"), ours.send(b"x", memoryview(b"y"))):
            with pytest.raises(LinkClosed):
                await call
        ours.close()
        with pytest.raises(LinkClosed):
            await theirs.recv()


async def test_what_was_sent_before_closing_can_be_read(kind):
    async with asyncio.timeout(10), linked(kind) as (ours, theirs):
        await ours.send(b"last words")
        ours.close()
        assert (await theirs.recv())[0] == b"last words"
        with pytest.raises(LinkClosed):
            await theirs.recv()
        with pytest.raises(LinkClosed):
            for _ in range(1000):
                await theirs.send(b"to nobody", memoryview(ONE_MIB))


@pytest.mark.parametrize("who", ["sender", "receiver"])
async def test_closing_wakes_a_sender_that_waits(kind, who, nothing_left):
    async with asyncio.timeout(30), linked(kind) as (ours, theirs):
        task, _ = await send_until_blocked(ours)
        waiting = asyncio.create_task(ours.send(b"behind it"))
        await settle()
        (ours if who == "sender" else theirs).close()
        for sending in (task, waiting):
            with pytest.raises(LinkClosed):
                await sending


async def test_a_cancelled_receive_loses_nothing(kind):
    async with asyncio.timeout(30), linked(kind) as (ours, theirs):
        sending = asyncio.create_task(send_numbers(ours, 60))
        received = []
        for turn in range(100_000):
            receiving = asyncio.create_task(theirs.recv())
            for _ in range(turn % 5):
                await asyncio.sleep(0)
            if turn % 3 == 0 and not receiving.done():
                receiving.cancel()
                try:
                    await receiving
                except asyncio.CancelledError:
                    continue
            header, payload = await receiving
            assert len(payload) == 150_000 and set(bytes(payload[::1000])) == {int(header)}
            received.append(int(header))
            if len(received) == 60:
                break
        assert received == list(range(60))
        await sending


async def send_numbers(link, count):
    for i in range(count):
        await link.send(b"%d" % i, memoryview(bytes([i]) * 150_000))


async def test_a_cancelled_send_never_leaves_half_a_message(kind, nothing_left):
    async with asyncio.timeout(30), linked(kind) as (ours, theirs):
        task, taken = await send_until_blocked(ours)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        after = asyncio.create_task(send_and_close(ours, b"next"))
        received = 0
        with pytest.raises(LinkClosed):
            while True:
                header, payload = await theirs.recv()
                if header != b"next":
                    assert header == b"%d" % received and payload == ONE_MIB
                    received += 1
        assert received <= len(taken) + 1
        await after


async def send_and_close(link, header):
    try:
        await link.send(header)
    except LinkClosed:
        return
    link.close()


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancelled_connect_leaves_nothing(kind, turns, nothing_left):
    server, client = transports(kind)
    called: list = []
    listener = await server.listen("127.0.0.1", called.append)
    connecting = asyncio.create_task(client.connect(listener.address, 5.0))
    for _ in range(turns):
        await asyncio.sleep(0)
    if connecting.cancel():
        with pytest.raises(asyncio.CancelledError):
            await connecting
    else:
        connecting.result().close()
    listener.close()
    await asyncio.wait_for(asyncio.shield(drained(called)), 5.0)


async def drained(links):
    await asyncio.sleep(0.02)  # a link that was on its way in when the listener closed
    for link in links:
        link.close()


async def test_nobody_listens(kind, nothing_left):
    server, client = transports(kind)
    listener = await server.listen("127.0.0.1", lambda link: link.close())
    listener.close()
    listener.close()
    with pytest.raises(LinkClosed):
        await client.connect(listener.address, 5.0)
