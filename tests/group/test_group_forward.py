"""Connections of a Service, passed on over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from diptych.errors import ConfigError
from diptych.group.local.forward import Forwarder
from diptych.testing.processes import assert_backlog

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
LOCALHOST = "127.0.0.1"


@contextlib.asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[tuple[str, int]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    listening = await asyncio.start_server(handle, LOCALHOST, 0)
    try:
        yield listening.sockets[0].getsockname()[:2]
    finally:
        listening.close()


@contextlib.asynccontextmanager
async def forwarder(*targets: tuple[str, int]) -> AsyncIterator[Forwarder]:
    forward = Forwarder(LOCALHOST, 0)
    await forward.open()
    forward.set_targets(targets)
    try:
        yield forward
    finally:
        await forward.close()


@contextlib.asynccontextmanager
async def client(forward: Forwarder) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(forward.host, forward.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def says(text: bytes) -> Serve:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        await writer.drain()

    return serve


async def test_a_burst_of_clients_finds_room() -> None:
    async with forwarder() as forward:
        assert_backlog(forward.port)


async def test_half_close_travels_both_ways() -> None:
    """The client ends its side; the server still answers with all it got, and then ends."""

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()  # to the end
        writer.write(f"{len(data)} bytes".encode())
        await writer.drain()

    async with server(count) as target, forwarder(target) as forward, client(forward) as (reader, writer):
        writer.write(b"x" * 3_000_000)
        writer.write_eof()
        assert await reader.read() == b"3000000 bytes"


async def test_the_server_may_end_first() -> None:
    received = asyncio.get_running_loop().create_future()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.write_eof()
        received.set_result(await reader.read())

    async with server(greet) as target, forwarder(target) as forward, client(forward) as (reader, writer):
        assert await reader.read() == b"bye"
        writer.write(b"still here")
        writer.write_eof()
        assert await received == b"still here"


async def test_a_slow_reader_slows_the_writer() -> None:
    """What a server can send ahead of a client that does not read is bounded by buffers, not by the answer's size."""
    sent = 0
    stuck = asyncio.Event()

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        for _ in range(1000):
            writer.write(b"x" * 100_000)
            try:
                async with asyncio.timeout(0.5):
                    await writer.drain()
            except TimeoutError:
                stuck.set()
                await writer.drain()
            sent += 100_000

    async with server(flood) as target, forwarder(target) as forward, client(forward) as (reader, _):
        await stuck.wait()
        assert sent < 60_000_000
        assert len(await reader.read()) == 100_000_000


async def test_round_robin() -> None:
    async with server(says(b"a")) as first, server(says(b"b")) as second, forwarder(first, second) as forward:
        answers = []
        for _ in range(4):
            async with client(forward) as (reader, _):
                answers.append(await reader.read())
        assert answers == [b"a", b"b", b"a", b"b"]


async def test_a_target_that_does_not_listen_is_passed_over() -> None:
    async with server(says(b"")) as closed:
        pass
    async with server(says(b"a")) as target, forwarder(closed, target) as forward:
        for _ in range(2):
            async with client(forward) as (reader, _):
                assert await reader.read() == b"a"


async def test_no_target_is_an_error_and_not_an_empty_answer() -> None:
    async with forwarder() as forward, client(forward) as (reader, writer):
        with pytest.raises(ConnectionError):
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await writer.drain()
            await reader.read()
            raise AssertionError("the connection ended cleanly")


async def test_a_server_that_breaks_off_breaks_the_client_off() -> None:
    """A cut answer must not look like a whole one."""

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"half an ans")
        await writer.drain()
        await reader.readexactly(1)
        writer.transport.get_extra_info("socket").setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")  # SO_LINGER 0: a reset
        writer.transport.abort()

    async with server(cut) as target, forwarder(target) as forward, client(forward) as (reader, writer):
        assert await reader.readexactly(11) == b"half an ans"
        writer.write(b"!")
        with pytest.raises(ConnectionError):
            await reader.read()


async def test_a_client_that_breaks_off_frees_the_server() -> None:
    ended = asyncio.get_running_loop().create_future()

    async def wait(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        try:
            ended.set_result(await reader.read())
        except ConnectionError as error:
            ended.set_result(type(error))

    async with server(wait) as target, forwarder(target) as forward:
        async with client(forward) as (_, writer):
            writer.write(b"x")
            await writer.drain()
            writer.transport.abort()
        async with asyncio.timeout(5):
            await ended


async def test_closing_cuts_connections() -> None:
    async def hold(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()

    async with server(hold) as target, forwarder(target) as forward, client(forward) as (reader, writer):
        writer.write(b"x")
        await writer.drain()
        await forward.close()
        with pytest.raises(ConnectionError):
            await reader.read()
            raise AssertionError("the connection ended cleanly")


async def test_a_taken_port_is_named() -> None:
    async with forwarder() as forward:
        with pytest.raises(ConfigError, match=f"port {forward.port} of 127.0.0.1 is in use"):
            await Forwarder(LOCALHOST, forward.port).open()
