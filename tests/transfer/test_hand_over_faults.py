"""The hand-over on a bad network, in virtual time: whatever happens, both servers end every room soon, give everything
back, and decode never takes for whole what is not."""

import asyncio
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_pair import PAGE_SIZE, Pair

from diptych.errors import ProtocolError, RoomInUse, TransferError
from diptych.testing.network import Faults, MemoryNetwork
from diptych.testing.virtual import run_virtual
from diptych.transfer import auth, wire
from diptych.transfer.pool import DATA_PURPOSE, LinkPool
from diptych.transfer.room import HubOptions, KVPoll
from diptych.types import FAKE_BOOTSTRAP_HOST, Bootstrap, FirstToken

SRC = [3, 9, 1, 20, 7, 5, 11]
DST = [30, 2, 17, 4, 0, 31, 8]
GENERATIONS = [page + 100 for page in DST]
OPTIONS = HubOptions(bootstrap_timeout_s=20.0, heartbeat_timeout_s=1.0)
NOTHING = {"rooms": 0, "links": 0, "tasks": 0}
PULLS = False  # decode copies out of prefill's pool: test_hand_over_lent.py does the same with it


async def start(network, **options):
    options = {"options": OPTIONS, "send_timeout_s": 1.0} | options
    return await Pair.start(lambda side, rank: [network.transport(f"{side}-{rank}", pulls=PULLS)], **options)


