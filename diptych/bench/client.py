"""One client process: sends a row, times what streams back, gives a Sample. Never raises for what a server does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from diptych.bench.backends import Backend, Frame, Options, error_text
from diptych.bench.dataset import Row
from diptych.bench.sample import Meter, Sample
from diptych.net import Resolver


class RequestFailed(Exception):
    """A request that got no whole answer; the message is the reason that is counted."""


class EventLines:
    """Server-sent events out of raw bytes: the payload of each `data:` line, whatever the boundaries of the reads."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class _Reply:
    """What the frames of one reply add up to."""

    def __init__(self, start_s: float) -> None:
        self.meter = Meter(start_s)
        self.texts: list[str] = []
        self.output_ids: list[int] = []
        self.total_tokens: int | None = None
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.ended = False

    def add(self, frame: Frame, now_s: float) -> None:
        """Take in a frame that arrived at `now_s`. Raises RequestFailed if it carries an error."""
        if frame.error:
            raise RequestFailed(frame.error)
        if frame.timed:
            counted = frame.total_tokens is not None
            self.meter.add(now_s, (frame.total_tokens or 0) - self.meter.num_tokens if counted else frame.new_tokens)
        if frame.cumulative:
            self.texts = [frame.text]
            self.output_ids = frame.output_ids
        else:
            self.texts.append(frame.text)
            self.output_ids += frame.output_ids
        if frame.total_tokens is not None:
            self.total_tokens = frame.total_tokens
        if frame.prompt_tokens is not None:
            self.prompt_tokens = frame.prompt_tokens
        if frame.cached_tokens is not None:
            self.cached_tokens = frame.cached_tokens
        self.ended = self.ended or bool(frame.finish)


class Client:
    """Requests to one server with one backend. An async context manager; connections are kept and closed with it."""

    def __init__(
        self,
        base_url: str,
        backend: Backend,
        options: Options,
        *,
        headers: dict[str, str] | None = None,
        extra: dict[str, Any] | None = None,
        timeout_s: float = 600.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._url = base_url.rstrip("/") + backend.path
        self._backend = backend
        self._options = options
        self._headers = {**(headers or {}), "Content-Type": "application/json"}
        self._extra = extra or {}
        self._timeout_s = timeout_s
        self._clock = clock

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, resolver=Resolver()),
            timeout=aiohttp.ClientTimeout(total=None, sock_read=None),  # `send` holds the one deadline
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._session.close()

    async def send(self, row: Row) -> Sample:
        """Ask `row` and measure the answer. A failure of any kind is a Sample with its reason in `error`."""
        body = msgspec.json.encode({**self._backend.body(row, self._options), **self._extra, **row.extra})
        start_s = self._clock()
        reply = _Reply(start_s)
        end_s, error = start_s, ""
        try:
            async with asyncio.timeout(self._timeout_s):
                end_s = await self._exchange(body, reply)
        except TimeoutError:
            error = f"no whole answer within {self._timeout_s:g} s (--request-timeout)"
        except RequestFailed as failed:
            error = str(failed)
        except aiohttp.ClientConnectorError as failed:
            error = f"cannot connect: {failed.os_error.strerror or type(failed.os_error).__name__}"
        except aiohttp.ClientError as failed:
            error = f"connection failed: {type(failed).__name__}"
        except msgspec.MsgspecError as failed:
            error = f"unreadable reply: {failed}"
        return self._sample(row, reply, start_s, end_s, error)

    def _sample(self, row: Row, reply: _Reply, start_s: float, end_s: float, error: str) -> Sample:
        streamed = self._options.stream
        total = reply.total_tokens if reply.total_tokens is not None else reply.meter.num_tokens
        return Sample(
            start_s=start_s,
            latency_s=end_s - start_s,
            ttft_s=reply.meter.ttft_s if streamed else None,
            itls_s=reply.meter.itls_s if streamed else [],
            num_chunks=reply.meter.num_chunks if streamed else 0,
            prompt_tokens=row.prompt_len if reply.prompt_tokens is None else reply.prompt_tokens,
            output_tokens=total,
            cached_tokens=reply.cached_tokens,
            text="".join(reply.texts),
            output_ids=reply.output_ids,
            error=error,
        )

    async def _exchange(self, body: bytes, reply: _Reply) -> float:
        """Post, read to the end; the time of the last event. Raises RequestFailed, aiohttp's and msgspec's errors."""
        async with self._session.post(self._url, data=body, headers=self._headers) as response:
            if response.status != 200:
                raise RequestFailed(_http_reason(response.status, await response.read()))
            if not self._options.stream:
                payload = await response.read()
                now_s = self._clock()
                reply.add(self._backend.read(payload), now_s)
                return now_s
            return await self._read_events(response, reply)

    async def _read_events(self, response: aiohttp.ClientResponse, reply: _Reply) -> float:
        events, read, now_s, done = EventLines(), self._backend.read, 0.0, False
        while data := await response.content.readany():
            now_s = self._clock()
            for payload in events.feed(data):
                if payload == b"[DONE]":
                    done = True
                else:
                    reply.add(read(payload), now_s)
        if not (done or reply.ended):
            raise RequestFailed("the stream ended before the answer did")
        return now_s


def _http_reason(status: int, body: bytes) -> str:
    """`HTTP 429: code: message`, from the error envelope if the body is one."""
    try:
        envelope = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return f"HTTP {status}"
    reason = error_text(envelope.get("error") or envelope.get("message"))
    return f"HTTP {status}: {reason}" if reason else f"HTTP {status}"
