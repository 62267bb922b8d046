"""One try to serve a request: a pair of servers that meet in new rooms, or one server that does both phases.

Until the first part of decode's answer is here, nothing has reached the client: a failure of either side up to then can
be told with its own status, or tried again elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from diptych.errors import UpstreamError
from diptych.router import logprobs, verdict
from diptych.router.body import Ask
from diptych.router.exchange import Body, Client, Exchange, Headers, ServerLost, Upstream, read_all
from diptych.router.fleet import Leg
from diptych.router.headers import to_client
from diptych.router.replies import JSON, error_body, error_event
from diptych.router.retry import STATUSES

VERDICT_S = 0.1  # how long one side's failure waits to learn whether the other's loss was the cause
LOSS_S = 1.0  # how long if it looks like that
LINGER_S = 5.0  # how long prefill's answer may outlast decode's

_SSE = b"text/event-stream"
_ERROR_EVENT = b'data: {"error"'


class Reply(msgspec.Struct):
    """A server's answer: whole, or its beginning if `exchange` is there to read the rest from."""

    status: int
    headers: Headers
    data: bytes
    exchange: Exchange | None = None


class Blame(msgspec.Struct):
    """A server that failed; `lost` if it was not even there to tell."""

    leg: Leg
    reply: Reply  # what it told, or the router tells in its place
    lost: ServerLost | None = None

    @property
    def charged(self) -> bool:
        """It counts against the server. A kept connection that had ended, a full server or a client's error do not."""
        return not self.lost.reused if self.lost is not None else _is_fault(self.reply.status)

    @property
    def died(self) -> bool:
        """The server, or its engine, died while it had the request. One that drains may cut connections in the end."""
        if self.lost is not None:
            return self.lost.sent and not self.lost.reused and not self.leg.server.draining
        return verdict.has_died(self.reply.status, self.reply.data)

    @property
    def leaving(self) -> bool:
        """The server has said that it takes nothing new any more."""
        return self.lost is None and verdict.is_leaving(self.reply.status, self.reply.data)

    @property
    def draining(self) -> bool:
        """The server has said that it leaves in order."""
        return self.lost is None and verdict.is_draining(self.reply.status, self.reply.data)


class Failure(msgspec.Struct):
    """Why an attempt failed. Nobody is blamed when the hand-over failed and no one can say on which side."""

    reply: Reply  # what the client gets if this was the last attempt
    blames: list[Blame]

    @property
    def lost(self) -> bool:
        return any(blame.lost is not None for blame in self.blames)

    @property
    def moves(self) -> bool:
        """Another try is no repetition: the server serves nobody any more, so that all its requests must move."""
        return self.lost or any(blame.leaving for blame in self.blames)

    @property
    def retryable(self) -> bool:
        return self.lost or self.reply.status in STATUSES