async def finish(pair):
    """Close both servers; nothing may be left anywhere."""
    for server in (pair.prefill, pair.decode):
        assert server.hub.snapshot()["rooms"] == 0
        assert sum(plane.snapshot()["rooms"] for plane in server.planes) == 0
    await pair.close()
    assert pair.prefill.snapshot() == pair.decode.snapshot() == NOTHING
    await asyncio.sleep(0.1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


def steps_of(pair, ends, room=5):
    """The calls that make up one hand-over, by name."""

    def open_sender():
        ends["sender"] = pair.prefill.hub.open(room, len(SRC))

    def open_receiver():
        ends["receiver"] = pair.decode.hub.open(pair.bootstrap(room))

    return {
        "open sender": open_sender,
        "open receiver": open_receiver,
        "reserve": lambda: ends["receiver"].reserve(DST, GENERATIONS),
        "send first": lambda: ends["sender"].send(SRC[:4], 0),
        "send rest": lambda: ends["sender"].send(SRC[4:], 4),
        "finish": lambda: ends["sender"].finish(FirstToken(17, 0)),
    }


def orders():
    """Every interleaving of the two servers' calls, each in its own order."""
    prefill, decode = ["open sender", "send first", "send rest", "finish"], ["open receiver", "reserve"]
    for places in itertools.combinations(range(6), 2):
        ours, theirs = iter(decode), iter(prefill)
        yield [next(ours) if i in places else next(theirs) for i in range(6)]


@pytest.mark.parametrize("pause_s", [0.0, 0.0004, 0.05])
@pytest.mark.parametrize("order", list(orders()), ids="-".join)
def test_the_two_sides_may_do_their_parts_in_any_order(order, pause_s):
    async def main():
        pair = await start(MemoryNetwork(1))
        ends = {}
        steps = steps_of(pair, ends)
        expected = pair.decode.whole.copy()
        expected[DST] = pair.prefill.whole[SRC]
        for step in order:
            steps[step]()
            await asyncio.sleep(pause_s)
        await pair.decode.until(lambda: ends["receiver"].ended)
        await pair.prefill.until(lambda: ends["sender"].ended)
        assert (ends["sender"].state, ends["receiver"].state) == (KVPoll.Success, KVPoll.Success)
        assert ends["receiver"].drained and ends["receiver"].first == FirstToken(17, 0)
        pair.decode.check_pool(expected)
        await finish(pair)

    run_virtual(main())


# ---- aborts ----


def count_messages():
    """How many messages a hand-over takes at most, handshakes included: most where pages are lent."""

    async def main():
        network = MemoryNetwork(1)
        pair = await Pair.start(lambda side, rank: [network.transport(f"{side}-{rank}", pulls=True)])
        await pair.hand_over(5, SRC, DST)
        await pair.close()
        return network.num_messages

    return run_virtual(main())


NUM_MESSAGES = count_messages()


async def at_message(network, number, action):
    """`action()` as soon as the network has taken its `number`-th message from now (0: at once)."""
    happened = asyncio.Event()
    left = number

    def tamper(pair, parcel):
        nonlocal left
        left -= 1
        if left == 0:
            happened.set()
        return [parcel]

    if number:
        network.faults.tamper = tamper
        await happened.wait()
    network.faults.tamper = None
    action()


async def try_hand_over(pair, ends, room=5):
    """The two engines at work; each stops where its end has failed."""
    steps = steps_of(pair, ends, room)
    steps["open sender"]()
    steps["open receiver"]()
    sender, receiver = ends["sender"], ends["receiver"]

    async def decode():
        await pair.decode.until(lambda: receiver.state >= KVPoll.WaitingForInput or receiver.ended, 1e6)
        if not receiver.ended:
            steps["reserve"]()
        await pair.decode.until(lambda: receiver.ended and receiver.drained, 1e6)

    async def prefill():
        await pair.prefill.until(lambda: sender.state >= KVPoll.WaitingForInput or sender.ended, 1e6)
        for step in ("send first", "send rest", "finish"):
            if not sender.ended:
                steps[step]()
            await asyncio.sleep(0.001)
        await pair.prefill.until(lambda: sender.ended, 1e6)

    async with asyncio.TaskGroup() as group:
        group.create_task(decode())
        group.create_task(prefill())


def check_decode(pair, receiver):
    """Success: all bytes are there. Failure: no byte outside the reserved pages has changed."""
    expected = pair.decode.whole.copy()
    if receiver.state == KVPoll.Success:
        expected[DST] = pair.prefill.whole[SRC]
    else:
        for store in pair.decode.stores:
            store.data[DST] = expected[DST]
    pair.decode.check_pool(expected)


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("number", range(NUM_MESSAGES + 1))
def test_an_abort_at_any_message_ends_both_sides_soon(side, number):
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        ends, loop = {}, asyncio.get_running_loop()
        work = asyncio.create_task(try_hand_over(pair, ends))
        await asyncio.sleep(0)
        end = ends["sender" if side == "prefill" else "receiver"]

        def abort():
            ends["aborted_at"] = loop.time()
            end.abort("the client went away", "aborted")

        aborting = asyncio.create_task(at_message(network, number, abort))
        async with asyncio.timeout(10):
            await work
        took = loop.time() - ends.get("aborted_at", loop.time())
        assert took < 0.1, f"{took} s"
        sender, receiver = ends["sender"], ends["receiver"]
        for one in (sender, receiver):
            if one.state == KVPoll.Failed:
                assert (one.error.type, one.error.message, one.error.code) == (
                    "abort",
                    "the client went away",
                    "aborted",
                )
        if sender.state == KVPoll.Success:
            assert receiver.state == KVPoll.Success
        check_decode(pair, receiver)
        aborting.cancel()
        network.faults.tamper = None
        pair.decode.whole = pair.decode.stores[0].data.copy()
        await pair.hand_over(6, SRC, DST)  # the same pages again, at once
        await finish(pair)

    run_virtual(main())


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_abort_before_the_other_side_knows_the_room(side):
    """Tombstones: the other half of the request arrives later and ends at once."""

    async def main():
        pair = await start(MemoryNetwork(1))
        ends, loop = {}, asyncio.get_running_loop()
        steps = steps_of(pair, ends)
        first, second = ("sender", "receiver") if side == "prefill" else ("receiver", "sender")
        steps[f"open {first}"]()
        ends[first].abort("the client went away", "aborted")
        await asyncio.sleep(1.0)
        started = loop.time()
        steps[f"open {second}"]()
        server = pair.decode if second == "receiver" else pair.prefill
        await server.until(lambda: ends[second].ended)
        assert loop.time() - started < 0.1
        assert ends[second].error.message == "the client went away"
        assert ends[first].state == ends[second].state == KVPoll.Failed
        await finish(pair)

    run_virtual(main())


# ---- silence, death, restart ----


@pytest.mark.parametrize("number", range(NUM_MESSAGES + 1))
@pytest.mark.parametrize("both", [True, False])
def test_a_silent_network_fails_both_sides_within_the_heartbeat(number, both):
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        ends, loop = {}, asyncio.get_running_loop()
        work = asyncio.create_task(try_hand_over(pair, ends))
        await asyncio.sleep(0)

        def stall():
            ends["stalled_at"] = loop.time()
            network.stall("prefill-0", "decode-0", both=both)

        stalling = asyncio.create_task(at_message(network, number, stall))
        done, _ = await asyncio.wait({work}, timeout=60)
        assert done, "still waiting"
        await work
        took = loop.time() - ends.get("stalled_at", loop.time())
        if ends["receiver"].state == KVPoll.Failed:
            met = ends["receiver"].timing.bootstrap_ms > 0 and ends["sender"].timing.bootstrap_ms > 0
            assert took < (2.1 if met else 20.1), f"{took} s"
        check_decode(pair, ends["receiver"])
        stalling.cancel()
        network.faults.tamper = None
        network.resume("prefill-0", "decode-0")
        await asyncio.sleep(5)
        pair.decode.whole = pair.decode.stores[0].data.copy()
        await pair.hand_over(6, SRC, DST)
        await finish(pair)

    run_virtual(main())


@pytest.mark.parametrize("number", range(0, NUM_MESSAGES, 3))
def test_a_cut_fails_the_rooms_and_new_rooms_connect_again(number):
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        ends, loop = {}, asyncio.get_running_loop()
        work = asyncio.create_task(try_hand_over(pair, ends))
        await asyncio.sleep(0)
        cutting = asyncio.create_task(at_message(network, number, lambda: network.cut("prefill-0", "decode-0")))
        await work
        assert loop.time() < 21
        check_decode(pair, ends["receiver"])
        cutting.cancel()
        network.faults.tamper = None
        pair.decode.whole = pair.decode.stores[0].data.copy()
        await pair.hand_over(6, SRC, DST)
        await finish(pair)

    run_virtual(main())


def test_a_restarted_prefill_server_is_found_again():
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        await pair.hand_over(5, SRC, DST)
        receiver = pair.decode.hub.open(pair.bootstrap(6))
        sender = pair.prefill.hub.open(6, len(SRC))
        await pair.decode.until(lambda: receiver.state == KVPoll.WaitingForInput)
        receiver.reserve(DST, GENERATIONS)
        await pair.prefill.until(lambda: sender.state == KVPoll.WaitingForInput)
        network.kill("prefill-0")
        await pair.decode.until(lambda: receiver.ended)
        assert "lost the prefill server" in receiver.error.message
        assert receiver.drained
        await pair.prefill.hub.close()
        network.revive("prefill-0")
        await pair.start_prefill(boot_id="prefill-2")
        await pair.hand_over(7, SRC, DST)
        await finish(pair)

    run_virtual(main())


def test_a_prefill_server_that_is_not_there_fails_the_room_soon():
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        network.kill("prefill-0")
        receiver = pair.decode.hub.open(pair.bootstrap(6))
        await pair.decode.until(lambda: receiver.ended)
        assert asyncio.get_running_loop().time() < 3.1  # three heartbeats
        assert receiver.error.status == 504 and "cannot reach the prefill server within 3 s" in receiver.error.message
        await finish(pair)

    run_virtual(main())


# ---- deadlines ----


def test_a_room_whose_request_never_reaches_prefill():
    async def main():
        pair = await start(MemoryNetwork(1))
        receiver = pair.decode.hub.open(pair.bootstrap(5))
        receiver.reserve(DST, GENERATIONS)
        await pair.decode.until(lambda: receiver.ended, 1e6)
        assert asyncio.get_running_loop().time() == pytest.approx(20.0, abs=0.2)
        assert receiver.error.code == "deadline_exceeded" and receiver.drained
        await asyncio.sleep(1)
        await finish(pair)

    run_virtual(main())


def test_a_room_whose_request_never_reaches_decode():
    async def main():
        pair = await start(MemoryNetwork(1))
        sender = pair.prefill.hub.open(5, 2)
        sender.send([1, 2], 0)
        sender.finish(FirstToken(1, 0))
        await pair.prefill.until(lambda: sender.ended, 1e6)
        assert asyncio.get_running_loop().time() == pytest.approx(20.0, abs=0.2)
        assert sender.error.status == 504 and "--disaggregation-bootstrap-timeout" in sender.error.message
        await finish(pair)

    run_virtual(main())


def test_a_prefill_that_never_finishes():
    """No wait without a deadline, also once pages travel."""

    async def main():
        pair = await start(MemoryNetwork(1))
        sender, receiver = pair.prefill.hub.open(5, len(SRC)), pair.decode.hub.open(pair.bootstrap(5))
        receiver.reserve(DST, GENERATIONS)
        sender.send(SRC[:3], 0)
        await pair.decode.until(lambda: receiver.ended, 1e6)
        await pair.prefill.until(lambda: sender.ended, 1e6)
        assert 20 <= asyncio.get_running_loop().time() < 21
        assert receiver.error.code == "deadline_exceeded"
        await finish(pair)

    run_virtual(main())


def test_rooms_that_wait_for_their_requests_are_bounded(monkeypatch):
    monkeypatch.setattr("diptych.transfer.unmet.MAX_EARLY", 3)

    async def main():
        pair = await start(MemoryNetwork(1))
        receivers = [pair.decode.hub.open(pair.bootstrap(room)) for room in range(5)]
        await pair.decode.until(lambda: sum(r.ended for r in receivers) == 2)
        assert [r.error.code for r in receivers if r.ended] == ["rate_limit_exceeded"] * 2
        for receiver in receivers:
            receiver.abort("enough")
        await asyncio.sleep(0.1)
        await finish(pair)

    run_virtual(main())


@pytest.mark.parametrize("first", ["prefill", "decode"])
@pytest.mark.parametrize("number", range(NUM_MESSAGES + 1))
def test_a_server_that_stops_at_any_message_leaves_nothing(first, number):
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        ends = {}
        work = asyncio.create_task(try_hand_over(pair, ends))
        await asyncio.sleep(0)
        reached = asyncio.Event()
        watching = asyncio.create_task(at_message(network, number, reached.set))
        await asyncio.wait({work, asyncio.create_task(reached.wait())}, return_when=asyncio.FIRST_COMPLETED)
        reached.set()
        stopped, other = (pair.prefill, pair.decode) if first == "prefill" else (pair.decode, pair.prefill)
        await stopped.close()
        watching.cancel()
        network.faults.tamper = None
        async with asyncio.timeout(21):
            await work
        check_decode(pair, ends["receiver"])
        assert stopped.snapshot() == NOTHING
        await other.close()
        await finish(pair)

    run_virtual(main())


# ---- disagreement, secrets ----


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layout": "other"}, "KV layout other here, page,head,layer,kv,slot,dim:bytes:4:1:192 there"),
        ({"fingerprint": "model-b"}, "model model-b here, model-a there"),
        ({"page_size": 8}, "--page-size 8 here, 4 there"),
        ({"num_kv_heads": 8}, "number of kv heads 8 here, 4 there"),
        ({"num_layers": 2}, "number of layers 2 here, 1 there"),
    ],
)
def test_servers_that_do_not_fit_say_why(change, words):
    async def main():
        network = MemoryNetwork(1)
        common = {"layout": "page,head,layer,kv,slot,dim:bytes:4:1:192", "fingerprint": "model-a"}
        terms = wire.Terms(**(common | {"page_size": PAGE_SIZE, "num_kv_heads": 4, "num_layers": 1} | change))
        pair = await start(network, terms=terms)
        receiver = pair.decode.hub.open(pair.bootstrap(5))
        await pair.decode.until(lambda: receiver.ended)
        assert asyncio.get_running_loop().time() < 0.1
        assert receiver.error.code == "kv_transfer_failed"
        assert receiver.error.message == f"prefill and decode do not fit: {words}"
        await finish(pair)

    run_virtual(main())


