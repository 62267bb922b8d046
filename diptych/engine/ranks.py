"""The ranks of an engine, as rank 0 leads them: each runs every plan and moves its own heads and layers of pages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from diptych.engine.channel import Channel
from diptych.errors import EngineBroken
from diptych.transfer.commands import AnyCommand, AnyEvent
from diptych.transfer.plane import DataPlane
from diptych.types import Plan, StepResult

if TYPE_CHECKING:
    from diptych.model.runner import Runner


class RunPlan(msgspec.Struct, tag="run"):
    """Rank 0 → follower: run this step. No answer: the exchanges inside keep the ranks together."""

    plan: Plan


class MovePages(msgspec.Struct, tag="move"):
    """Rank 0 → follower: a command for its data plane."""

    command: AnyCommand


class RankReady(msgspec.Struct, tag="ready"):
    """Follower → rank 0: loaded. `addresses`: where this rank receives pages."""

    addresses: list[str]


class PagesMoved(msgspec.Struct, tag="moved"):
    """Follower → rank 0: its data plane's news."""

    event: AnyEvent


ToRank = RunPlan | MovePages
FromRank = RankReady | PagesMoved


class Follower:
    """A follower's part: carries rank 0's messages out one after the other, in the order they came.

    The order matters: rank 0 may be done with a plan (when no row is sampled, its last layer asks nothing of the other
    ranks, nor of a later stage) before this rank has stored that plan's keys and values, and says then that they can be
    sent.

    `run` computes a plan and blocks; `move` begins to carry a data command out and returns.
    """

    def __init__(self, run: Callable[[Plan], object], move: Callable[[AnyCommand], None]) -> None:
        self._run = run
        self._move = move
        self._messages: asyncio.Queue[ToRank] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")

    def hear(self, message: ToRank) -> None:
        self._messages.put_nowait(message)

    async def obey(self) -> None:
        """Never returns. Raises what a plan raises: what this rank would compute from then on would be wrong."""
        loop = asyncio.get_running_loop()
        while True:
            message = await self._messages.get()
            if isinstance(message, RunPlan):
                await loop.run_in_executor(self._thread, self._run, message.plan)
            else:
                self._move(message.command)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class Ranks:
    """Rank 0's hold on all ranks. `on_event(rank, event)` hears from every data plane, `on_death(rank)` of deaths.

    `channel` makes the ends of the channels to followers: simulations have their own.
    """

    def __init__(
        self,
        runner: Runner,
        on_event: Callable[[int, AnyEvent], None],
        on_death: Callable[[int], None],
        channel: Callable[[Any, Callable[[Any], None], Callable[[], None]], Channel] = Channel,
    ) -> None:
        self.runner = runner
        self.plane: DataPlane | None = None  # set by the worker when this server hands over
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self.addresses: list[list[str]] = []
        self._on_event = on_event
        self._on_death = on_death
        self._channel = channel
        self._channels: list[Channel] = []
        self._ready: list[asyncio.Future[list[str]]] = []

    async def connect(self, fds: list[int], timeout_s: float) -> None:
        """Open the channels to ranks 1… and wait until each has loaded. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        for rank, fd in enumerate(fds, start=1):
            self._ready.append(loop.create_future())
            channel = self._channel(FromRank, partial(self._hear, rank), partial(self._on_death, rank))
            await channel.open(fd)
            self._channels.append(channel)
        async with asyncio.timeout(timeout_s):
            self.addresses = [await ready for ready in self._ready]

    def _hear(self, rank: int, message: FromRank) -> None:
        if isinstance(message, RankReady):
            self._ready[rank - 1].set_result(message.addresses)
        else:
            self._on_event(rank, message.event)

    async def compute(self, plan: Plan) -> StepResult:
        """One forward pass on all ranks. Raises EngineBroken if it fails while others take part: where they stand is
        unknown then, and the next exchanges would mix different steps."""
        if self._channels:
            message = RunPlan(_for_followers(plan))
            for channel in self._channels:
                channel.send(message)
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, self.runner.run, plan)
        except Exception as error:
            if not self._channels:
                raise
            raise EngineBroken(f"step {plan.step} failed on rank 0 of {len(self._channels) + 1}") from error

    def broadcast(self, command: AnyCommand) -> None:
        """Give a command to every rank's data plane."""
        for channel in self._channels:
            channel.send(MovePages(command))
        assert self.plane is not None
        self.plane.execute(command)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self.thread.shutdown(wait=False, cancel_futures=True)


def _for_followers(plan: Plan) -> Plan:
    """Rank 0 alone samples: masks and histories, the bulk of a plan, stay here."""
    rows = [msgspec.structs.replace(row, mask=None, history=None) for row in plan.rows]
    return msgspec.structs.replace(plan, rows=rows)