class Attempt:
    """`run` it once. The servers' loads and circuit breakers are told how their parts ended, `begun` that the answer
    begins. `fresh`: on new connections, so that one that breaks was not at its end already.
    """

    def __init__(
        self,
        upstream: Upstream,
        ask: Ask,
        prefill: Leg | None,
        decode: Leg,
        *,
        max_bytes: int,
        headers: Headers,
        begun: Callable[[], None],
        fresh: bool,
    ) -> None:
        self._upstream = upstream
        self._ask = ask
        self._prefill = prefill
        self._decode = decode
        self._max_bytes = max_bytes
        self._extra = headers  # for the client, besides the servers' own
        self._begun = begun
        self._fresh = fresh
        self._loop = asyncio.get_running_loop()
        self._complete = False
        self.first_at: float | None = None  # when decode's stream began
        self.broken: ServerLost | None = None  # why a stream that had begun did not reach its end

    async def run(self, method: str, path: str, headers: Headers, body: Body, client: Client) -> Failure | None:
        """Send the request and answer `client`. Returns why that failed if nothing has reached the client."""
        decode = self._loop.create_task(self._begin(self._decode, method, path, headers, body))
        prefill = None
        if self._prefill is not None:
            prefill = self._loop.create_task(self._finish(self._prefill, method, path, headers, body))
        try:
            failure = await self._race(prefill, decode)
            if failure is None:
                self._begun()
                await self._answer(client, decode.result(), prefill)
                self._complete = True
            return failure
        finally:
            self._end(prefill, decode)

    # the two sides

    async def _open(self, leg: Leg, method: str, path: str, headers: Headers, body: Body) -> Exchange:
        leg.task = asyncio.current_task()
        try:
            leg.exchange = await self._upstream.open(leg.server.address, method, path, headers, body, fresh=self._fresh)
        except asyncio.CancelledError:
            if leg.given_up:
                raise ServerLost("the server does not answer health checks", sent=True) from None
            raise
        return leg.exchange

    async def _begin(self, leg: Leg, method: str, path: str, headers: Headers, body: Body) -> Reply:
        """Decode's answer: of a stream the first part, otherwise all of it."""
        exchange = await self._open(leg, method, path, headers, body)
        if exchange.status < 400 and _is_stream(exchange):
            first = await exchange.read()
            self.first_at = self._loop.time()
            return _told_in_stream(first) or Reply(exchange.status, exchange.headers, first, exchange)
        whole = await read_all(exchange, self._max_bytes)
        return Reply(exchange.status, exchange.headers, whole)

    async def _finish(self, leg: Leg, method: str, path: str, headers: Headers, body: Body) -> Reply:
        """Prefill's answer, read to its end. It is kept where it matters: an error, or logprobs of the prompt."""
        exchange = await self._open(leg, method, path, headers, body)
        if exchange.status >= 400 or self._ask.merges_logprobs:
            data = await read_all(exchange, self._max_bytes)
        else:
            data = await exchange.read()
            while await exchange.read():
                pass
        reply = _told_in_stream(data) if _is_stream(exchange) else None
        return reply or Reply(exchange.status, exchange.headers, data)

    # who failed

    async def _race(self, prefill: asyncio.Task[Reply] | None, decode: asyncio.Task[Reply]) -> Failure | None:
        """Wait until decode has begun to answer, or one side has failed."""
        if prefill is None or self._prefill is None:
            await asyncio.wait((decode,))
            return self._judge(None, _blame(self._decode, decode), answered=False)
        await asyncio.wait((prefill, decode), return_when=asyncio.FIRST_COMPLETED)
        if prefill.done():
            await self._verdict(_blame(self._prefill, prefill), decode)
        failed = _blame(self._decode, decode)
        if decode.done() and (failed is not None or self._ask.merges_logprobs):
            await self._verdict(failed, prefill)
        answered = decode.done() and failed is None and not self._ask.merges_logprobs
        return self._judge(_blame(self._prefill, prefill), failed, answered=answered)

    async def _verdict(self, failed: Blame | None, other: asyncio.Task[Reply]) -> None:
        """One side has ended. If all is well wait for the other; if not, see whether the other's loss was the cause."""
        if failed is None:
            await asyncio.wait((other,))
        elif failed.lost is None and failed.charged and not other.done():
            await asyncio.wait((other,), timeout=LOSS_S if self._tells_of_loss(failed) else VERDICT_S)

    def _tells_of_loss(self, told: Blame) -> bool:
        found = verdict.guilt(told.leg.server.role, told.reply.status, told.reply.data)
        return found is verdict.Guilt.SILENT

    def _judge(self, prefill: Blame | None, decode: Blame | None, *, answered: bool) -> Failure | None:
        """Who is to blame: a server that was lost or leaves is the cause of the other's failure, never the reverse.

        `answered`: decode has begun to answer well, so that a prefill server lost after its work is no loss.
        """
        found = [blame for blame in (prefill, decode) if blame is not None]
        gone = [blame for blame in found if blame.lost is not None or blame.leaving]
        blames = gone or found[:1]
        if not blames or (answered and all(blame.lost is not None and blame.lost.sent for blame in blames)):
            return None
        failure = Failure(blames[0].reply, blames)
        if not gone:
            failure.blames = self._guilty(blames[0])
        now = self._loop.time()
        for blame in failure.blames:
            blame.leg.end(now, blame.charged or None)
        for leg in self.legs:
            leg.end(now)
        return failure

    def _guilty(self, told: Blame) -> list[Blame]:
        """Whose fault it is that a server has told an error: nobody's, if no one can say on which side."""
        found = verdict.guilt(told.leg.server.role, told.reply.status, told.reply.data)
        if found is verdict.Guilt.TELLER or self.alone:
            return [told]
        if found is verdict.Guilt.SILENT:
            silent = [leg for leg in self.legs if leg.exchange is None]
            return [Blame(leg, told.reply) for leg in silent] if len(silent) < len(self.legs) else []
        return [Blame(leg, told.reply) for leg in self.legs if leg.server.role == found.value]  # none for NOBODY

    @property
    def alone(self) -> bool:
        """One server does both phases."""
        return self._prefill is None

    @property
    def legs(self) -> list[Leg]:
        return [self._decode] if self._prefill is None else [self._prefill, self._decode]

    # the answer

    async def _answer(self, client: Client, reply: Reply, prefill: asyncio.Task[Reply] | None) -> None:
        """Hand decode's answer on. From its first byte on the attempt cannot be repeated."""
        merges = self._ask.merges_logprobs and prefill is not None and reply.status < 400
        headers = to_client(reply.headers, self._extra)
        if reply.exchange is None:
            data = logprobs.merge(prefill.result().data, reply.data) if merges and prefill else reply.data
            client.send(reply.status, headers, data)
            self._decode.end(self._loop.time(), _is_fault(reply.status))
            return
        client.start(reply.status, headers)
        try:
            if merges and prefill:
                await self._relay_merged(client, reply.exchange, reply.data, prefill.result().data)
            else:
                if not client.write(reply.data):
                    await client.drain()
                await reply.exchange.relay(client)
        except ServerLost as lost:
            # The place from which a later change moves the stream to another server.
            self.broken = lost
            self._decode.end(self._loop.time(), True)
            client.write(error_event(_told(self._decode, lost)))
        client.finish()
        self._decode.end(self._loop.time(), False)

    async def _relay_merged(self, client: Client, exchange: Exchange, data: bytes, prefill: bytes) -> None:
        merger = logprobs.StreamMerger(prefill, limit=self._max_bytes)
        while data:
            if (merged := merger.feed(data)) and not client.write(merged):
                await client.drain()
            data = await exchange.read()
        if rest := merger.rest():
            client.write(rest)

    def _end(self, prefill: asyncio.Task[Reply] | None, decode: asyncio.Task[Reply]) -> None:
        """Leave nothing running: prefill may end in peace if the client has its answer; otherwise both end at once."""
        decode.cancel()
        _when_done(self._decode, decode)
        _close(self._decode, self._loop.time())
        if prefill is None or self._prefill is None:
            return
        if self._complete and not prefill.done():
            timer = self._loop.call_later(LINGER_S, prefill.cancel)
            prefill.add_done_callback(lambda _: timer.cancel())
        else:
            prefill.cancel()
        _when_done(self._prefill, prefill)


