"""Between the endpoints and the engine: words in, words out. Knows nothing of HTTP.

A whole sequence without stop strings wakes nobody before its end.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, cast

from diptych.api.sequence import Delta, Job, Result, Transcript
from diptych.api.wire import EngineRefusal, is_failure
from diptych.engine.client import EngineClient
from diptych.errors import Unavailable
from diptych.obs.metrics import ServerMetrics
from diptych.text.tokenizer import Tokenizer
from diptych.types import Finish, Output, Request

LONG_TEXT_CHARS = 8192  # longer texts are tokenized in a thread, so that other streams go on


class _Clock:
    """Times of one job, for the metrics."""

    __slots__ = ("_first", "_last", "_metrics", "_now", "_started")

    def __init__(self, metrics: ServerMetrics | None) -> None:
        self._metrics = metrics
        self._now = time.perf_counter  # the event loop's clock may count whole milliseconds, coarser than a step
        self._started = self._last = self._now()
        self._first: float | None = None

    def tokens(self, count: int) -> None:
        if self._metrics is None or not count:
            return
        now = self._now()
        self._metrics.tokens(count, now - self._last, first=self._first is None)
        self._first = self._first or now
        self._last = now

    def end(self, delta: Delta | None) -> None:
        if self._metrics is None:
            return
        if delta is None or delta.finish is None or delta.finish.type == "abort":
            self._metrics.failed()
            return
        e2e_s, decode_s = self._now() - self._started, self._last - (self._first or self._last)
        self._metrics.finished(delta.prompt_tokens, delta.cached_tokens, delta.completion_tokens, e2e_s, decode_s)


class Service:
    """All running requests of a server."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, metrics: ServerMetrics | None = None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = metrics
        self._running: dict[str, str] = {}  # engine's id of a sequence -> the id its client knows
        self._idle = asyncio.Event()
        self._idle.set()
        self._progress: asyncio.Event | None = None  # set when the engine answers anything; exists while somebody waits

    # ---- in ----

    async def encode(self, text: str, *, special: bool) -> list[int]:
        """`text` as token ids; long texts in a thread."""
        if len(text) <= LONG_TEXT_CHARS:
            await asyncio.sleep(0)  # other streams have a turn between the texts of a batch
            return self.tokenizer.encode(text, special=special)
        return await asyncio.to_thread(self.tokenizer.encode, text, special=special)

    async def decode(self, ids: list[int], *, skip_special: bool) -> str:
        """Token ids as text; many in a thread."""
        if len(ids) <= LONG_TEXT_CHARS:
            await asyncio.sleep(0)
            return self.tokenizer.decode(ids, skip_special=skip_special)
        return await asyncio.to_thread(self.tokenizer.decode, ids, skip_special=skip_special)

    # ---- running requests ----

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def idle(self) -> None:
        """Return when no request is running. The caller sets the deadline."""
        await self._idle.wait()

    async def abort(self, rid: str, message: str) -> int:
        """Abort the requests whose id begins with `rid`; "" means all. Returns how many there were."""
        found = [engine_rid for engine_rid, known in self._running.items() if known.startswith(rid)]
        if not rid:
            await self.engine.abort("", message)
        else:
            for engine_rid in found:
                await self.engine.abort(engine_rid, message)
        return len(found)

    async def progress(self) -> None:
        """Return when the engine has answered anything, to any request. The caller sets the deadline."""
        self._progress = self._progress or asyncio.Event()
        await self._progress.wait()

    # ---- out ----

    async def stream(self, job: Job, *, whole: bool = False) -> AsyncGenerator[Delta, None]:
        """The job's deltas, the last with `finish`; with `whole` there is no other. Closing the generator early aborts
        the job.

        Raises EngineRefusal when the engine ends it with an error, Unavailable when the engine dies.
        """
        request = self._admit(job.request)
        sequence = Transcript(job, self.tokenizer)
        clock = _Clock(self.metrics)
        delta: Delta | None = None

        def heard(output: Output) -> None:
            self._mark_progress()
            if not job.discard:
                clock.tokens(len(output.tokens))

        try:
            async with aclosing(cast(Any, self.engine.generate(request, whole=whole, heard=heard))) as outputs:
                async for output in outputs:
                    if output.finish is not None and is_failure(output.finish):
                        raise EngineRefusal(output.finish)
                    delta = sequence.take(output)
                    if delta.finish is not None:
                        if output.finish is None:
                            self.engine.complete(request.rid)
                        break
                    yield delta
        finally:
            self._leave(request.rid)
            clock.end(delta)
        if delta is None or delta.finish is None:
            raise Unavailable("the engine ended the request without a result; send it again")
        yield delta

    async def collect(self, job: Job) -> Result:
        """The whole sequence. Raises as `stream` does."""
        started = time.perf_counter()
        parts: list[str] = []
        result = Result(Finish("abort"))
        whole = not job.request.sampling.stop
        async with aclosing(self.stream(job, whole=whole)) as deltas:
            async for delta in deltas:
                parts.append(delta.text)
                result.tokens += delta.tokens
                result.logprobs += delta.logprobs
                if delta.prompt_logprobs is not None:
                    result.prompt_logprobs = delta.prompt_logprobs
                if delta.finish is not None:
                    result.finish = delta.finish
                result.prompt_tokens, result.cached_tokens = delta.prompt_tokens, delta.cached_tokens
                result.num_retractions = delta.num_retractions
        result.text = "".join(parts)
        result.e2e_s = time.perf_counter() - started
        return result

    async def collect_all(self, jobs: Sequence[Job]) -> list[Result]:
        """All jobs at once, in order. The first that fails aborts the others, and its error is raised."""
        if len(jobs) == 1:
            return [await self.collect(jobs[0])]
        tasks = [asyncio.create_task(self.collect(job)) for job in jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await _end(tasks)

    async def stream_all(self, jobs: Sequence[Job]) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Deltas of all jobs with their indices, those of one step together. Closing it early aborts all."""
        if len(jobs) == 1:
            async with aclosing(self.stream(jobs[0])) as deltas:
                async for delta in deltas:
                    yield [(0, delta)]
            return
        ready: deque[tuple[int, Delta]] = deque()
        wake = asyncio.Event()

        async def pump(index: int, job: Job) -> None:
            try:
                async with aclosing(self.stream(job)) as deltas:
                    async for delta in deltas:
                        ready.append((index, delta))
                        wake.set()
            finally:
                wake.set()

        tasks = [asyncio.create_task(pump(index, job)) for index, job in enumerate(jobs)]
        try:
            while True:
                await wake.wait()
                wake.clear()
                over = all(task.done() for task in tasks)
                if ready:
                    batch = list(ready)
                    ready.clear()
                    yield batch
                for task in tasks:
                    if task.done() and (error := task.exception()) is not None:
                        raise error
                if over:
                    return
        finally:
            await _end(tasks)

    # ---- the ledger of running requests ----

    def _admit(self, request: Request) -> Request:
        """Note the request as running. An id that is in use gets a suffix: two clients may choose the same."""
        rid, suffix = request.rid, 1
        while rid in self._running:
            suffix += 1
            rid = f"{request.rid}~{suffix}"
        self._running[rid] = request.rid
        self._idle.clear()
        return request if rid == request.rid else _with_rid(request, rid)

    def _leave(self, rid: str) -> None:
        del self._running[rid]
        if not self._running:
            self._idle.set()

    def _mark_progress(self) -> None:
        if self._progress is not None:
            self._progress.set()
            self._progress = None


def _with_rid(request: Request, rid: str) -> Request:
    return Request(
        rid=rid,
        prompt=request.prompt,
        sampling=request.sampling,
        namespace=request.namespace,
        logprobs=request.logprobs,
        bootstrap=request.bootstrap,
    )


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what still runs and wait for it: aborts have been sent when this returns."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
