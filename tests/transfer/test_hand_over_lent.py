"""Hand-overs in which decode copies out of prefill's pool: the faults of a bad network again, and those of copies."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_hand_over_faults as faults
from test_hand_over_faults import (  # noqa: F401 (the same tests, on links over which pages are lent)
    DST,
    GENERATIONS,
    SRC,
    finish,
    start,
    steps_of,
    test_a_cut_fails_the_rooms_and_new_rooms_connect_again,
    test_a_server_that_stops_at_any_message_leaves_nothing,
    test_a_silent_network_fails_both_sides_within_the_heartbeat,
    test_an_abort_at_any_message_ends_both_sides_soon,
    test_any_pair_of_grids,
    test_every_pair_of_tp_sizes,
    test_storm,
    try_hand_over,
)
from transfer_links import linked
from transfer_pair import Pair

from diptych.errors import ConfigError, CorruptTransfer, ProtocolError, TransferError
from diptych.testing.network import MemoryNetwork
from diptych.testing.store import SharedStore
from diptych.testing.virtual import run_virtual
from diptych.transfer import wire
from diptych.transfer.cuda import CudaTransport
from diptych.transfer.link import LinkClosed
from diptych.transfer.pool import DataLink
from diptych.transfer.room import KVPoll
from diptych.transfer.shm import ShmTransport
from diptych.transfer.tcp import TcpTransport
from diptych.transfer.transports import data_transports
from diptych.types import FirstToken


@pytest.fixture(autouse=True)
def pages_are_lent(monkeypatch):
    monkeypatch.setattr(faults, "PULLS", True)


def as_frame(parcel):
    try:
        return wire.unpack_frame(parcel.header)
    except (ProtocolError, CorruptTransfer):
        return None


def tampered(tamper):
    """`tamper(frame)`: the frames that arrive instead of a frame."""

    def arrive(_, parcel):
        frame = as_frame(parcel)
        if frame is None:
            return [parcel]
        return [type(parcel)(wire.pack_frame(other), b"") for other in tamper(frame)]

    return arrive


def changed(frame, **values):
    return wire.Frame(**({name: getattr(frame, name) for name in frame.__struct_fields__} | values))


def test_frames_that_come_twice_or_late_are_refused_and_copied_once():
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network, tp=(2, 1))
        old = []

        def again(frame):
            stale = [changed(frame, epoch=frame.epoch ^ 1), changed(frame, generations=[0] * len(frame.pages))]
            old.append(frame)
            return [*stale, *old[:3], frame, frame]

        network.faults.tamper = tampered(again)
        expected = pair.decode.whole.copy()
        copied = []
        pair.decode.stores[0].before_copy = copied.append
        for room in range(4):
            await pair.hand_over(room, SRC, DST)
        expected[DST] = pair.prefill.whole[SRC]
        pair.decode.check_pool(expected)
        assert len(copied) == 4 * 2 * 3  # rooms, sources, chunks
        counters = pair.decode.planes[0].counters
        assert counters.stale_frames > 48 and counters.duplicate_frames > 0 and counters.failures == 0
        await finish(pair)

    run_virtual(main())


@pytest.mark.parametrize(
    "source",
    [
        wire.Source([1000] * 4, 0, 0),
        wire.Source([0] * 4, 1, 0),
        wire.Source([0] * 4, 0, 1),
        wire.Source([2**31 - 1] * 4, 2**31 - 1, 2**31 - 1),
        None,
    ],
)
def test_pages_that_the_lender_has_not_fail_the_room_and_nothing_is_copied(source):
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        network.faults.tamper = tampered(lambda frame: [changed(frame, lent=source)])
        ends = {}
        await try_hand_over(pair, ends)
        assert ends["receiver"].error.code == ends["sender"].error.code == "kv_transfer_corruption"
        pair.decode.check_pool(pair.decode.whole)
        network.faults.tamper = None
        await pair.hand_over(6, SRC, DST)
        await finish(pair)

    run_virtual(main())


def test_a_copy_that_fails_fails_its_rooms_and_ends_the_mapping():
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        store = pair.decode.stores[0]

        def fail(extents):
            raise TransferError("the GPU says no")

        store.before_copy = fail
        ends = {}
        await try_hand_over(pair, ends)
        for end in ends.values():
            assert end.state == KVPoll.Failed and end.error.code == TransferError.code
        assert ends["receiver"].error.message == "the GPU says no"
        await asyncio.sleep(0.1)
        assert store.num_mapped == 0
        store.before_copy = lambda extents: None
        await pair.hand_over(6, SRC, DST)  # over a new link
        assert store.num_mapped == 1
        await finish(pair)
        assert store.num_mapped == 0

    run_virtual(main())


def test_prefill_has_sent_only_what_decode_has_copied():
    """Else prefill could use pages again that are still to be copied for a room that succeeds."""

    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        held = []

        def hold_taken(_, parcel):
            try:
                taken = isinstance(wire.decode_loan(parcel.header), wire.Taken)
            except ProtocolError:
                taken = False
            if taken:
                held.append(parcel)
            return [] if taken else [parcel]

        network.faults.tamper = hold_taken
        ends = {}
        for step in steps_of(pair, ends).values():
            step()
        await asyncio.sleep(0.5)
        assert len(held) == 1
        assert ends["receiver"].state == KVPoll.Transferring and ends["receiver"]._final is None
        await pair.decode.until(lambda: ends["receiver"].ended)  # prefill waits no longer than its deadline
        assert "took no KV pages for 1 s" in ends["sender"].error.message
        network.faults.tamper = None
        await finish(pair)

    run_virtual(main())


@pytest.mark.parametrize("side", [0, 1], ids=["prefill", "decode"])
async def test_other_transports_are_taken_where_nothing_can_be_lent(side, nothing_left):
    pair = await Pair.start(lambda side, rank: [CudaTransport(), ShmTransport(), TcpTransport()])
    try:
        (pair.prefill, pair.decode)[side].stores[0].refuses = "not on this machine"
        expected = pair.decode.whole.copy()
        await pair.hand_over(5, SRC, DST)
        expected[DST] = pair.prefill.whole[SRC]
        pair.decode.check_pool(expected)
        assert [type(link).__name__ for link in pair.decode.planes[0]._links] == ["ShmLink"]
        assert pair.decode.stores[0].num_mapped == 0
    finally:
        await pair.close()


@pytest.mark.parametrize("who", ["prefill", "decode"])
async def test_a_room_cancelled_during_a_copy_keeps_its_pages_until_the_copy_ends(who, nothing_left):
    executor = ThreadPoolExecutor(2)
    pair = await Pair.start(lambda side, rank: [CudaTransport(), TcpTransport()], executor=executor)
    copying, go_on = threading.Event(), threading.Event()
    store = pair.decode.stores[0]

    def before_copy(extents):
        copying.set()
        assert go_on.wait(30)

    store.before_copy = before_copy
    try:
        ends = {}
        for step in steps_of(pair, ends).values():
            step()
        assert await asyncio.get_running_loop().run_in_executor(None, copying.wait, 30)
        ends["sender" if who == "prefill" else "receiver"].abort("the client went away")
        await pair.decode.until(lambda: ends["receiver"].ended)
        await pair.prefill.until(lambda: ends["sender"].ended)
        assert not ends["receiver"].drained
        go_on.set()
        await pair.decode.until(lambda: ends["receiver"].drained)
        store.before_copy = lambda extents: None
        for pool in pair.decode.stores:
            pool.data[DST] = pair.decode.whole[DST]
        expected = pair.decode.whole.copy()
        await pair.hand_over(6, SRC, DST)  # the same link, the same pages
        expected[DST] = pair.prefill.whole[SRC]
        pair.decode.check_pool(expected)
    finally:
        go_on.set()
        await pair.close()
        await asyncio.get_running_loop().run_in_executor(None, executor.shutdown)
    assert store.num_mapped == 0


async def test_a_chunk_is_one_frame_and_few_copies(nothing_left):
    pair = await Pair.start(
        lambda side, rank: [CudaTransport(), TcpTransport()], head_bytes=1 << 20, num_pages=(24, 24)
    )
    copied = []
    pair.decode.stores[0].before_copy = copied.append
    try:
        sender, receiver = pair.prefill.hub.open(5, 20), pair.decode.hub.open(pair.bootstrap(5))
        receiver.reserve([*range(2, 18), 1, 0, 20, 21], GENERATIONS[:1] * 20)
        sender.send(range(20), 0)
        sender.finish(FirstToken(1, 0))
        await pair.decode.until(lambda: receiver.ended)
        await pair.prefill.until(lambda: sender.ended)
        assert receiver.error is None and receiver._received[0].frames == 1
        assert [len(extents) for extents in copied] == [4]  # 16 pages in a row, two alone, two in a row
    finally:
        await pair.close()


async def test_a_frame_of_a_server_that_has_died_is_not_copied(nothing_left):
    """Its memory may be gone, though what it said can still be read."""
    async with linked("cuda") as (ours, theirs):
        await ours.send(b"frame")
        assert not theirs.hung_up()
        ours.close()
        assert theirs.hung_up()
        assert (await theirs.recv())[0] == b"frame"


def test_which_transports_a_server_has():
    def schemes(*choice):
        return [transport.scheme for transport in data_transports(*choice)]

    assert schemes("auto", "cuda") == ["cuda", "shm", "tcp"]
    assert schemes("auto", "cpu") == ["shm", "tcp"]
    assert schemes("cuda", "cuda") == ["cuda"]
    with pytest.raises(ConfigError, match="has no GPU; choose auto"):
        schemes("cuda", "cpu")


def test_a_link_that_breaks_while_a_frame_leaves_is_told_once():
    class Breaking:
        gone = asyncio.Event()

        async def send(self, header, payload=None):
            await self.recv()

        async def recv(self):
            await self.gone.wait()
            raise LinkClosed("the other side is gone")

    async def main():
        unheard = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
        store = SharedStore(1, 1, 64)
        link = DataLink(Breaking(), store, asyncio.get_running_loop().create_future())
        listening = asyncio.create_task(link.listen())
        delivering = asyncio.create_task(link.deliver(b"", memoryview(b""), wire.Taken(1, 1, 0), 5))
        await asyncio.sleep(0)  # both wait, and the listener hears it first
        link.link.gone.set()
        await asyncio.wait({listening, delivering})
        assert isinstance(listening.exception(), LinkClosed) and delivering.exception() is None
        assert link.broken == "the other side is gone"
        del listening, delivering
        gc.collect()
        assert unheard == []
        store.close()

    asyncio.run(main())
