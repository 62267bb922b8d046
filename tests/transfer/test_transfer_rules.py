"""The pure parts: head slices, frame cuts, the ring, the wire; and the checks before a page is written."""

import asyncio
import itertools
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_links import linked

from diptych.errors import ConfigError, CorruptTransfer, DiptychError, ProtocolError
from diptych.kv.share import Grid, head_range, layer_range
from diptych.testing.network import MemoryNetwork
from diptych.testing.store import ArrayStore
from diptych.testing.virtual import Deadlock, run_virtual
from diptych.transfer import auth, wire
from diptych.transfer.commands import Cancel, Cancelled, Expect, Expecting, Received, TransferFailed
from diptych.transfer.heads import pieces_to_send
from diptych.transfer.incoming import Counters, Incoming
from diptych.transfer.link import LinkClosed
from diptych.transfer.outgoing import cuts
from diptych.transfer.plane import DataPlane
from diptych.transfer.ring import RingSpace
from diptych.transfer.transports import data_transports
from diptych.types import FirstToken, TokenLogprob

# ---- heads and cuts ----


def check_pieces(here, there):
    """Each head of each layer of each decode rank has one source, which holds it."""
    seen = {}
    for rank in range(here.num_ranks):
        for piece in pieces_to_send(here, rank, there):
            for head, layer in itertools.product(piece.heads, piece.layers):
                assert head in here.heads(rank) and layer in here.layers(rank)
                assert (piece.rank, head, layer) not in seen
                seen[piece.rank, head, layer] = rank
    ranks = range(there.num_ranks)
    assert seen.keys() == {(r, *part) for r in ranks for part in itertools.product(there.heads(r), there.layers(r))}
    if here == there:
        assert all(source == rank for (rank, _, _), source in seen.items())


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8, 6])
def test_each_head_of_each_decode_rank_has_one_source(num_heads):
    worlds = [w for w in range(1, 17) if num_heads % w == 0 or w % num_heads == 0]
    for prefill, decode in itertools.product(worlds, worlds):
        check_pieces(Grid(num_heads, 1, prefill), Grid(num_heads, 1, decode))


@st.composite
def grids(draw):
    """Two servers of one model."""
    num_heads, num_layers = draw(st.sampled_from([1, 2, 3, 4, 6, 8])), draw(st.integers(1, 13))
    tps = st.sampled_from([w for w in range(1, 17) if num_heads % w == 0 or w % num_heads == 0])
    return [Grid(num_heads, num_layers, draw(tps), draw(st.integers(1, num_layers))) for _ in range(2)]


@settings(max_examples=300, deadline=None)
@given(grids())
def test_each_head_of_each_layer_has_one_source_whatever_the_two_grids(both):
    check_pieces(*both)


@given(st.integers(1, 200), st.data())
def test_layers_are_shared_out_evenly_and_the_first_stages_have_more(num_layers, data):
    stages = data.draw(st.integers(1, num_layers))
    parts = [layer_range(num_layers, stages, stage) for stage in range(stages)]
    assert [layer for part in parts for layer in part] == list(range(num_layers))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1 <= sizes[-1]


def test_shares_that_do_not_exist():
    with pytest.raises(ConfigError, match="--pp-size 5 is more than the model's 4 layers"):
        layer_range(4, 5, 0)
    grid = Grid(4, 3)
    assert grid.over(6, 3) == Grid(4, 3, 2, 3)
    for num_ranks, pp, words in (
        (4, 3, "4 ranks are no 3 equal"),
        (0, 0, "no 0"),
        (2, 4, "no 4"),
        (6, 2, "by 3 ranks"),
    ):
        with pytest.raises(ConfigError, match=words):
            grid.over(num_ranks, pp)
    with pytest.raises(ConfigError, match="more than the model's 3 layers"):
        grid.over(4, 4)


def test_heads_that_cannot_be_shared():
    with pytest.raises(ConfigError, match="4 kv heads cannot be shared by 3 ranks"):
        head_range(4, 3, 0)


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 5000), st.integers(1, 20000))
def test_cuts_cover_everything_once(num_pages, num_heads, head_bytes, frame_bytes):
    seen = np.zeros((num_pages, num_heads), int)
    for cut in cuts(num_pages, range(3, 3 + num_heads), head_bytes, frame_bytes):
        pages, heads = cut.stop - cut.start, cut.head_stop - cut.head_start
        assert pages >= 1 and heads >= 1
        assert pages * heads * head_bytes <= frame_bytes or pages == heads == 1
        seen[cut.start : cut.stop, cut.head_start - 3 : cut.head_stop - 3] += 1
    assert (seen == 1).all()


