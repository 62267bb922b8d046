"""A follower's order: what it sends must have been computed by itself, however far ahead rank 0 is."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any, cast

import pytest
from msgspec.structs import replace

from diptych.engine.channel import Channel
from diptych.engine.ranks import Follower, MovePages, PagesMoved, RankReady, Ranks, RunPlan, ToRank
from diptych.model.selftest import plan_of_one
from diptych.transfer.commands import AnyCommand, AnyEvent, Expecting, Send
from diptych.transfer.incoming import Counters
from diptych.types import Plan

PLAN = plan_of_one(0, 4, 1)
SEND = Send(1, 1, [["tcp://127.0.0.1:1"]], 1, [0], [0], [0])


async def test_pages_are_sent_after_the_plan_that_fills_them() -> None:
    done: list[str] = []
    computing, proceed, moved = threading.Event(), threading.Event(), asyncio.Event()

    class Slow:
        overlaps = False

        def launch(self, plan: Plan) -> None:
            computing.set()
            assert proceed.wait(10)
            done.append("computed")

        def collect(self, launched: None) -> None:
            pass

    def move(_: AnyCommand) -> None:
        done.append("sent")
        moved.set()

    follower = Follower(cast(Any, Slow()), move)
    obeying = asyncio.create_task(follower.obey())
    follower.hear(RunPlan(PLAN))
    follower.hear(MovePages(SEND, PLAN.step))
    assert await asyncio.to_thread(computing.wait, 10)
    for _ in range(10):
        await asyncio.sleep(0)
    assert done == []
    proceed.set()
    async with asyncio.timeout(10):
        await moved.wait()
    assert done == ["computed", "sent"]
    obeying.cancel()
    follower.close()


async def test_a_follower_runs_ahead_of_what_it_has_collected_by_two_steps() -> None:
    """... and of what moves pages, as far as rank 0 has got when it says so."""
    log: list[str] = []
    moved = asyncio.Event()

    class Async:
        overlaps = True

        def launch(self, plan: Plan) -> int:
            log.append(f"launch {plan.step}")
            return plan.step

        def collect(self, launched: int) -> None:
            log.append(f"collect {launched}")

    def move(_: AnyCommand) -> None:
        log.append("move")
        moved.set()

    follower = Follower(cast(Any, Async()), move)
    obeying = asyncio.create_task(follower.obey())
    for step in (1, 2, 3):
        follower.hear(RunPlan(replace(PLAN, step=step)))
    follower.hear(MovePages(SEND, 2))
    follower.hear(MovePages(SEND, 2))
    follower.hear(RunPlan(replace(PLAN, step=4)))
    follower.hear(MovePages(SEND, 0))
    follower.hear(MovePages(SEND, 4))
    async with asyncio.timeout(10):
        while log.count("move") < 4:
            moved.clear()
            await moved.wait()
    assert log == [
        *("launch 1", "launch 2", "collect 1", "launch 3", "collect 2", "move", "move"),
        *("launch 4", "move", "collect 3", "collect 4", "move"),
    ]
    obeying.cancel()
    follower.close()


async def test_a_failed_plan_ends_the_follower() -> None:
    class Failing:
        def launch(self, plan: Plan) -> None:
            raise RuntimeError("no memory")

    follower = Follower(cast(Any, Failing()), lambda _: None)
    follower.hear(RunPlan(PLAN))
    async with asyncio.timeout(10):
        with pytest.raises(RuntimeError, match="no memory"):
            await follower.obey()
    follower.close()


@pytest.mark.parametrize(("capable", "wanted"), [(False, False), (False, True), (True, False), (True, True)])
def test_steps_overlap_where_the_runner_can_and_the_settings_want_it(capable: bool, wanted: bool) -> None:
    """--disable-overlap-schedule."""

    class Idle:
        overlaps = capable

    ranks = Ranks(cast(Any, Idle()), lambda *_: None, lambda _: None, overlap=wanted)
    assert ranks.overlaps == (capable and wanted)
    ranks.close()


async def test_what_ranks_have_moved_is_added_up() -> None:
    """Bytes and failures; a page counts once, as every rank has a part of it."""

    class Idle:
        overlaps = False

    class Plane:
        counters = Counters(pages_sent=3, bytes_sent=300, stale_frames=1)

    heard: asyncio.Queue[tuple[int, AnyEvent]] = asyncio.Queue()
    ranks = Ranks(cast(Any, Idle()), lambda rank, event: heard.put_nowait((rank, event)), lambda _: None)
    ranks.plane = cast(Any, Plane())
    followers, fds = [], []
    for _ in range(2):
        near, far = socket.socketpair()
        followers.append(Channel(ToRank, lambda _: None, lambda: None))
        await followers[-1].open(far.detach())
        followers[-1].send(RankReady([]))
        fds.append(near.detach())
    await ranks.connect(fds, 5)
    assert ranks.counters() == Counters(pages_sent=3, bytes_sent=300, stale_frames=1)
    told = [(0, 100, 0), (1, 200, 0), (0, 250, 4)]  # the last news of a rank count
    for follower, num_bytes, failures in told:
        counters = Counters(pages_sent=3, bytes_sent=num_bytes, failures=failures)
        followers[follower].send(PagesMoved(Expecting(1, 1), counters))
    async with asyncio.timeout(10):
        assert sorted([await heard.get() for _ in told], key=lambda news: news[0]) == [
            (rank, Expecting(1, 1)) for rank in (1, 1, 2)
        ]
    assert ranks.counters() == Counters(pages_sent=3, bytes_sent=750, stale_frames=1, failures=4)
    ranks.close()
    for channel in followers:
        channel.close()