@pytest.mark.parametrize("secrets", [("a", "b"), ("a", ""), ("", "b")])
def test_servers_with_different_secrets_do_not_talk(secrets):
    async def main():
        pair = await start(MemoryNetwork(1), secrets=secrets)
        receiver = pair.decode.hub.open(pair.bootstrap(5))
        await pair.decode.until(lambda: receiver.ended)
        assert asyncio.get_running_loop().time() < 0.1
        assert "do not know the same secret" in receiver.error.message
        await finish(pair)

    run_virtual(main())


def test_servers_with_the_same_secret_talk():
    async def main():
        pair = await start(MemoryNetwork(1), secrets=("same", "same"))
        await pair.hand_over(5, SRC, DST)
        await finish(pair)

    run_virtual(main())


# ---- stale frames, corruption, duplicates ----


def is_frame(parcel):
    return bool(parcel.payload)


def test_ten_thousand_late_frames_are_refused():
    """A room is aborted, its pages go to another room; then the old frames arrive."""

    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        late = []

        def hold_back(_, parcel):
            if not is_frame(parcel):
                return [parcel]
            late.append(parcel)
            return []

        network.faults.tamper = hold_back
        ends = {}
        for step in steps_of(pair, ends).values():
            step()
        await pair.prefill.until(lambda: ends["sender"].state == KVPoll.Transferring)
        await asyncio.sleep(0.05)
        assert len(late) == 2
        ends["receiver"].abort("the client went away")
        assert ends["receiver"].drained  # the pages may be used again at once
        network.faults.tamper = None

        await pair.hand_over(6, [0, 1, 2, 4, 6, 8, 10], DST)  # finished with the same pages
        after = pair.decode.stores[0].data.copy()
        live = pair.decode.hub.open(pair.bootstrap(7))  # waiting with the same pages, newer generations
        live.reserve(DST, [generation + 1 for generation in GENERATIONS])
        await pair.decode.until(lambda: live.state == KVPoll.Transferring)

        def renamed(parcel):
            """The old bytes under the live room's name: the generation must give them away."""
            old = wire.unpack_frame(parcel.header)
            names = {name: getattr(old, name) for name in old.__struct_fields__}
            frame = wire.Frame(**(names | {"room": 7, "epoch": live._epoch}))
            return wire.pack_frame(frame), parcel.payload

        injected = [(parcel.header, parcel.payload) for parcel in late] + [renamed(parcel) for parcel in late]
        link = await network.transport("prefill-0").connect(pair.decode.hub.addresses[0][0], 1.0)
        await auth.call(link, DATA_PURPOSE, "", random.Random(5), 1.0)
        counters = pair.decode.planes[0].counters
        before = counters.stale_frames
        for i in range(10_000):
            header, payload = injected[i % len(injected)]
            await link.send(header, memoryview(payload))
        await asyncio.sleep(1)
        link.close()
        assert counters.stale_frames - before == 10_000
        assert counters.corrupt_frames == counters.duplicate_frames == 0
        assert np.array_equal(pair.decode.stores[0].data, after)
        assert live.state == KVPoll.Transferring
        live.abort("enough")
        await asyncio.sleep(0.1)
        await finish(pair)

    run_virtual(main())


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_bit_never_reaches_the_engine(seed):
    async def main():
        rng = random.Random(seed)
        network = MemoryNetwork(seed)
        pair = await start(network)
        target = rng.randrange(3)

        def flip(_, parcel):
            nonlocal target
            if not is_frame(parcel):
                return [parcel]
            target -= 1
            if target != -1:
                return [parcel]
            part = bytearray(parcel.header if seed % 2 else parcel.payload)
            bit = rng.randrange(8 * len(part))
            part[bit // 8] ^= 1 << bit % 8
            header, payload = (bytes(part), parcel.payload) if seed % 2 else (parcel.header, bytes(part))
            return [type(parcel)(header, payload)]

        network.faults.tamper = flip
        ends = {}
        for step in steps_of(pair, ends).values():
            step()
        sender, receiver = ends["sender"], ends["receiver"]
        await pair.decode.until(lambda: receiver.ended)
        await pair.prefill.until(lambda: sender.ended)
        if target < 0:
            assert sender.state == receiver.state == KVPoll.Failed
            assert asyncio.get_running_loop().time() < 1
            if seed % 2 == 0:
                assert "corruption" in receiver.error.message and "corruption" in sender.error.message
                assert receiver.error.code == "kv_transfer_corruption"
        check_decode(pair, receiver)
        network.faults.tamper = None
        pair.decode.whole = pair.decode.stores[0].data.copy()
        await pair.hand_over(6, SRC, DST)  # both servers live on
        await finish(pair)

    run_virtual(main())


@pytest.mark.parametrize("seed", range(20))
def test_duplicates_are_harmless(seed):
    async def main():
        network = MemoryNetwork(seed, Faults(duplicate_p=0.5))
        pair = await start(network, tp=(2, 1))
        expected = pair.decode.whole.copy()
        for room in range(3):
            await pair.hand_over(room, SRC, DST)
        expected[DST] = pair.prefill.whole[SRC]
        pair.decode.check_pool(expected)
        await asyncio.sleep(1)
        await finish(pair)

    run_virtual(main())


def test_frames_of_an_older_use_of_the_room_are_refused():
    """Same room, same pages, same generations: only the epoch tells them apart."""

    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)

        def older(_, parcel):
            if not is_frame(parcel):
                return [parcel]
            frame = wire.unpack_frame(parcel.header)
            values = {name: getattr(frame, name) for name in frame.__struct_fields__}
            header = wire.pack_frame(wire.Frame(**(values | {"epoch": frame.epoch ^ 1})))
            return [type(parcel)(header, parcel.payload), parcel]

        network.faults.tamper = older
        await pair.hand_over(5, SRC, DST)
        assert pair.decode.planes[0].counters.stale_frames == 3
        await finish(pair)

    run_virtual(main())


