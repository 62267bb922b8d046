"""The load: sends rows when they are due, at most so many at once, and watches its own event loop meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from diptych.bench.dataset import Row
from diptych.bench.sample import Sample


async def drive(
    rows: Sequence[Row],
    offsets_s: Sequence[float],
    max_concurrency: int | None,
    send: Callable[[Row], Awaitable[Sample]],
    on_done: Callable[[Sample], None],
) -> list[Sample]:
    """Send `rows[i]` at `offsets_s[i]` (ascending) after the start; the samples, in the rows' order.

    With `max_concurrency` a row that is due waits until fewer than that are running (all offsets 0: a closed loop).
    `on_done` is called as each finishes. Cancelling this cancels every request under way.
    """
    free = asyncio.Semaphore(max_concurrency or len(rows))
    start_s = time.perf_counter()

    async def run(row: Row) -> Sample:
        try:
            sample = await send(row)
        finally:
            free.release()
        on_done(sample)
        return sample

    async with asyncio.TaskGroup() as group:
        tasks = []
        for row, offset_s in zip(rows, offsets_s, strict=True):
            wait_s = start_s + offset_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            await free.acquire()
            tasks.append(group.create_task(run(row)))
    return [task.result() for task in tasks]


class LagWatch:
    """How late this process's event loop wakes up; latencies are too high by as much. An async context manager."""

    def __init__(self, interval_s: float = 0.02) -> None:
        self._interval_s = interval_s
        self.lags_s: list[float] = []

    async def __aenter__(self) -> LagWatch:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _watch(self) -> None:
        while True:
            asleep_s = time.perf_counter()
            await asyncio.sleep(self._interval_s)
            self.lags_s.append(max(time.perf_counter() - asleep_s - self._interval_s, 0.0))