def _when_done(leg: Leg, task: asyncio.Task[Reply]) -> None:
    """Close a leg once its task has ended, and note how it went."""

    def close(task: asyncio.Task[Reply]) -> None:
        now = asyncio.get_running_loop().time()
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or (error is not None and not isinstance(error, UpstreamError)):
            _close(leg, now)
        else:
            _close(leg, now, error is not None or _is_fault(task.result().status))

    if task.done():
        close(task)
    else:
        task.add_done_callback(close)


def _close(leg: Leg, now: float, failed: bool | None = None) -> None:
    if leg.exchange is not None:
        leg.exchange.close()
    leg.end(now, failed)


def _blame(leg: Leg, task: asyncio.Task[Reply]) -> Blame | None:
    """What went wrong on one side, as far as is known. Raises what is not the server's doing."""
    if not task.done():
        return None
    error = task.exception()
    if error is None:
        reply = task.result()
        return Blame(leg, reply) if reply.status >= 400 else None
    if not isinstance(error, UpstreamError):
        raise error
    told = _told(leg, error)
    reply = Reply(told.status, [JSON], error_body(told))
    return Blame(leg, reply, error if isinstance(error, ServerLost) else None)


def _told(leg: Leg, error: UpstreamError) -> UpstreamError:
    return UpstreamError(f"{leg.server.role} failed: {error.message}")


def _is_fault(status: int) -> bool:
    """503 is not: a server that is full or shutting down says so, and under load all of them do."""
    return status >= 500 and status != 503


def _is_stream(exchange: Exchange) -> bool:
    return any(name == b"content-type" and value.startswith(_SSE) for name, value in exchange.headers)


def _told_in_stream(first: bytes) -> Reply | None:
    """An error that a server tells as the first event of a stream with status 200, if trying elsewhere may help."""
    if not first.startswith(_ERROR_EVENT):
        return None
    event = first[len(b"data: ") :].partition(b"\n\n")[0]
    try:
        code = msgspec.json.decode(event)["error"].get("code")
    except (msgspec.DecodeError, RecursionError, AttributeError):
        return None
    status = code if isinstance(code, int) and not isinstance(code, bool) else 500
    return Reply(status, [JSON], event) if status in STATUSES else None
