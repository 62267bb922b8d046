"""The ranks of an engine, as rank 0 leads them: each runs every plan and moves its own heads and layers of pages."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from diptych.engine.channel import Channel
from diptych.errors import EngineBroken, StepFailed
from diptych.sched.plan import MAX_IN_FLIGHT
from diptych.transfer.commands import AnyCommand, AnyEvent
from diptych.transfer.incoming import Counters, total
from diptych.transfer.plane import DataPlane
from diptych.types import Plan, StepResult

if TYPE_CHECKING:
    from diptych.model.runner import Runner


class RunPlan(msgspec.Struct, tag="run"):
    """Rank 0 → follower: run this step. No answer: the exchanges inside keep the ranks together."""

    plan: Plan


class MovePages(msgspec.Struct, tag="move"):
    """Rank 0 → follower: a command for its data plane, to be carried out when `step` is done there too."""

    command: AnyCommand
    step: int


class RankReady(msgspec.Struct, tag="ready"):
    """Follower → rank 0: loaded. `addresses`: where this rank receives pages."""

    addresses: list[str]


class PagesMoved(msgspec.Struct, tag="moved"):
    """Follower → rank 0: its data plane's news, and all that it has moved so far."""

    event: AnyEvent
    counters: Counters


ToRank = RunPlan | MovePages
FromRank = RankReady | PagesMoved


class Follower:
    """A follower's part: carries rank 0's messages out one after the other, in the order they came.

    The order matters: rank 0 may be done with a plan (when no row is sampled, its last layer asks nothing of the other
    ranks, nor of a later stage) before this rank has stored that plan's keys and values, and says then that they can be
    sent.

    `move` begins to carry a data command out and returns.
    """

    def __init__(self, runner: Runner, move: Callable[[AnyCommand], None]) -> None:
        self._runner = runner
        self._move = move
        self._messages: asyncio.Queue[ToRank] = asyncio.Queue()
        self._launched: deque[tuple[int, Any]] = deque()  # steps not collected yet
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")

    def hear(self, message: ToRank) -> None:
        self._messages.put_nowait(message)

    async def obey(self) -> None:
        """Never returns. Raises what a plan raises: what this rank would compute from then on would be wrong."""
        loop = asyncio.get_running_loop()
        while True:
            message = await self._messages.get()
            if isinstance(message, RunPlan):
                plan = message.plan
                await self._collect(plan.step - MAX_IN_FLIGHT)
                launched = await loop.run_in_executor(self._thread, self._runner.launch, plan)
                self._launched.append((plan.step, launched))
            else:
                await self._collect(message.step)
                self._move(message.command)

    async def _collect(self, step: int) -> None:
        """Wait until all steps up to `step` are done."""
        while self._launched and self._launched[0][0] <= step:
            _, launched = self._launched.popleft()
            await asyncio.get_running_loop().run_in_executor(self._thread, self._runner.collect, launched)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class Launched(NamedTuple):
    """A step on rank 0. `pending`: what the runner's launch returns."""

    step: int
    pending: Future[Any]


class Ranks:
    """Rank 0's hold on all ranks, as the loop's Device. `on_event(rank, event)` hears from every data plane,
    `on_death(rank)` of deaths.

    `overlap` False: one step at a time, even if the runner could do more. `channel` makes the ends of the channels to
    followers, `thread` is the one that computes: simulations have their own.
    """

    def __init__(
        self,
        runner: Runner,
        on_event: Callable[[int, AnyEvent], None],
        on_death: Callable[[int], None],
        *,
        overlap: bool = True,
        channel: Callable[[Any, Callable[[Any], None], Callable[[], None]], Channel] = Channel,
        thread: Executor | None = None,
    ) -> None:
        self.runner = runner
        self.overlaps = overlap and runner.overlaps
        self.plane: DataPlane | None = None  # set by the worker when this server hands over
        self.thread = thread or ThreadPoolExecutor(1, thread_name_prefix="compute")
        self.addresses: list[list[str]] = []
        self._on_event = on_event
        self._on_death = on_death
        self._channel = channel
        self._channels: list[Channel] = []
        self._ready: list[asyncio.Future[list[str]]] = []
        self._moved: dict[int, Counters] = {}  # by ranks above 0, when they last told
        self._collected = 0  # the last step that is done here

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
            self._moved[rank] = message.counters
            self._on_event(rank, message.event)

    def launch(self, plan: Plan) -> Launched:
        """Hand one forward pass to all ranks."""
        if self._channels:
            message = RunPlan(_for_followers(plan))
            for channel in self._channels:
                channel.send(message)
        return Launched(plan.step, self.thread.submit(self.runner.launch, plan))

    async def collect(self, launched: Launched) -> StepResult:
        """Wait for the oldest. Raises EngineBroken if it fails while others take part, but for StepFailed: where they
        stand is unknown then, and the next exchanges would mix different steps."""
        try:
            result = await asyncio.wrap_future(self.thread.submit(self._collect, launched.pending))
        except StepFailed:
            self._collected = launched.step
            raise
        except Exception as error:
            if not self._channels:
                raise
            raise EngineBroken(f"step {launched.step} failed on rank 0 of {len(self._channels) + 1}") from error
        self._collected = launched.step
        return result

    def _collect(self, pending: Future[Any]) -> StepResult:
        """On the computing thread, which launched before: nothing is waited for but the device."""
        return self.runner.collect(pending.result())

    def broadcast(self, command: AnyCommand) -> None:
        """Give a command to every rank's data plane."""
        for channel in self._channels:
            channel.send(MovePages(command, self._collected))
        assert self.plane is not None
        self.plane.execute(command)

    def counters(self) -> Counters:
        """What all ranks' data planes have moved and refused."""
        assert self.plane is not None
        return total([self.plane.counters, *self._moved.values()])

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self.thread.shutdown(wait=False, cancel_futures=True)


def _for_followers(plan: Plan) -> Plan:
    """Rank 0 alone samples: masks and histories, the bulk of a plan, stay here."""
    rows = [msgspec.structs.replace(row, mask=None, history=None) for row in plan.rows]
    return msgspec.structs.replace(plan, rows=rows)
