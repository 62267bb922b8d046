"""A Service on this machine: TCP connections to an address are passed on, in turn, to the ready pods behind it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Sequence

from diptych.errors import ConfigError
from diptych.net import BACKLOG

CONNECT_TIMEOUT_S = 5.0
CHUNK_BYTES = 256 * 1024
Address = tuple[str, int]


class Forwarder:
    """Listens on one address from `open` to `close`. Connections that find no target are reset.

    Bytes are passed on unchanged, each direction ends on its own (half-close), and a slow reader slows its writer.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._targets: tuple[Address, ...] = ()
        self._turn = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Raises ConfigError that names the port if it is taken. Port 0: the kernel chooses, `port` tells."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self.host, self.port))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
            raise ConfigError(f"port {self.port} of {self.host} {reason}") from None
        sock.setblocking(False)
        self.port = sock.getsockname()[1]
        self._server = await asyncio.start_server(self._accept, sock=sock, limit=CHUNK_BYTES, backlog=BACKLOG)

    def set_targets(self, targets: Sequence[Address]) -> None:
        """Where new connections go. Those that exist stay where they are."""
        self._targets = tuple(targets)

    async def close(self) -> None:
        """Stops listening and cuts what is still connected."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        target: asyncio.StreamWriter | None = None
        try:
            target_reader, target = await self._connect()
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(_pump(reader, target))
                pumps.create_task(_pump(target_reader, writer))
            await _close(target)
            await _close(writer)
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            # One side broke: break the other too. A clean end here would pass a cut answer off as a whole one.
            _reset(writer)
            if target is not None:
                _reset(target)
        finally:
            self._connections.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the next target that takes one. Raises OSError when none does."""
        targets = self._targets
        for _ in targets:
            host, port = targets[self._turn % len(targets)]
            self._turn += 1
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    return await asyncio.open_connection(host, port, limit=CHUNK_BYTES)
        raise ConnectionRefusedError("no pod of the service takes connections")


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes from `reader` to `writer` until the end, which is passed on too."""
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection so that the peer sees an error rather than an end."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