@pytest.mark.parametrize("wrong", [[1], [3], []])
def test_decode_counts_the_frames(wrong):
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)

        def miscount(_, parcel):
            try:
                message = wire.decode_control(parcel.header)
            except ProtocolError:
                return [parcel]
            if not isinstance(message, wire.Final):
                return [parcel]
            return [type(parcel)(wire.encode(wire.Final(message.room, message.epoch, message.first, wrong)), b"")]

        network.faults.tamper = miscount
        ends = {}
        await try_hand_over(pair, ends)
        assert ends["receiver"].state == ends["sender"].state == KVPoll.Failed
        network.faults.tamper = None
        await finish(pair)

    run_virtual(main())


@pytest.mark.parametrize("pages", [1, 4])
def test_cancelling_one_room_does_not_disturb_its_neighbours(pages):
    """All rooms share one data link; frames of a cancelled room are finished, not cut off."""

    async def main():
        network = MemoryNetwork(1, Faults(delay_s=(0.01, 0.02)))
        pair = await start(network, num_heads=2, num_pages=(4, 32), head_bytes=1 << 20)  # a page fills a frame
        ends = []
        for room in range(8):
            sender, receiver = pair.prefill.hub.open(room, pages), pair.decode.hub.open(pair.bootstrap(room))
            receiver.reserve(range(pages * room, pages * (room + 1)), [1] * pages)
            sender.send(range(pages), 0)
            sender.finish(FirstToken(room, 0))
            ends.append((sender, receiver))
        while network.num_bytes_in_flight < 4 << 20:  # noqa: ASYNC110 (until a frame waits half-way)
            await asyncio.sleep(0.001)
        for sender, receiver in ends[::2]:
            random.Random(1).choice([sender, receiver]).abort("the client went away")
        for sender, receiver in ends:
            await pair.decode.until(lambda receiver=receiver: receiver.ended)
            await pair.prefill.until(lambda sender=sender: sender.ended)
        assert [receiver.state for _, receiver in ends[1::2]] == [KVPoll.Success] * 4
        assert [receiver.state for _, receiver in ends[2::2]] == [KVPoll.Failed] * 3  # the first was perhaps done
        assert pair.prefill.planes[0].snapshot()["links"] == 1
        await asyncio.sleep(1)
        await finish(pair)

    run_virtual(main())


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("what", ["cut", "close"])
def test_rooms_of_which_only_one_half_is_open_end_with_the_link(side, what):
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        await pair.hand_over(1, SRC, DST)
        receiver = pair.decode.hub.open(pair.bootstrap(5))  # prefill never gets this one's request
        receiver.reserve(DST, GENERATIONS)
        sender = pair.prefill.hub.open(6, 2)
        other = pair.decode.hub.open(pair.bootstrap(6))  # waits for pages
        await asyncio.sleep(0.1)
        assert pair.prefill.hub.snapshot()["rooms"] == 2
        if what == "cut":
            network.cut("prefill-0", "decode-0")
        else:
            await (pair.prefill if side == "prefill" else pair.decode).close()
        await asyncio.sleep(0.1)
        assert all(end.state == KVPoll.Failed for end in (receiver, sender, other))
        assert pair.prefill.hub.snapshot()["rooms"] == 0 and pair.decode.hub.snapshot()["rooms"] == 0
        await finish(pair)

    run_virtual(main())


