"""HTTP exchanges of a simulated cluster, over links of a MemoryNetwork: a call goes in, a head and parts come out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec

from diptych.errors import DiptychError
from diptych.router.config import ServerAddress
from diptych.router.exchange import Body, Exchange, Headers, ServerLost
from diptych.transfer.link import Link, LinkClosed, Transport

HTTP_TIMEOUT_S = 5.0
_MAX_HEADER_BYTES = 1 << 20  # calls and parts travel as headers

Handler = Callable[[str, bytes], AsyncIterator[bytes]]


class Head(msgspec.Struct, tag="head"):
    """First message of an answer."""

    status: int


class Part(msgspec.Struct, tag="part"):
    """`number` counts from 0: what a faulty network duplicates is dropped, as TCP does."""

    number: int
    data: bytes
    last: bool = False


class Call(msgspec.Struct, tag="call"):
    path: str
    body: bytes


async def serve(link: Link, handle: Handler) -> None:
    """Take one call and answer with what `handle(path, body)` yields. A caller that hangs up ends the handler."""
    link.max_header_bytes = _MAX_HEADER_BYTES
    try:
        call = msgspec.msgpack.decode((await link.recv())[0], type=Call)
        answer = asyncio.ensure_future(_answer(link, handle(call.path, call.body)))
        gone = asyncio.ensure_future(_until_closed(link))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
    except LinkClosed:
        pass
    finally:
        link.close()


async def _answer(link: Link, stream: AsyncIterator[bytes]) -> None:
    """The status is 200, or that of an error raised before the first part; later errors are told in the stream."""
    number = 0

    async def part(data: bytes, *, last: bool = False) -> None:
        nonlocal number
        if number == 0:
            await link.send(msgspec.msgpack.encode(Head(status)))
        await link.send(msgspec.msgpack.encode(Part(number, data, last)))
        number += 1

    status = 200
    try:
        async for data in stream:
            await part(data)
        await part(b"", last=True)
    except LinkClosed:
        return
    except DiptychError as error:
        body = msgspec.json.encode({"error": {"message": error.message, "code": error.code}})
        if number == 0:
            status = error.status
        else:
            body = b"data: " + body + b"\n\n"
        await part(body)
        await part(b"", last=True)
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


async def _until_closed(link: Link) -> None:
    try:
        while True:
            await link.recv()
    except LinkClosed:
        return


class SimExchange(Exchange):
    """The caller's side of an exchange."""

    def __init__(self, link: Link, status: int) -> None:
        self.status = status
        self.headers = [(b"content-type", b"text/event-stream" if status == 200 else b"application/json")]
        self._link = link
        self._next = 0

    async def read(self) -> bytes:
        while True:
            try:
                message = msgspec.msgpack.decode((await self._link.recv())[0], type=Head | Part)
            except LinkClosed:
                raise ServerLost("the connection broke", sent=True) from None
            if isinstance(message, Part) and message.number == self._next:
                self._next += 1
                if message.last or message.data:
                    return message.data

    def close(self) -> None:
        self._link.close()


class SimUpstream:
    """A way to the servers. `addresses` says where each one's HTTP is reached now."""

    def __init__(self, transport: Transport, addresses: dict[str, str]) -> None:
        self._transport = transport
        self._addresses = addresses

    async def open(
        self, server: ServerAddress, method: str, path: str, headers: Headers, body: Body, *, fresh: bool = False
    ) -> Exchange:
        try:
            address = self._addresses.get(server.host, f"mem://{server.host}/0")
            link = await self._transport.connect(address, HTTP_TIMEOUT_S)
        except LinkClosed as error:
            raise ServerLost(error.message, sent=False) from None
        link.max_header_bytes = _MAX_HEADER_BYTES
        try:
            await link.send(msgspec.msgpack.encode(Call(path, b"".join(body))))
            head = msgspec.msgpack.decode((await link.recv())[0], type=Head | Part)
            assert isinstance(head, Head)
            return SimExchange(link, head.status)
        except LinkClosed:
            link.close()
            raise ServerLost("the connection broke before an answer", sent=True) from None
        except BaseException:
            link.close()
            raise
