from __future__ import annotations

import asyncio
import time

from diptych.bench.dataset import Row
from diptych.bench.load import LagWatch, drive
from diptych.bench.sample import Sample


def rows(num: int) -> list[Row]:
    return [Row(prompt=[i], prompt_len=1, output_len=1) for i in range(num)]


class Gate:
    """A `send` that holds every request until it is let go, and knows how many it holds."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.held: dict[int, asyncio.Event] = {}
        self.peak = 0
        self.changed = asyncio.Event()

    async def send(self, row: Row) -> Sample:
        number = int(row.prompt[0])  # type: ignore[arg-type]
        self.sent.append(number)
        self.held[number] = asyncio.Event()
        self.peak = max(self.peak, len(self.held))
        self.changed.set()
        await self.held[number].wait()
        del self.held[number]
        return Sample(start_s=0.0, prompt_tokens=number)

    async def until_sent(self, num: int) -> None:
        async with asyncio.timeout(10):
            while len(self.sent) < num:
                self.changed.clear()
                await self.changed.wait()


async def test_a_closed_loop_keeps_its_number_and_the_order_of_the_rows() -> None:
    gate, done = Gate(), []
    run = asyncio.create_task(drive(rows(5), [0.0] * 5, 2, gate.send, lambda s: done.append(s.prompt_tokens)))
    await gate.until_sent(2)
    assert gate.sent == [0, 1]
    gate.held[1].set()
    await gate.until_sent(3)
    assert (gate.sent, done) == ([0, 1, 2], [1])
    for number in (2, 0, 3, 4):
        await gate.until_sent(max(number + 1, 3))
        gate.held[number].set()
    samples = await run
    assert [sample.prompt_tokens for sample in samples] == [0, 1, 2, 3, 4]
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert gate.peak == 2


async def test_without_a_limit_all_are_sent_at_once() -> None:
    gate = Gate()
    run = asyncio.create_task(drive(rows(7), [0.0] * 7, None, gate.send, lambda sample: None))
    await gate.until_sent(7)
    assert gate.peak == 7
    for event in list(gate.held.values()):
        event.set()
    await run


async def test_arrivals_are_kept_by_the_clock() -> None:
    starts: list[float] = []

    async def send(row: Row) -> Sample:
        starts.append(time.perf_counter())
        return Sample(start_s=0.0)

    begun = time.perf_counter()
    await drive(rows(3), [0.0, 0.02, 0.03], None, send, lambda sample: None)
    assert all(start - begun >= offset for start, offset in zip(starts, [0.0, 0.02, 0.03], strict=True))


async def test_cancelling_ends_what_is_under_way() -> None:
    gate = Gate()
    run = asyncio.create_task(drive(rows(3), [0.0] * 3, None, gate.send, lambda sample: None))
    await gate.until_sent(3)
    run.cancel()
    assert (await asyncio.gather(run, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    assert len(asyncio.all_tasks()) == 1


async def test_lag_watch_sees_a_blocked_loop() -> None:
    async with LagWatch(interval_s=0.001) as lag:
        await asyncio.sleep(0.002)  # the watch is asleep now
        time.sleep(0.05)  # noqa: ASYNC251 - blocks the loop on purpose
        await asyncio.sleep(0.002)  # and has woken up, late
    assert max(lag.lags_s) >= 0.04
    assert len(asyncio.all_tasks()) == 1
