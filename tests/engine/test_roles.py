"""What a prefill and a decode server do at the edges of a hand-over: two real engines on a virtual clock."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import aclosing

import pytest

from diptych.errors import ClientGone
from diptych.sched.audit import audit
from diptych.testing.cluster import Cluster
from diptych.testing.mock_model import expected
from diptych.testing.server import SimServer
from diptych.testing.virtual import run_virtual
from diptych.transfer.commands import Cancel
from diptych.types import FAKE_BOOTSTRAP_HOST, Bootstrap, Finish, Request, Sampling

PROMPT = list(range(1, 22))
SAMPLING = Sampling(max_new_tokens=6, temperature=0.0)


class Pair:
    """One prefill and one decode server, connected, with decode's prefix cache on."""

    @classmethod
    async def start(cls) -> Pair:
        self = cls()
        self.cluster = Cluster(2, prefill=1, decode=1)
        await self.cluster.start()
        self.cluster.kill_server("d0")
        self.cluster.network.revive("d0")
        self.decode = SimServer("d0", "decode", self.cluster, 64, radix=True)
        await self.decode.start()
        self.cluster.servers["d0"] = self.decode
        self.prefill = self.cluster.servers["p0"]
        return self

    async def close(self) -> None:
        """Everything has come back; then end."""
        await asyncio.sleep(1)
        for server in (self.prefill, self.decode):
            audit(server.state)
            assert not any(server.holds().values()), (server.name, server.holds())
        await self.cluster.close()


def request(rid: str, room: int | None, host: str = "p0", prompt: list[int] = PROMPT) -> Request:
    bootstrap = None if room is None else Bootstrap(host, 0, room)
    return Request(rid=rid, prompt=prompt, sampling=SAMPLING, bootstrap=bootstrap)


async def run(server: SimServer, wanted: Request) -> tuple[list[int], Finish]:
    """All tokens, and the end."""
    tokens: list[int] = []
    async with aclosing(server.link.generate(wanted)) as outputs:  # type: ignore[type-var]
        async for output in outputs:
            tokens += output.tokens
            if output.finish is not None:
                return tokens, output.finish
    raise AssertionError("a stream without an end")


def test_pages_from_nobody_are_no_prefix_for_others() -> None:
    async def story() -> None:
        pair = await Pair.start()
        await run(pair.decode, request("fake", 1, FAKE_BOOTSTRAP_HOST))
        tokens, _ = await run(pair.decode, request("real", None))
        assert tokens == expected(request("x", None), pair.decode.runner.info, 256).tokens
        await pair.close()

    run_virtual(story())


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_abort_that_was_asked_for_is_one_on_both_sides(side: str) -> None:
    """/abort_request on either server: neither tells an error, which a router would answer with a retry."""

    async def story() -> None:
        pair = await Pair.start()
        pair.prefill.state.paused = True  # so that it is caught in the middle
        ends = [asyncio.ensure_future(run(server, request("r", 7))) for server in (pair.prefill, pair.decode)]
        await asyncio.sleep(0.2)
        await getattr(pair, side).link.abort("r", "stop it")
        for _, finish in await asyncio.gather(*ends):
            assert finish == Finish("abort", message="stop it", status=499, code="aborted")
        await pair.close()
        assert failures(pair) == [(0, 0), (0, 0)]

    run_virtual(story())


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_client_that_leaves_one_side_is_an_error_on_the_other(side: str) -> None:
    """... because what the other side has is not the answer; but it is no failure of the hand-over either."""

    async def story() -> None:
        pair = await Pair.start()
        pair.prefill.state.paused = True
        ends = {
            name: asyncio.ensure_future(run(getattr(pair, name), request("r", 7))) for name in ("prefill", "decode")
        }
        await asyncio.sleep(0.2)
        gone = ends.pop(side)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        ((_, finish),) = await asyncio.gather(*ends.values())
        assert finish == Finish("abort", message="the client went away", status=500, code=ClientGone.code)
        await pair.close()
        assert failures(pair) == [(0, 0), (0, 0)]

    run_virtual(story())


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_room_in_use_is_a_conflict_for_the_second_request(side: str) -> None:
    """409 where the second one arrives, whether or not the other server has heard of it; the first is not disturbed."""

    async def story() -> None:
        pair = await Pair.start()
        pair.prefill.state.paused = True
        first = [asyncio.ensure_future(run(server, request("r", 7))) for server in (pair.prefill, pair.decode)]
        await asyncio.sleep(0.2)
        _, finish = await run(getattr(pair, side), request("s", 7))
        assert (finish.status, finish.code) == (409, "room_in_use")
        assert finish.message == "room 7 is in use by another request; draw a new bootstrap_room for each"
        pair.prefill.state.paused = False
        (_, one), (tokens, end) = await asyncio.gather(*first)
        assert (one, end.type, tokens) == (Finish("length"), "length", right(pair))
        await pair.close()
        assert failures(pair) == [(0, 0), (0, 0)]

    run_virtual(story())