def test_idle_data_links_are_closed_and_opened_again():
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network, idle_timeout_s=10.0)
        for room in range(3):
            await pair.hand_over(room, SRC, DST)
            assert (network.num_links, pair.prefill.planes[0].snapshot()["links"]) == (2, 1)
            await asyncio.sleep(9)
            assert network.num_links == 2
            await asyncio.sleep(2)
            assert network.num_links == 1  # control stays
        await finish(pair)

    run_virtual(main())


def test_a_prompt_of_too_many_pages_fails_its_own_room_only():
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        neighbour, receiver = (pair.decode.hub.open(pair.bootstrap(room)) for room in (1, 2))
        await pair.decode.until(lambda: receiver.state == KVPoll.WaitingForInput)
        pages = range(wire.MAX_PAGES + 1)
        receiver.reserve(pages, [1] * len(pages))
        await asyncio.sleep(1)
        assert (receiver.state, receiver.error.status) == (KVPoll.Failed, 400)
        assert "raise --page-size" in receiver.error.message
        assert neighbour.state == KVPoll.WaitingForInput
        neighbour.abort("enough")
        await asyncio.sleep(0.1)
        await finish(pair)

    run_virtual(main())


def test_a_link_that_is_wanted_at_the_moment_of_its_retirement():
    """The room gets another one; it does not fail with the old."""

    async def main():
        network = MemoryNetwork(1)
        broken = []
        took = []

        def on_link(link):
            took.append(asyncio.ensure_future(auth.answer(link, DATA_PURPOSE, "", network.rng, 5.0)))

        address = (await network.transport("decode").listen("decode", on_link)).address
        times = {"connect_timeout_s": 5.0, "idle_timeout_s": 60.0}
        pool = LinkPool(
            [network.transport("prefill")], {}, "", network.rng, lambda rooms, why: broken.append(rooms), None, **times
        )
        first = await pool.use((address,), 1)
        wanted = asyncio.Event()

        async def later():
            await wanted.wait()
            return await pool.use((address,), 2)

        second = asyncio.ensure_future(later())
        await asyncio.sleep(0)
        pool.leave(1)
        asyncio.get_running_loop().call_at(first.idle.when() - 1e-12, wanted.set)  # in the same turn of the loop
        await asyncio.sleep(70)
        assert (await second) is not first
        assert (broken, len(pool), len(took)) == ([], 1, 2)
        await pool.close()
        await asyncio.gather(*took)

    run_virtual(main())


