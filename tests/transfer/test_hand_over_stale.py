"""A first token of an earlier hand-over that comes again, late, is nobody's first token. Virtual time."""

import asyncio

from msgspec.structs import replace
from transfer_pair import Pair

from diptych.errors import ProtocolError
from diptych.testing.network import MemoryNetwork
from diptych.testing.virtual import run_virtual
from diptych.transfer import wire
from diptych.types import FirstToken

NUM_ROOMS = 40


class Late:
    """Before each Final comes the one before it: as it was, and as one for this room, with the epoch it had."""

    def __init__(self):
        self.before = None
        self.num_stale = 0

    def __call__(self, _, parcel):
        try:
            message = wire.decode_control(parcel.header)
        except ProtocolError:
            return [parcel]
        if not isinstance(message, wire.Final):
            return [parcel]
        before, self.before = self.before, message
        if before is None:
            return [parcel]
        stale = [before, replace(message, epoch=before.epoch, first=before.first)]
        self.num_stale += len(stale)
        return [*(type(parcel)(wire.encode(late), b"") for late in stale), parcel]


def test_every_room_gets_its_own_first_token():
    """40 rooms, 2 at a time, which use the same pages again and again; room numbers are used again too."""

    async def main():
        network = MemoryNetwork(1)
        network.faults.tamper = late = Late()
        pair = await Pair.start(lambda side, rank: [network.transport(f"{side}-{rank}")])

        async def serve(lane):
            for turn in range(NUM_ROOMS // 2):
                room, pages = lane * 3 + turn % 3, [lane * 3, lane * 3 + 1, lane * 3 + 2]
                _, receiver = await pair.hand_over(room, pages, pages, token=100 * lane + turn)  # checks the token
                assert receiver.first == FirstToken(100 * lane + turn, 0)

        await asyncio.gather(serve(0), serve(1))
        assert late.num_stale == 2 * (NUM_ROOMS - 1)
        await pair.close()

    run_virtual(main())
