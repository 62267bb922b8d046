"""Whole hand-overs over every transport: what arrives is, bit for bit, what was sent, and nothing else changes."""

import pytest
from transfer_pair import Pair

from diptych.transfer.shm import ShmTransport
from diptych.transfer.tcp import TcpTransport


@pytest.mark.parametrize("kinds", [(TcpTransport,), (ShmTransport,), (ShmTransport, TcpTransport)])
async def test_pages_arrive_whole(kinds):
    pair = await Pair.start(lambda side, rank: [kind() for kind in kinds])
    try:
        expected = pair.decode.whole.copy()
        src, dst = [3, 9, 1, 20, 7, 5, 11], [30, 2, 17, 4, 0, 31, 8]
        await pair.hand_over(5, src, dst)
        expected[dst] = pair.prefill.whole[src]
        pair.decode.check_pool(expected)
        pair.prefill.check_pool(pair.prefill.whole)
    finally:
        await pair.close()
    assert pair.prefill.snapshot() == pair.decode.snapshot() == {"rooms": 0, "links": 0, "tasks": 0}
