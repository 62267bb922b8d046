"""How long a room may take: queues on either side cost no healthy request, and nothing waits for ever. Virtual time."""

import asyncio

import pytest
import uvloop
from transfer_pair import Pair

from diptych.testing.network import MemoryNetwork
from diptych.testing.virtual import run_virtual
from diptych.transfer.room import HubOptions, KVPoll, RoomEnd
from diptych.types import FirstToken

SRC, DST = [3, 9, 1], [30, 2, 17]
GENERATIONS = [page + 100 for page in DST]
OPTIONS = HubOptions(bootstrap_timeout_s=20.0, heartbeat_timeout_s=1.0)


async def start(network):
    return await Pair.start(
        lambda side, rank: [network.transport(f"{side}-{rank}")], options=OPTIONS, send_timeout_s=1.0
    )


async def open_both(pair):
    sender, receiver = pair.prefill.hub.open(5, len(SRC)), pair.decode.hub.open(pair.bootstrap(5))
    await pair.decode.until(lambda: receiver.state == KVPoll.WaitingForInput)
    return sender, receiver


@pytest.mark.parametrize("queue", ["decode", "prefill"])
def test_a_long_queue_costs_no_request(queue):
    """Five times the bootstrap timeout before decode has pages, or before prefill has computed the first of them."""

    async def main():
        pair = await start(MemoryNetwork(1))
        sender, receiver = await open_both(pair)
        if queue == "decode":
            await asyncio.sleep(100)
        receiver.reserve(DST, GENERATIONS)
        await pair.prefill.until(lambda: sender.state == KVPoll.WaitingForInput)
        if queue == "prefill":
            await asyncio.sleep(100)
        sender.send(SRC, 0)
        sender.finish(FirstToken(7, 0))
        await pair.decode.until(lambda: receiver.ended)
        await pair.prefill.until(lambda: sender.ended)
        assert receiver.state == sender.state == KVPoll.Success
        assert asyncio.get_running_loop().time() > 100
        await pair.close()

    run_virtual(main())


@pytest.mark.parametrize("queue", ["decode", "prefill"])
def test_no_queue_is_endless(queue):
    async def main():
        pair = await start(MemoryNetwork(1))
        sender, receiver = await open_both(pair)
        if queue == "prefill":
            receiver.reserve(DST, GENERATIONS)
        await pair.decode.until(lambda: receiver.ended, 1e6)
        await pair.prefill.until(lambda: sender.ended, 1e6)
        assert 120 <= asyncio.get_running_loop().time() < 121
        for end in (sender, receiver):
            assert (end.error.status, end.error.code) == (504, "deadline_exceeded")
            assert end.error.message == (
                "the hand-over took 120 s with its queues (6 times --disaggregation-bootstrap-timeout)"
            )
        await pair.decode.until(lambda: receiver.drained)
        await pair.close()

    run_virtual(main())


def test_a_transfer_that_stands_still_is_ended_by_prefill():
    async def main():
        pair = await start(MemoryNetwork(1))
        sender, receiver = await open_both(pair)
        receiver.reserve(DST, GENERATIONS)
        await asyncio.sleep(50)
        for page in range(2):  # each step begins the wait anew
            sender.send(SRC[page : page + 1], page)
            await asyncio.sleep(15)
        await pair.decode.until(lambda: receiver.ended, 1e6)
        assert 85 <= asyncio.get_running_loop().time() < 86
        assert receiver.error.message == "waited 20 s for the KV transfer to go on (--disaggregation-bootstrap-timeout)"
        assert sender.error.status == 504
        await pair.close()

    run_virtual(main())


def test_a_prefill_server_that_dies_while_the_room_is_queued_is_noticed():
    async def main():
        network = MemoryNetwork(1)
        pair = await start(network)
        _, receiver = await open_both(pair)
        receiver.reserve(DST, GENERATIONS)
        await asyncio.sleep(50)
        network.kill("prefill-0")
        await pair.decode.until(lambda: receiver.ended, 1e6)
        assert asyncio.get_running_loop().time() < 52
        assert "lost the prefill server" in receiver.error.message
        await pair.close()

    run_virtual(main())


class Room(RoomEnd):
    """A room without another side."""

    def __init__(self, options: HubOptions) -> None:
        super().__init__(1, lambda room: None, options)


def test_a_hand_over_of_less_than_a_millisecond_has_a_speed():
    """The clock that deadlines go by may stand still meanwhile, as uvloop's does between two callbacks."""

    async def main(options):
        room = Room(options)
        room._enter(KVPoll.Transferring)
        room.timing.num_bytes = 1_000_000
        room.timing.latency_ms = room._enter(KVPoll.Success)
        return room.timing

    ticks = iter((5.0, 5.0, 5.0004))
    timing = uvloop.run(main(HubOptions(clock=lambda: next(ticks))))
    assert timing.latency_ms == pytest.approx(0.4) and timing.speed_gb_s == pytest.approx(2.5)
    timing = uvloop.run(main(HubOptions()))
    assert timing.latency_ms > 0 and timing.speed_gb_s > 0