def test_a_room_in_use_by_another_decode_server_is_a_conflict() -> None:
    """Two decode servers open the same room: prefill tells the one that comes later."""

    async def story() -> None:
        pair = await Pair.start()
        await pair.cluster.start_server("d1", "decode")
        other = pair.cluster.servers["d1"]
        pair.prefill.state.paused = True
        first = [asyncio.ensure_future(run(server, request("r", 7))) for server in (pair.prefill, pair.decode)]
        await asyncio.sleep(0.2)
        _, finish = await run(other, request("s", 7))
        assert (finish.status, finish.code) == (409, "room_in_use")
        pair.prefill.state.paused = False
        _, (tokens, _) = await asyncio.gather(*first)
        assert tokens == right(pair)
        audit(other.state)
        await pair.close()

    run_virtual(story())


def right(pair: Pair) -> list[int]:
    return expected(request("x", None), pair.decode.runner.info, 256).tokens


def failures(pair: Pair) -> list[tuple[int, int]]:
    stats = [server.link.stats for server in (pair.prefill, pair.decode)]
    return [(s.num_bootstrap_failed_reqs_total, s.num_transfer_failed_reqs_total) for s in stats]


def test_an_id_is_free_though_the_pages_of_its_last_request_are_still_written() -> None:
    """A rank that answers late (decode has several) holds on to the pages, not to the id: a retry has the same one."""

    async def story() -> None:
        pair = await Pair.start()
        late: list[Cancel] = []
        pair.decode.hub.broadcast = lambda command: (
            late.append(command) if isinstance(command, Cancel) else pair.decode.plane.execute(command)
        )
        pair.prefill.state.paused = True
        ends = [asyncio.ensure_future(run(server, request("r", 7))) for server in (pair.prefill, pair.decode)]
        await asyncio.sleep(0.2)
        await pair.prefill.link.abort("r", "enough")
        assert [finish.code for _, finish in await asyncio.gather(*ends)] == ["aborted", "aborted"]
        num_written = len(late) and pair.decode.holds()["pages"]
        assert num_written == -(-len(PROMPT) // 4)
        audit(pair.decode.state)
        _, finish = await run(pair.decode, request("r", 7))
        assert (finish.status, finish.code) == (409, "room_in_use")
        pair.prefill.state.paused = False
        _, (tokens, _) = await asyncio.gather(*(run(s, request("r", 8)) for s in (pair.prefill, pair.decode)))
        assert tokens == right(pair)
        audit(pair.decode.state)
        assert pair.decode.holds() == {"requests": 0, "held": 0, "rooms": 1, "transfers": 1, "pages": num_written}
        for command in late:
            pair.decode.plane.execute(command)
        await pair.close()

    run_virtual(story())


@pytest.mark.parametrize("local", [True, False])
def test_requests_with_and_without_a_hand_over_take_turns(local: bool) -> None:
    """One of the one kind in a crowd of the other is served when those before it are, and not after all of them."""

    async def story() -> None:
        pair = await Pair.start()
        pair.decode.state.config = dataclasses.replace(pair.decode.state.config, max_running=2)
        ended: list[str] = []

        async def serve(rid: str, room: int | None) -> None:
            one = request(rid, room, prompt=[*PROMPT, 50 + len(ended)])
            sides = [pair.decode] if room is None else [pair.prefill, pair.decode]
            await asyncio.gather(*(run(side, one) for side in sides))
            ended.append(rid)

        work = []
        for number in range(24):
            alone = number == 12
            work.append(asyncio.ensure_future(serve(f"r{number}", None if alone is local else number)))
            await asyncio.sleep(0.001)
        await asyncio.gather(*work)
        assert 8 <= ended.index("r12") <= 16, ended
        await pair.close()

    run_virtual(story())


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_requests_that_wait_for_their_hand_over_count_as_queued(side: str) -> None:
    async def story() -> None:
        pair = await Pair.start()
        server: SimServer = getattr(pair, side)
        server.state.config = dataclasses.replace(server.state.config, max_queued=3, max_running=0)
        waiting = [asyncio.ensure_future(run(server, request(f"r{room}", room))) for room in range(3)]
        await asyncio.sleep(0.2)
        _, finish = await run(server, request("late", 9))
        assert (finish.status, finish.code) == (429, "rate_limit_exceeded")
        await server.link.abort("", "enough")
        assert {finish.code for _, finish in await asyncio.gather(*waiting)} == {"aborted"}
        assert server.link.stats.num_aborted_requests_total == 3
        await pair.close()

    run_virtual(story())


def test_the_fake_backend_hands_to_nobody() -> None:
    """--disaggregation-transfer-backend fake on a prefill server: no decode server is needed."""

    async def story() -> None:
        pair = await Pair.start()
        pair.prefill.hub._fake = True
        tokens, finish = await run(pair.prefill, request("r", 3))
        assert (len(tokens), finish) == (1, Finish("length"))
        await pair.close()

    run_virtual(story())