def test_data_links_are_ready_before_the_first_room_needs_them():
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network, tp=(2, 2))
        receiver = pair.decode.hub.open(pair.bootstrap(1))
        await pair.decode.until(lambda: receiver.state == KVPoll.WaitingForInput)
        await asyncio.sleep(0.1)
        assert [plane.snapshot()["links"] for plane in pair.prefill.planes] == [1, 1]
        receiver.abort("enough")
        await asyncio.sleep(0.1)
        await finish(pair)

    run_virtual(main())


def test_a_room_number_may_be_used_again():
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        for _ in range(3):
            await pair.hand_over(5, SRC, DST)
        sender, receiver = pair.prefill.hub.open(5, 2), pair.decode.hub.open(pair.bootstrap(5))
        for hub_open in (lambda: pair.prefill.hub.open(5, 2), lambda: pair.decode.hub.open(pair.bootstrap(5))):
            with pytest.raises(RoomInUse, match=r"room 5 is in use.*bootstrap_room"):
                hub_open()
        sender.abort("enough")
        await pair.decode.until(lambda: receiver.ended)
        await pair.hand_over(5, SRC, DST)
        await finish(pair)

    run_virtual(main())


def test_mistakes_of_the_engine_are_told():
    async def main():
        pair = await start(MemoryNetwork(1))
        sender, receiver = pair.prefill.hub.open(5, 4), pair.decode.hub.open(pair.bootstrap(5))
        for call in (
            lambda: sender.send([1], 1),
            lambda: sender.send([1] * 5, 0),
            lambda: sender.finish(FirstToken(1, 0)),
            lambda: receiver.reserve([1], [1], PAGE_SIZE + 1),
            lambda: receiver.reserve([1], [1], 2 * PAGE_SIZE),
            lambda: receiver.reserve([1, 1], [1, 1]),
            lambda: receiver.reserve([1, 2], [1]),
        ):
            with pytest.raises(TransferError):
                call()
        receiver.reserve([1, 2, 3], [1, 1, 1])
        with pytest.raises(TransferError):
            receiver.reserve([1, 2, 3], [1, 1, 1])
        await pair.decode.until(lambda: receiver.ended)
        assert "decode reserved 3 pages where the prompt has 4" in receiver.error.message
        await finish(pair)

    run_virtual(main())


