"""Hand-overs over NIXL itself, through memory of the host: UCX reads it as it reads a GPU's."""

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from transfer_pair import Pair

pytest.importorskip("nixl")  # in the test requirements, where there is a wheel

from diptych.errors import ConfigError, TransferError
from diptych.kv.extents import Extent
from diptych.kv.store import Memory
from diptych.testing.store import ArrayStore
from diptych.transfer.nixl import NixlTransport
from diptych.transfer.tcp import TcpTransport
from diptych.transfer.transports import data_transports

SRC, DST = [3, 9, 1, 20, 7, 5, 11], [30, 2, 17, 4, 0, 31, 8]

LENDER = """
    import sys, threading
    from diptych.testing.store import ArrayStore
    from diptych.transfer.nixl import NixlTransport

    store = ArrayStore(64, 2, 1 << 20, num_layers=4)
    store.fill(5)
    lending = NixlTransport().lending(store)
    with lending.serving():
        print(lending.lend().hex(), flush=True)
        sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_agents_left(monkeypatch):
    """An agent has some twenty descriptors, which tests that count theirs must not see go."""
    monkeypatch.setattr("diptych.transfer.nixl._LATE_S", 0.0)
    yield
    for thread in drivers():
        thread.join(30)
        assert not thread.is_alive()
    gc.collect()


def drivers():
    return {thread for thread in threading.enumerate() if thread.name == "nixl-progress"}


@pytest.fixture
def lender():
    """Another process that lends a pool, filled from seed 5, until its input ends."""
    args = [sys.executable, "-c", textwrap.dedent(LENDER)]
    child = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield child
    child.kill()
    child.communicate(timeout=30)


def other_pool():
    theirs = ArrayStore(64, 2, 1 << 20, num_layers=4)
    theirs.fill(5)
    return theirs


def start(threads, **options):
    transport = {(side, rank): NixlTransport() for side in ("prefill", "decode") for rank in range(4)}
    executor = ThreadPoolExecutor(threads) if threads else None
    return Pair.start(lambda side, rank: [transport[side, rank], TcpTransport()], executor=executor, **options)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(("tp", "pp"), [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 2), (2, 1))], ids=str)
async def test_pages_arrive_whole(tp, pp, threads):
    pair = await start(threads, tp=tp, pp=pp, num_layers=max(pp))
    try:
        for room, prefix in ((5, 0), (6, 2)):
            expected = pair.decode.whole.copy()
            await pair.hand_over(room, SRC, DST, prefix_pages=prefix)
            expected[DST[prefix:]] = pair.prefill.whole[SRC[prefix:]]
            pair.decode.check_pool(expected)
            for rank, store in enumerate(pair.decode.stores):
                store.data[:] = pair.decode.part(pair.decode.whole, rank)
        assert all(plane.counters.failures == 0 for plane in pair.decode.planes)
    finally:
        await pair.close()
    assert pair.prefill.snapshot() == pair.decode.snapshot() == {"rooms": 0, "links": 0, "tasks": 0}


def test_a_pool_of_another_process_is_read_in_place(lender):
    theirs, store = other_pool(), ArrayStore(64, 2, 1 << 20, num_layers=4)
    pool = NixlTransport().lending(store).borrow(bytes.fromhex(lender.stdout.readline().decode()), theirs.data.nbytes)
    strided = Extent(to=0, source=1 << 18, width=1 << 18, rows=3, to_pitch=1 << 20, source_pitch=1 << 19)
    pool.copy([strided, Extent(to=60 << 20, source=100 << 20, width=20 << 20)])
    mine, source = store.data.reshape(-1), theirs.data.reshape(-1)
    for row in range(3):
        to, at = row << 20, (1 << 18) + (row << 19)
        assert (mine[to : to + (1 << 18)] == source[at : at + (1 << 18)]).all()
    assert (mine[60 << 20 : 80 << 20] == source[100 << 20 : 120 << 20]).all()
    assert not mine[1 << 18 : 1 << 20].any() and not mine[80 << 20 :].any()
    pool.close()
    with pytest.raises(TransferError, match="not known any more"):
        pool.copy([strided])


def test_a_lender_that_dies_fails_the_copy(lender):
    theirs, store = other_pool(), ArrayStore(64, 2, 1 << 20, num_layers=4)
    pool = NixlTransport().lending(store).borrow(bytes.fromhex(lender.stdout.readline().decode()), theirs.data.nbytes)
    whole = [Extent(0, 0, theirs.data.nbytes)]
    pool.copy(whole)
    assert (store.data == theirs.data).all()
    lender.kill()
    lender.wait(30)
    with pytest.raises(TransferError, match="could not read"):
        pool.copy(whole)
    pool.close()


def test_a_pool_that_two_links_borrowed_stays_until_both_have_closed_it(lender):
    theirs, store = other_pool(), ArrayStore(64, 2, 1 << 20, num_layers=4)
    lending, handle = NixlTransport().lending(store), bytes.fromhex(lender.stdout.readline().decode())
    first, second = (lending.borrow(handle, theirs.data.nbytes) for _ in range(2))
    first.close()
    second.copy([Extent(0, 0, 1 << 20)])
    assert (store.data.reshape(-1)[: 1 << 20] == theirs.data.reshape(-1)[: 1 << 20]).all()
    second.close()


def test_an_agent_is_driven_by_one_thread_also_after_a_frame_and_an_error(monkeypatch):
    monkeypatch.setattr("diptych.transfer.nixl._LATE_S", 60.0)
    lending = NixlTransport().lending(ArrayStore(4, 1, 64))
    driven, calls = threading.Event(), []

    class Failing:
        def get_new_notifs(self):
            calls.append(1)
            if len(calls) > 3:
                driven.set()
            raise RuntimeError("a peer is gone")

    lending.agent = Failing()
    for _ in range(20):
        with lending.serving():
            pass
    assert driven.wait(30)  # though nothing is out
    assert len(drivers()) == 1
    with lending.turn:
        lending._until_s = 0.0


def test_what_cannot_be_reached_is_said():
    lending = NixlTransport().lending(ArrayStore(4, 1, 64))
    for handle, num_bytes, words in (
        (b"nonsense", 256, "not a pool"),
        (lending.lend(), 257, "smaller than its pool"),
        (lending.lend()[:-40] + bytes(40), 256, "could not reach"),
    ):
        with pytest.raises(TransferError, match=words):
            lending.borrow(handle, num_bytes)


def test_memory_that_cannot_be_registered_is_a_matter_of_the_configuration():
    class OnGpu(ArrayStore):
        memory = Memory(0, 256, 7)

    with pytest.raises(ConfigError, match=r"transfer-backend nixl: NIXL could not register"):
        NixlTransport().lending(OnGpu(4, 1, 64))


def test_chosen_by_the_flag():
    assert [transport.scheme for transport in data_transports("nixl")] == ["nixl"]
    assert os.environ["NIXL_LOG_LEVEL"]
    asyncio.run(_an_address())


async def _an_address():
    listener = await NixlTransport().listen("127.0.0.1", lambda link: link.close())
    assert listener.address.startswith("nixl://127.0.0.1:")
    listener.close()
