"""Ranks 1… of an engine: they run plans and move pages as rank 0 says."""

from __future__ import annotations

import asyncio

from diptych.engine.channel import Channel
from diptych.engine.load import Spec, load_faults, make_plane
from diptych.engine.ranks import Follower, PagesMoved, RankReady, ToRank
from diptych.model.runner import Runner
from diptych.transfer.commands import AnyCommand, AnyEvent


async def follow(spec: Spec, runner: Runner) -> None:
    """Serve as one of them, until rank 0 is gone."""
    gone = asyncio.Event()

    def move(command: AnyCommand) -> None:
        assert plane is not None
        plane.execute(command)

    def tell(event: AnyEvent) -> None:
        assert plane is not None
        channel.send(PagesMoved(event, plane.counters))

    follower = Follower(runner, move)
    channel = Channel(ToRank, follower.hear, gone.set)
    plane = make_plane(spec, runner, tell, load_faults(spec))
    addresses = await plane.start(spec.config.host) if plane else []
    await channel.open(spec.leader_fd)
    channel.send(RankReady(addresses))
    obeying, leaderless = asyncio.create_task(follower.obey()), asyncio.create_task(gone.wait())
    await asyncio.wait({obeying, leaderless}, return_when=asyncio.FIRST_COMPLETED)
    if plane:
        await plane.close()
    follower.close()
    leaderless.cancel()
    if obeying.done():
        obeying.result()
    obeying.cancel()