# ---- different tensor and pipeline parallel sizes ----


async def hand_over_between(tp, pp, num_heads, num_layers):
    """Two rooms; each byte of each page comes once to each rank that holds it, and nothing else changes."""
    pair = await start(MemoryNetwork(1), tp=tp, pp=pp, num_heads=num_heads, num_layers=num_layers)
    grid = pair.decode.grid
    expected = pair.decode.whole.copy()
    for room, prefix in enumerate((0, 2)):
        sender, receiver = await pair.hand_over(room, SRC, DST, prefix_pages=prefix)
        expected[DST[prefix:]] = pair.prefill.whole[SRC[prefix:]]
        pair.decode.check_pool(expected)
        copies = max(num_heads, grid.tp)  # of heads on the decode side
        num_bytes = len(SRC[prefix:]) * copies * num_layers * pair.decode.layer_bytes
        assert sender.timing.num_bytes == receiver.timing.num_bytes == num_bytes
        expected = np.random.default_rng(9).integers(0, 256, expected.shape, np.uint8)
        for rank, store in enumerate(pair.decode.stores):
            store.data[:] = pair.decode.part(expected, rank)
    for plane in pair.decode.planes:
        assert plane.counters.stale_frames == plane.counters.duplicate_frames == 0
        assert plane.counters.pages_received == len(SRC) + len(SRC[2:])
    sent = sum(plane.counters.bytes_sent for plane in pair.prefill.planes)
    assert sent == sum(plane.counters.bytes_received for plane in pair.decode.planes)
    await finish(pair)


@pytest.mark.parametrize("num_heads", [4, 2])
@pytest.mark.parametrize("decode_tp", [1, 2, 4])
@pytest.mark.parametrize("prefill_tp", [1, 2, 4])
def test_every_pair_of_tp_sizes(prefill_tp, decode_tp, num_heads):
    run_virtual(hand_over_between((prefill_tp, decode_tp), (1, 1), num_heads, 1))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_pair_of_grids(data):
    """Each head of each layer of each page arrives exactly once, however the two servers share the model out."""
    num_heads, num_layers = data.draw(st.sampled_from([1, 2, 4, 6])), data.draw(st.sampled_from([2, 3, 4, 6]))
    sizes = st.sampled_from([tp for tp in (1, 2, 3, 4, 6) if num_heads % tp == 0 or tp % num_heads == 0])
    stages = st.integers(1, min(4, num_layers))
    tp, pp = (data.draw(sizes), data.draw(sizes)), (data.draw(stages), data.draw(stages))
    run_virtual(hand_over_between(tp, pp, num_heads, num_layers))


def test_frames_are_as_large_as_if_a_rank_had_but_the_layers_it_sends():
    """Two pages of one head, four layers of 512 KiB: a stage of one layer gets them in one frame of 1 MiB, a rank of
    all four in two of 2 MiB."""

    async def main(pp):
        pair = await start(MemoryNetwork(1), pp=pp, num_heads=1, num_layers=4, head_bytes=2 << 20, num_pages=(2, 2))
        _, receiver = await pair.hand_over(1, [0, 1], [1, 0])
        await finish(pair)
        return [receiver._received[rank].frames for rank in range(pp[1])]

    assert run_virtual(main((1, 4))) == [1, 1, 1, 1]
    assert run_virtual(main((1, 1))) == [2]


@pytest.mark.parametrize(("num_ranks", "pp_size"), [(3, 2), (1, 0), (2, 2), (3, 1)])
def test_a_decode_server_whose_ranks_cannot_share_the_model_is_turned_away(num_ranks, pp_size):
    """The model has one layer and four kv heads."""

    async def main():
        pair = await start(MemoryNetwork(1))
        pair.decode.hub.addresses, pair.decode.hub.pp_size = pair.decode.hub.addresses * num_ranks, pp_size
        commands = []
        pair.prefill.hub.broadcast = commands.append
        receiver = pair.decode.hub.open(pair.bootstrap(5))
        await pair.decode.until(lambda: receiver.ended)
        assert receiver.error is not None and commands == []  # a rank that got one would have to end
        await finish(pair)

    run_virtual(main())


