"""Defects of our own in the middle of a hand-over: they are reported, and the rooms end at once all the same."""

import asyncio

import pytest
from transfer_pair import Pair

from diptych.testing.network import MemoryNetwork
from diptych.testing.virtual import run_virtual
from diptych.transfer.room import HubOptions
from diptych.types import FirstToken

SRC, DST = [3, 9, 1], [30, 2, 17]


def broken(*_):
    raise RuntimeError("a defect")


async def fails_soon(breaks):
    """One hand-over in which `breaks(pair)` puts a defect somewhere. Both must end in less than a second."""
    network = MemoryNetwork(1)
    options = HubOptions(bootstrap_timeout_s=300.0, heartbeat_timeout_s=5.0)
    pair = await Pair.start(lambda side, rank: [network.transport(f"{side}-{rank}")], options=options)
    await pair.hand_over(1, SRC, DST)
    began = asyncio.get_running_loop().time()
    sender, receiver = pair.prefill.hub.open(2, len(SRC)), pair.decode.hub.open(pair.bootstrap(2))
    receiver.reserve(DST, [page + 100 for page in DST])
    await asyncio.sleep(0.1)
    breaks(pair)
    sender.send(SRC, 0)
    sender.finish(FirstToken(17, 0))
    await pair.prefill.until(lambda: sender.ended)
    await pair.decode.until(lambda: receiver.ended and receiver.drained)
    assert sender.error is not None  # decode has everything already when prefill cannot hear of it
    assert asyncio.get_running_loop().time() - began < 1
    assert pair.prefill.snapshot()["rooms"] == pair.decode.snapshot()["rooms"] == 0
    await pair.close()


@pytest.mark.parametrize(
    "breaks",
    [
        lambda pair: setattr(pair.prefill.stores[0], "read", broken),
        lambda pair: setattr(pair.decode.stores[0], "write", broken),
        lambda pair: setattr(pair.decode.hub._rooms[2], "on_final", broken),
        lambda pair: setattr(pair.prefill.hub._rooms[2], "done", broken),
    ],
    ids=["gathering", "writing", "decode's conversation", "prefill's conversation"],
)
def test_a_defect_ends_the_rooms_it_touches(breaks):
    with pytest.raises((RuntimeError, ExceptionGroup), match=r"a defect|unhandled"):
        run_virtual(fails_soon(breaks))