# ---- ring ----


@settings(max_examples=200)
@given(st.lists(st.one_of(st.integers(1, 1024), st.none()), max_size=200))
def test_ring_pieces_never_overlap(steps):
    """None gives the oldest piece back, a number asks for a piece."""
    ring, out = RingSpace(1024), []
    for step in steps:
        if step is None:
            if out:
                ring.take_back(out.pop(0)[2])
            continue
        place = ring.alloc(step)
        if place is None:
            assert out, "an empty ring has room for anything"
            continue
        offset, size = place
        assert offset >= 0 and offset + step <= 1024 and offset % 64 == 0
        assert all(offset + step <= o or o + n <= offset for o, n, _ in out)
        out.append((offset, step, size))
    for _, _, size in out:
        ring.take_back(size)
    assert ring.used == 0
    with pytest.raises(ValueError):
        ring.take_back(1)


# ---- wire ----

MESSAGES = [
    wire.Attach("boot", wire.Terms("layout", "model", 16, 4, 3), [["tcp://a:1", "shm://b"], []], 2),
    wire.Welcome("boot", wire.Terms("layout", "model", 16, 4, 3), 2),
    wire.Open(2**63 - 1, 0),
    wire.Reserve(1, 2, [1, 2, 3], [4, 5, 2**63 - 1], 16),
    wire.Final(1, 2, FirstToken(5, 0, TokenLogprob(-0.5, 5, [(-0.5, 5)], [])), [3]),
    wire.Done(1, 2),
    wire.Abort(1, 2, "why", "aborted"),
    wire.Ping(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_come_back_as_they_were(message):
    assert wire.decode_control(wire.encode(message)) == message


@pytest.mark.parametrize(
    "values",
    [
        ["Open", -1, 0],
        ["Open", 2**63, 0],
        ["Open", 1],
        ["Open", 1, 2, 3],
        ["Open", "1", 2],
        ["Open", 1.0, 2],
        ["Open", True, 2],
        ["Hello", 1, "x", b"0" * 32],
        ["Reserve", 1, 2, [2**31], [0], 0],
        ["Reserve", 1, 2, list(range(wire.MAX_PAGES + 1)), [], 0],
        ["Abort", 1, 2, "x" * 1025, "y"],
        ["Attach", "b", ["l", "m", 16, 4, 3], [["a"] * 9], 1],
        ["Nothing"],
        [],
        {},
        None,
        7,
    ],
)
def test_what_is_out_of_range_is_refused(values):
    with pytest.raises(ProtocolError):
        wire.decode_control(msgspec.msgpack.encode(values))


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_an_error(data):
    for decode in (wire.decode_auth, wire.decode_control, wire.unpack_frame):
        try:
            decode(data)
        except (ProtocolError, CorruptTransfer):
            pass


def test_a_hundred_thousand_mutations_are_messages_or_errors():
    rng = random.Random(1)
    originals = [wire.encode(message) for message in MESSAGES]
    num_refused = 0
    for number in range(100_000):
        data = bytearray(originals[number % len(originals)])
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if number % 5 == 0:
            del data[rng.randrange(len(data)) :]
        try:
            wire.decode_control(bytes(data))
        except ProtocolError:
            num_refused += 1
    assert 50_000 < num_refused < 100_000


def test_deep_nesting_is_an_error():
    for data in (b"\x91" * 100_000, b"\x81" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"):
        with pytest.raises(ProtocolError):
            wire.decode_control(data)


def test_a_pickle_is_just_bytes(tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (canary.touch, ())

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        bomb = pickle.dumps(Bomb(), protocol)
        for decode in (wire.decode_auth, wire.decode_control, wire.unpack_frame):
            with pytest.raises(DiptychError):
                decode(bomb)
    assert not canary.exists()


def test_the_largest_messages_fit_a_link():
    pages, generations = [2**31 - 1] * wire.MAX_PAGES, [2**63 - 1] * wire.MAX_PAGES
    reserve = wire.Reserve(2**63 - 1, 2**63 - 1, pages, generations, 0)
    assert len(wire.encode(reserve)) <= wire.MAX_HEADER_BYTES
    assert wire.decode_control(wire.encode(reserve)) == reserve


# ---- auth ----


async def meet(kind, caller, called):
    """Both coroutines over one fresh link; returns what each raised."""
    async with linked(kind) as (ours, theirs):
        return await asyncio.gather(caller(ours), called(theirs), return_exceptions=True)


def caller(secret="s", purpose="kv data"):
    return lambda link: auth.call(link, purpose, secret, random.Random(1), 5.0)


def called(secret="s", purpose="kv data"):
    return lambda link: auth.answer(link, purpose, secret, random.Random(2), 5.0)


async def test_both_sides_know_the_secret():
    async with linked("memory") as (ours, theirs):
        for link in (ours, theirs):
            link.max_header_bytes, link.max_payload_bytes = 4096, 0
        await asyncio.gather(caller()(ours), called()(theirs))
        assert ours.max_payload_bytes == theirs.max_payload_bytes == wire.MAX_PAYLOAD_BYTES


@pytest.mark.parametrize("secrets", [("a", "b"), ("", "b"), ("a", ""), ("a", "a ")])
async def test_different_secrets(secrets):
    results = await meet("memory", caller(secrets[0]), called(secrets[1]))
    assert isinstance(results[0], auth.AuthError) and isinstance(results[1], DiptychError)
    assert all("a" not in r.message.split() or "same secret" in r.message for r in results)


async def test_a_proof_for_one_purpose_opens_no_other():
    results = await meet("memory", caller(purpose="kv data"), called(purpose="kv control"))
    assert isinstance(results[0], auth.AuthError) and isinstance(results[1], auth.AuthError)


async def test_a_caller_that_only_pretends():
    """It does not check the challenge, and answers with what it was sent."""

    async def pretender(link):
        await link.send(wire.encode(wire.Hello(wire.VERSION, "kv data", bytes(32))))
        challenge = wire.decode_auth((await link.recv())[0])
        await link.send(wire.encode(wire.Proof(challenge.proof)))
        assert isinstance(wire.decode_auth((await link.recv())[0]), wire.Refused)

    results = await meet("memory", pretender, called())
    assert results[0] is None and isinstance(results[1], auth.AuthError)


async def test_a_called_side_that_only_pretends():
    async def pretender(link):
        hello = wire.decode_auth((await link.recv())[0])
        await link.send(wire.encode(wire.Challenge(hello.nonce, hello.nonce)))
        with pytest.raises(LinkClosed):
            await link.recv()

    results = await meet("memory", caller(), pretender)
    assert isinstance(results[0], auth.AuthError) and results[1] is None


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", wire.encode(wire.Accepted()), wire.encode(wire.Ping())]
)
async def test_a_called_side_hears_nonsense(said):
    async def nonsense(link):
        await link.send(said)
        with pytest.raises(LinkClosed):
            await link.recv()

    results = await meet("memory", nonsense, called())
    assert results[0] is None and isinstance(results[1], ProtocolError)


def test_a_caller_that_says_nothing_is_let_go():
    async def main():
        network, links = MemoryNetwork(1), []
        listener = await network.transport("a").listen("", links.append)
        ours = await network.transport("b").connect(listener.address, 1.0)
        await asyncio.sleep(0)
        with pytest.raises(LinkClosed, match="no handshake within 5 s"):
            await called()(links[0])
        with pytest.raises(LinkClosed):
            await ours.recv()

    run_virtual(main())


# ---- the checks before a page is written ----

PAGES, GENERATIONS = [3, 1, 6], [11, 12, 13]


class Desk:
    """An Incoming over 8 pages of 2 heads and 2 layers (the model's heads 2 and 3, layers 4 and 5), 16 bytes each,
    expecting PAGES for room 5."""

    def __init__(self, store=None, executor=None):
        self.store = store or ArrayStore(8, 2, 32, num_layers=2)
        self.events = []
        self.counters = Counters()
        self.incoming = Incoming(self.store, range(2, 4), range(4, 6), self.counters, self.events.append, executor)
        self.incoming.expect(Expect(5, 77, PAGES, GENERATIONS))
        assert self.events.pop() == Expecting(5, 77)

    def frame(self, payload=None, **change):
        heads = change.get("head_stop", 4) - change.get("head_start", 2)
        pages = change.get("pages", PAGES)
        payload = bytes(range(1, 33)) * (len(pages) * heads) if payload is None else payload
        values = {
            "room": 5,
            "epoch": 77,
            "source": 0,
            "sequence": 0,
            "pages": pages,
            "generations": GENERATIONS,
            "head_start": 2,
            "head_stop": 4,
            "layer_start": 4,
            "layer_stop": 6,
            "payload_crc": wire.crc(payload),
        }
        return wire.pack_frame(wire.Frame(**(values | change))), payload

    async def take(self, header, payload):
        await self.incoming.take(header, memoryview(payload))


async def test_a_whole_room_in_one_frame():
    desk = Desk()
    header, payload = desk.frame()
    await desk.take(header, payload)
    assert desk.events == [Received(5, 77, 1, len(payload))]
    assert desk.store.data[PAGES].tobytes() == payload and len(desk.incoming) == 0
    await desk.take(header, payload)
    assert desk.counters.stale_frames == 1


@pytest.mark.parametrize(
    "change",
    [
        {"room": 6},
        {"epoch": 78},
        {"generations": [11, 12, 14]},
        {"generations": [12, 11, 13]},
        {"pages": [3, 1, 7]},
        {"pages": [3, 1, 2**31 - 1]},
    ],
)
async def test_frames_for_others_are_refused_and_harm_nobody(change):
    desk = Desk()
    await desk.take(*desk.frame(**change))
    assert desk.counters.stale_frames == 1 and not desk.events and not desk.store.data.any()
    await desk.take(*desk.frame())
    assert isinstance(desk.events[0], Received)


@pytest.mark.parametrize(
    "change, payload",
    [
        ({"head_start": 1, "head_stop": 3}, None),
        ({"head_start": 3, "head_stop": 5}, None),
        ({"layer_start": 3, "layer_stop": 5}, None),
        ({"layer_start": 5, "layer_stop": 7}, None),
        ({"layer_start": 5}, None),
        ({}, bytes(31)),
        ({}, b""),
        ({}, bytes(32 * 2 * 3 + 1)),
        ({"payload_crc": 5}, None),
        ({"sequence": 1}, None),
        ({"pages": [3, 1, 3], "generations": [11, 12, 11]}, None),
    ],
)
async def test_frames_that_cannot_be_right_fail_their_room(change, payload):
    desk = Desk()
    await desk.take(*desk.frame(payload, **change))
    (event,) = desk.events
    assert isinstance(event, TransferFailed) and event.code == "kv_transfer_corruption"
    assert "corruption" in event.message
    assert not desk.store.data.any()
    await desk.take(*desk.frame())  # too late
    assert len(desk.events) == 1 and not desk.store.data.any()
    desk.incoming.cancel(Cancel(5, 77))
    assert desk.events[1:] == [Cancelled(5, 77)] and len(desk.incoming) == 0


async def test_a_page_is_never_written_twice():
    desk = Desk()
    await desk.take(*desk.frame(head_stop=3))
    before = desk.store.data.copy()
    await desk.take(*desk.frame(bytes(32 * 3), head_stop=3, sequence=0))
    assert desk.counters.duplicate_frames == 1 and not desk.events
    await desk.take(*desk.frame(bytes(32 * 3), head_stop=3, sequence=1))
    assert isinstance(desk.events[0], TransferFailed)
    assert np.array_equal(desk.store.data, before)


async def test_layers_of_a_head_may_come_apart_but_only_once():
    desk = Desk()
    late, early = bytes(range(16, 32)) * 6, bytes(range(16)) * 6
    await desk.take(*desk.frame(late, layer_start=5, source=1))
    assert not desk.events and not desk.store.data[:, :, :16].any()
    await desk.take(*desk.frame(early, layer_stop=5))
    assert desk.events == [Received(5, 77, 2, 192)]
    assert desk.store.data[PAGES].tobytes() == bytes(range(32)) * 6
    again = Desk()
    await again.take(*again.frame(late, layer_start=5, source=1))
    await again.take(*again.frame())
    assert isinstance(again.events[0], TransferFailed) and "came twice" in again.events[0].message
    assert not again.store.data[:, :, :16].any()


async def test_ten_thousand_flipped_bits_are_all_seen():
    rng = random.Random(1)
    desk = Desk()
    header, payload = desk.frame()
    for number in range(10_000):
        part = bytearray(header if number % 2 else payload)
        bit = rng.randrange(8 * len(part))
        part[bit // 8] ^= 1 << bit % 8
        try:
            await desk.take(*((bytes(part), payload) if number % 2 else (header, part)))
        except CorruptTransfer:
            assert number % 2
            continue
        assert number % 2 == 0 and isinstance(desk.events.pop(), TransferFailed)
        desk.incoming.expect(Expect(5, 77, PAGES, GENERATIONS))
        assert [type(event) for event in desk.events] == [Cancelled, Expecting]
        desk.events.clear()
    assert not desk.store.data.any() and desk.counters.corrupt_frames == 5_000
    await desk.take(header, payload)
    assert isinstance(desk.events[0], Received)


class SlowStore(ArrayStore):
    """A store whose writes wait, each in its thread, until they are let go by their `gates`."""

    def __init__(self, loop):
        super().__init__(8, 2, 32, num_layers=2)
        self.loop, self.writing, self.gates = loop, asyncio.Semaphore(0), []

    def write(self, pages, head_start, head_stop, data, layers=None):
        asyncio.run_coroutine_threadsafe(self.wait(), self.loop).result(10)
        super().write(pages, head_start, head_stop, data, layers)

    async def wait(self):
        gate = asyncio.Event()
        self.gates.append(gate)
        self.writing.release()
        await gate.wait()


@pytest.mark.parametrize("num_sources", [1, 2])
async def test_a_cancel_waits_for_the_writes_in_progress(num_sources):
    """The pages may not be reused while a thread still writes to them."""
    with ThreadPoolExecutor(2) as executor:
        store = SlowStore(asyncio.get_running_loop())
        desk = Desk(store, executor)
        taking = [asyncio.create_task(desk.take(*desk.frame(head_stop=3)))]
        await store.writing.acquire()
        if num_sources == 2:  # another rank's frame, over its own link
            taking.append(asyncio.create_task(desk.take(*desk.frame(head_start=3, source=1))))
            await store.writing.acquire()
        assert desk.incoming.cancel(Cancel(5, 77))
        for write, gate in zip(taking, store.gates, strict=True):
            assert desk.events == []
            gate.set()
            await write
        assert desk.events == [Cancelled(5, 77)]
        await desk.take(*desk.frame(head_start=3, sequence=1))
        assert desk.counters.stale_frames == 1


async def test_a_room_with_nothing_to_come_is_received_at_once():
    desk = Desk()
    desk.incoming.expect(Expect(6, 1, [], []))
    assert desk.events == [Expecting(6, 1), Received(6, 1, 0, 0)]


async def test_a_plane_answers_every_cancel():
    events = []
    plane = DataPlane(ArrayStore(4, 2, 32), [], 0, Grid(2, 1), events.append)
    plane.execute(Cancel(9, 9))
    assert events == [Cancelled(9, 9)]
    await plane.close()


def test_stores_that_do_not_fit_are_refused():
    for store, words in (
        (ArrayStore(4, 2, 32), "2 kv heads, not 4"),
        (ArrayStore(4, 4, 32, num_layers=2), "2 layers, not 1"),
        (ArrayStore(1, 4, 17 << 20), "--page-size"),
    ):
        with pytest.raises(ConfigError, match=words):
            DataPlane(store, [], 0, Grid(4, 1), print)


def test_nixl_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(ConfigError, match="pip install 'diptych\\[nixl\\]'"):
        data_transports("nixl")


def test_backends():
    assert [t.scheme for t in data_transports("auto")] == ["shm", "tcp"]
    assert [t.scheme for t in data_transports("shm")] == ["shm"]
    assert [t.scheme for t in data_transports("tcp")] == ["tcp"]
    assert data_transports("fake") == []
    with pytest.raises(ConfigError, match="carrier-pigeon"):
        data_transports("carrier-pigeon")


# ---- virtual time ----


def test_virtual_time_costs_nothing():
    async def main():
        loop = asyncio.get_running_loop()
        await asyncio.sleep(86_400 * 30)
        assert loop.time() == 86_400 * 30
        assert await asyncio.to_thread(lambda: 5) == 5
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await loop.create_future()
        return loop.time()

    assert run_virtual(main()) == 86_400 * 30 + 3600


def test_a_wait_that_nothing_ends_is_an_error():
    async def main():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run_virtual(main())


def test_a_failed_task_is_not_overlooked():
    async def main():
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.sleep(1)

    with pytest.raises(ZeroDivisionError):
        run_virtual(main())
