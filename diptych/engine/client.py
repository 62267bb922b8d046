"""The API process's view of its engine: submit, stream, abort, ask."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import msgspec

from diptych.errors import BadRequest, ClientGone, DeadlineExceeded, DiptychError, EngineLost, Overloaded, Unavailable
from diptych.types import (
    Abort,
    Complete,
    Control,
    ControlReply,
    FromEngine,
    ModelInfo,
    Output,
    Outputs,
    Request,
    Stats,
    Submit,
    ToEngine,
    TokenLogprob,
)

CONTROL_TIMEOUT_S = 10.0


def _nothing(output: Output) -> None:
    pass


class EngineClient(Protocol):
    """What the API needs of an engine."""

    model: ModelInfo
    stats: Stats
    max_total_num_tokens: int
    alive: bool
    stalled: bool  # alive, but it has said nothing for some seconds

    def generate(
        self, request: Request, *, whole: bool = False, heard: Callable[[Output], None] = _nothing
    ) -> AsyncIterator[Output]:
        """The request's outputs, up to the one with `finish`; what comes while nobody waits becomes one Output. With
        `whole` there is one only, at the end. Closing the iterator early aborts the request.

        `heard` is called as soon as something comes, with that. Raises EngineLost when the engine dies meanwhile.
        """

    def complete(self, rid: str) -> None:
        """The request's text is complete; the caller closes its iterator next, and that is no abort then."""

    async def abort(self, rid: str, message: str) -> None:
        """Abort one request, or all with "". Unknown ids are ignored."""

    async def control(self, op: str, **args: Any) -> dict[str, Any]:
        """Run a control operation (types.Control). Raises what the engine refuses, or DeadlineExceeded."""


class _Stream:
    """What came for one request and its handler has not taken yet. One reader.

    `rid` is the request's id in the engine. With `whole` the reader sleeps until the end is there.
    """

    __slots__ = (
        *("_heard", "_latest", "_logprobs", "_prompt_logprobs", "_tokens", "_waiter", "_whole"),
        *("complete", "dead", "rid"),
    )

    def __init__(self, rid: str, whole: bool, heard: Callable[[Output], None]) -> None:
        self.rid = rid
        self._whole = whole
        self._heard = heard
        self._latest: Output | None = None
        self._tokens: list[int] = []  # these three are of all outputs up to the latest
        self._logprobs: list[TokenLogprob] | None = None
        self._prompt_logprobs: list[TokenLogprob] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.complete = False
        self.dead = False

    def put(self, output: Output) -> None:
        self._heard(output)
        self._tokens += output.tokens
        if output.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        self._latest = output
        if not self._whole or output.finish is not None:
            self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Output:
        while (latest := self._latest) is None or (self._whole and latest.finish is None):
            if self.dead:
                raise EngineLost("the engine of this server has stopped; the request was lost, send it again")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._take(latest)

    def _take(self, latest: Output) -> Output:
        """All that came since the last time."""
        tokens, self._tokens = self._tokens, []
        logprobs, self._logprobs = self._logprobs, None
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        self._latest = None
        if len(tokens) == len(latest.tokens) and prompt_logprobs is latest.prompt_logprobs:
            return latest
        return msgspec.structs.replace(latest, tokens=tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)


class EngineLink:
    """EngineClient over any `send` (a channel to the engine process, or an engine in this process).

    In the engine every request has an id that none had before: what is on its way from a request that was closed early
    must not reach the next one with the same id.
    """

    def __init__(self, send: Callable[[ToEngine], None], model: ModelInfo, max_total_num_tokens: int) -> None:
        self.model = model
        self.max_total_num_tokens = max_total_num_tokens
        self.stats = Stats()
        self.alive = True
        self.stalled = False
        self.on_stats: Callable[[Stats], None] = lambda stats: None
        self._send = send
        self._streams: dict[str, _Stream] = {}  # by the callers' ids
        self._listening: dict[str, _Stream] = {}  # the same, by the engine's
        self._replies: dict[int, asyncio.Future[ControlReply]] = {}
        self._ids = itertools.count(1)

    async def generate(
        self, request: Request, *, whole: bool = False, heard: Callable[[Output], None] = _nothing
    ) -> AsyncIterator[Output]:
        if not self.alive:
            raise Unavailable("the engine of this server has stopped; send the request to another")
        if request.rid in self._streams:
            raise BadRequest(f"a request with rid {request.rid!r} is already running; choose another", param="rid")
        stream = _Stream(f"{request.rid}#{next(self._ids)}", whole, heard)
        self._streams[request.rid] = self._listening[stream.rid] = stream
        self._send(Submit(msgspec.structs.replace(request, rid=stream.rid)))
        finished = False
        try:
            while not finished:
                output = await stream.get()
                finished = output.finish is not None
                yield output
        finally:
            del self._streams[request.rid], self._listening[stream.rid]
            if not finished and self.alive:
                self._send(Complete(stream.rid) if stream.complete else _hung_up(stream.rid))

    def complete(self, rid: str) -> None:
        stream = self._streams.get(rid)
        if stream is not None:
            stream.complete = True

    async def abort(self, rid: str, message: str) -> None:
        stream = self._streams.get(rid)
        if stream is not None or not rid:
            self._send(Abort(stream.rid if stream is not None else "", message))

    async def control(self, op: str, **args: Any) -> dict[str, Any]:
        if not self.alive:
            raise Unavailable("the engine of this server has stopped")
        number = next(self._ids)
        future: asyncio.Future[ControlReply] = asyncio.get_running_loop().create_future()
        self._replies[number] = future
        try:
            self._send(Control(number, op, args))
            async with asyncio.timeout(CONTROL_TIMEOUT_S):
                reply = await future
        except TimeoutError:
            raise DeadlineExceeded(f"the engine did not answer {op} within {CONTROL_TIMEOUT_S:g} s") from None
        finally:
            del self._replies[number]
        if not reply.ok:
            raise _from_wire(reply.result)
        return reply.result

    # ---- fed by whoever owns the connection ----

    def receive(self, message: FromEngine) -> None:
        """Take a message of the engine."""
        if isinstance(message, Outputs):
            if message.stats is not None:
                self.stats = message.stats
                self.on_stats(message.stats)
            for output in message.outputs:
                stream = self._listening.get(output.rid)
                if stream is not None:
                    stream.put(output)
        elif isinstance(message, ControlReply):
            future = self._replies.get(message.id)
            if future is not None and not future.done():
                future.set_result(message)

    def died(self) -> None:
        """The engine is gone: every request and every question ends now."""
        self.alive = False
        for stream in self._streams.values():
            stream.dead = True
            stream.wake()
        for future in self._replies.values():
            if not future.done():
                future.set_exception(Unavailable("the engine of this server has stopped"))


def _hung_up(rid: str) -> Abort:
    return Abort(rid, "the client went away", ClientGone.code)


def _from_wire(result: dict[str, Any]) -> DiptychError:
    """An error of the engine as an exception of the same status."""
    status, message = result.get("status", 500), result.get("message", "the engine refused")
    for kind in (BadRequest, Overloaded, Unavailable):
        if kind.status == status:
            return kind(message)
    return DiptychError(message)