# ---- everything at once ----


async def storm(seed):
    rng = random.Random(seed)
    network = MemoryNetwork(seed, Faults(pause_p=0.02, duplicate_p=0.05, cut_p=0.004, connect_fail_p=0.1))
    tp, pp = rng.choice([(1, 1), (2, 1), (1, 2), (2, 2)]), rng.choice([(1, 1), (2, 1), (1, 2), (3, 2)])
    pair = await start(network, tp=tp, pp=pp, num_layers=3, num_pages=(64, 64))
    free = list(range(64))
    outcomes = []

    async def one(room):
        await asyncio.sleep(rng.random() * 2)
        count = rng.randrange(1, 6)
        src = rng.sample(range(64), count)
        sender = receiver = None
        if rng.random() < 0.95:
            sender = pair.prefill.hub.open(room, count)
        await asyncio.sleep(rng.choice([0, 0.01, 0.1]))
        if rng.random() < 0.95:
            receiver = pair.decode.hub.open(pair.bootstrap(room))
        ends = [end for end in (sender, receiver) if end is not None]
        if ends and rng.random() < 0.3:
            end = rng.choice(ends)
            asyncio.get_running_loop().call_later(rng.random() * 0.2, end.abort, "storm")
        dst = [free.pop() for _ in range(min(count, len(free)))]
        if receiver is not None:
            if len(dst) == count:
                receiver.reserve(dst, [rng.randrange(1 << 40) for _ in dst])
            else:
                receiver.abort("no room")
        if sender is not None:
            sender.send(src, 0)
            sender.finish(FirstToken(room, 0))
        for end, server in ((sender, pair.prefill), (receiver, pair.decode)):
            if end is not None:
                await server.until(lambda end=end: end.ended and getattr(end, "drained", True), 1e6)
        if receiver is not None and receiver.state == KVPoll.Success:
            assert receiver.first == FirstToken(room, 0)
            for rank, store in enumerate(pair.decode.stores):
                assert np.array_equal(store.data[dst], pair.decode.part(pair.prefill.whole, rank)[src])
        free.extend(dst)
        outcomes.append((room, *(end and int(end.state) for end in (sender, receiver))))

    async def trouble():
        for _ in range(4):
            await asyncio.sleep(rng.random())
            p, d = (
                f"{side}-{rng.randrange(server.grid.num_ranks)}"
                for side, server in (("prefill", pair.prefill), ("decode", pair.decode))
            )
            if rng.random() < 0.5:
                network.cut(p, d)
            else:
                network.stall(p, d)
                await asyncio.sleep(rng.random() * 3)
                network.resume(p, d)

    async with asyncio.TaskGroup() as group:
        group.create_task(trouble())
        for room in range(30):
            group.create_task(one(room))
    network.faults = Faults()
    await asyncio.sleep(25)  # rooms of which only one half came
    await pair.hand_over(1000, SRC, DST)
    when = asyncio.get_running_loop().time()
    await finish(pair)
    return outcomes, network.num_messages, when


@pytest.mark.parametrize("seed", range(40))
def test_storm(seed):
    outcomes, _, _ = run_virtual(storm(seed))
    assert len(outcomes) == 30


def test_a_storm_replays_exactly():
    assert run_virtual(storm(5)) == run_virtual(storm(5))


# ---- nobody ----


def test_a_hand_over_with_nobody():
    async def main():
        pair = await start(MemoryNetwork(1))
        receivers = [pair.decode.hub.open(Bootstrap(FAKE_BOOTSTRAP_HOST, 8998, room)) for room in (0, 0, 1)]
        assert all(r.state == KVPoll.WaitingForInput for r in receivers)
        for receiver in receivers:
            receiver.reserve([1, 2], [1, 1])
        assert all(r.state == KVPoll.Success and r.drained for r in receivers)
        tokens = [receiver.first.token for receiver in receivers]
        assert tokens[0] == tokens[1] != tokens[2] and all(0 <= token < 1000 for token in tokens)
        pair.decode.hub._fake = True  # --disaggregation-transfer-backend fake
        faked = pair.decode.hub.open(pair.bootstrap(0))
        faked.reserve([1, 2], [1, 1])
        assert faked.state == KVPoll.Success and faked.first.token == tokens[0]
        senders = [pair.prefill.hub.open(0, 2, nobody=True) for _ in range(2)]
        for sender in senders:
            assert sender.state == KVPoll.WaitingForInput
            sender.send([1, 2], 0)
            sender.finish(FirstToken(3, 0))
            assert sender.state == KVPoll.Success
        await asyncio.sleep(0)
        assert pair.decode.changes and pair.prefill.changes
        await finish(pair)

    run_virtual(main())
