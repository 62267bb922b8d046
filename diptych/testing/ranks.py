"""The ranks of a simulated server: each computes its share of the mock model in its own virtual time.

As in the real model, ranks wait for each other where attention adds up what all heads say, and where logits are
gathered if a row is sampled; in between each goes at its own pace. So a rank that leads can be done with a chunk before
another has stored the last layer's keys and values. Where steps overlap, a rank begins one when the one before it is
done, whatever its process does meanwhile.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from diptych.engine.ranks import Follower, PagesMoved, RankReady, ToRank
from diptych.sched.plan import MAX_IN_FLIGHT
from diptych.testing.mock_model import U64
from diptych.testing.mock_runner import Inputs, MockRunner, num_cached, resolve
from diptych.testing.pipe import PipeChannel, Pipes
from diptych.transfer.commands import AnyEvent
from diptych.transfer.plane import DataPlane
from diptych.types import Plan, RowResult, StepResult

STEP_S = (0.002, 0.02)
LAG_S = (0.0, 0.003)
LATE_P, LATE_S = 0.1, (0.01, 0.1)  # a rank whose processor is taken away in the middle of a step


class SimThread(Executor):
    """A thread on a VirtualLoop: does what it is given one after the other; a coroutine takes its own time."""

    def __init__(self) -> None:
        self._last: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last.set_result(None)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        self._last = asyncio.ensure_future(self._carry_out(self._last, done, fn, args))
        return done

    async def _carry_out(
        self, before: asyncio.Future[None], done: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        await before
        if not done.set_running_or_notify_cancel():
            return
        try:
            result = fn(*args)
            if inspect.isawaitable(result):
                result = await result
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(result)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._last.cancel()


class Lockstep:
    """Where the ranks of one server wait for each other: the collectives of its steps, counted by each rank; and for
    the tokens that rank 0 samples."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._tokens: dict[int, asyncio.Future[list[int]]] = {}
        self._parts: dict[int, list[U64]] = {}
        self._sums: dict[int, asyncio.Future[U64]] = {}

    def __len__(self) -> int:
        return len(self._parts)

    async def add(self, number: int, part: U64) -> U64:
        """The sum of what all ranks bring to their collective `number`, once the last one is there."""
        parts = self._parts.setdefault(number, [])
        total = self._sums.setdefault(number, asyncio.get_running_loop().create_future())
        parts.append(part)
        if len(parts) == self._world:
            del self._parts[number], self._sums[number]
            total.set_result(np.sum(parts, axis=0, dtype=np.uint64))
        return await asyncio.shield(total)

    def tokens(self, number: int) -> asyncio.Future[list[int]]:
        """What step `number` samples, by row; -1: nothing."""
        return self._tokens.setdefault(number, asyncio.get_running_loop().create_future())

    def sampled(self, number: int, result: StepResult) -> None:
        """Step `number` is done. No rank is still before the one before it."""
        self.tokens(number).set_result([row.token for row in result.rows])
        self._tokens.pop(number - 2, None)


class SimRank:
    """Stands where a rank's Runner stands, its calls being coroutines. `inspect(plan)` is called when this rank begins
    a step."""

    def __init__(
        self, runner: MockRunner, rank: int, lockstep: Lockstep, rng: random.Random, inspect: Callable[[Plan], None]
    ) -> None:
        self.overlaps = runner.overlaps
        self._runner, self._share = runner, runner.ranks[rank]
        self._leads = rank == 0
        self._lockstep = lockstep
        self._rng = rng
        self._inspect = inspect
        self._num_collectives = 0
        self._num_steps = 0
        self._steps: deque[asyncio.Task[StepResult]] = deque(maxlen=MAX_IN_FLIGHT)

    async def launch(self, plan: Plan) -> asyncio.Task[StepResult]:
        before = self._steps[-1] if self._steps else None
        self._num_steps += 1
        task = asyncio.ensure_future(self._run(self._num_steps, before, plan))
        self._steps.append(task)
        if not self.overlaps:
            await task
        return task

    async def collect(self, launched: asyncio.Task[StepResult]) -> StepResult:
        return await launched

    def kill(self) -> None:
        """Nothing of it runs on."""
        for task in self._steps:
            task.cancel()

    async def _run(self, number: int, before: asyncio.Task[StepResult] | None, plan: Plan) -> StepResult:
        if before is not None:
            await before
        await asyncio.sleep(self._rng.uniform(*STEP_S))
        self._inspect(plan)
        if (plan.token_ids < 0).any():
            plan = resolve(plan, await asyncio.shield(self._lockstep.tokens(number - 1)))
        result = await self._compute(plan)
        if self._leads:
            self._lockstep.sampled(number, result)
        return result

    async def _compute(self, plan: Plan) -> StepResult:
        """One step. Rows that sample nothing need no logits: then this rank is done without the others."""
        inputs = self._runner.begin(plan, await self._add(self._share.read(plan, num_cached(plan))))
        last = self._share.store.num_layers - 1
        self._share.write(plan, inputs.contents, slice(0, last))
        late = LATE_S if self._rng.random() < LATE_P else LAG_S
        await asyncio.sleep(self._rng.uniform(*late))
        self._share.write(plan, inputs.contents, slice(last, last + 1))
        if not any(row.samples or row.prompt_targets is not None for row in plan.rows):
            return StepResult(rows=[RowResult(-1) for _ in plan.rows])
        return await self._sample(plan, inputs)

    async def _sample(self, plan: Plan, inputs: Inputs) -> StepResult:
        stored = await self._add(self._share.read(plan, plan.kv_lens))
        return self._runner.end(plan, inputs, stored) if self._leads else StepResult(rows=[])

    async def _add(self, part: U64) -> U64:
        self._num_collectives += 1
        return await self._lockstep.add(self._num_collectives, part)


class SimFollower:
    """The process of a rank above 0, as `diptych.engine.follow` sets it up. `start`, then `kill`."""

    def __init__(
        self,
        kind: type[Follower],
        rank: SimRank,
        pipes: Pipes,
        fd: int,
        make_plane: Callable[[Callable[[AnyEvent], None]], DataPlane],
        on_end: Callable[[], None],
    ) -> None:
        runner: Any = rank
        self._rank = rank
        self.plane = make_plane(lambda event: self._channel.send(PagesMoved(event, self.plane.counters)))
        self._follower = kind(runner, self.plane.execute)
        self._pipes, self._fd = pipes, fd
        self._on_end = on_end
        self._channel = PipeChannel(pipes, ToRank, self._follower.hear, self.kill)
        self._obeying: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def start(self, host: str) -> None:
        addresses = await self.plane.start(host)
        await self._channel.open(self._fd)
        self._channel.send(RankReady(addresses))
        self._obeying = asyncio.ensure_future(self._follower.obey())

    def kill(self) -> None:
        """Nothing of it runs on; the leader sees its channel end."""
        if self._closing is None and self._obeying is not None:
            self._on_end()
            self._pipes[self._fd].die()
            self._obeying.cancel()
            self._rank.kill()
            self._closing = asyncio.ensure_future(self.plane.close())
            self._follower.close()
