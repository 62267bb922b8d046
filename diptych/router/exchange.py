"""What the router's core knows of the world: a request, the client that waits for its answer, exchanges with servers.

The core sees nothing but these, so that real sockets (client.py, server.py) and a simulation serve it alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import msgspec

from diptych.errors import UpstreamError
from diptych.router.config import ServerAddress

Headers = list[tuple[bytes, bytes]]  # names in lower case
Body = tuple[bytes | memoryview, ...]  # to be sent one after the other


class ServerLost(UpstreamError):
    """A server could not be reached, or its connection broke before the answer was whole.

    `sent`: the request may have reached it. `gone`: nobody listens at its address. `reused`: the connection had served
    a request before and broke at once, so that it has ended between two requests rather than because of this one.
    """

    def __init__(self, message: str, *, sent: bool, gone: bool = False, reused: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.gone = gone
        self.reused = reused


class ClientRequest(msgspec.Struct, frozen=True):
    """One request as it came. `path` is as sent, with its query; `route` is the path alone."""

    method: str
    path: str
    headers: Headers
    body: bytes = b""

    @property
    def route(self) -> str:
        return self.path.partition("?")[0]

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)


class Client(ABC):
    """Where an answer goes. `send`, or else `start`, any number of `write`s and `finish` or `break_off`.

    When the client goes away, the task that serves it is cancelled; nothing here raises then.
    """

    status: int = 0  # of the answer; 0: nothing of it has been handed over

    @property
    def started(self) -> bool:
        return self.status > 0

    @abstractmethod
    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole answer."""

    @abstractmethod
    def start(self, status: int, headers: Headers) -> None:
        """The head of a streamed answer."""

    @abstractmethod
    def write(self, data: bytes) -> bool:
        """A part of the body. False: the client reads too slowly; await `drain` before the next part."""

    @abstractmethod
    async def drain(self) -> None:
        """Wait until the client takes more."""

    @abstractmethod
    def finish(self) -> None:
        """The body is whole."""

    @abstractmethod
    def break_off(self) -> None:
        """The body cannot be completed: end it so that the client sees that it is not whole."""


class Exchange(ABC):
    """A request that a server has begun to answer. `active` turns True with what arrives; health checks clear it."""

    status: int
    headers: Headers
    active: bool = True

    @abstractmethod
    async def read(self) -> bytes:
        """The next part of the body, b"" at its end. Raises ServerLost if the connection breaks before the end."""

    async def relay(self, client: Client) -> None:
        """Write the rest of the body to `client`, part by part as it comes. Raises ServerLost as `read` does."""
        while part := await self.read():
            if not client.write(part):
                await client.drain()

    @abstractmethod
    def close(self) -> None:
        """End the exchange; whoever reads it gets ServerLost. Unless its body has arrived whole, the server sees the
        connection close. Idempotent.
        """


class Upstream(Protocol):
    """The way to the servers."""

    async def open(
        self, server: ServerAddress, method: str, path: str, headers: Headers, body: Body, *, fresh: bool = False
    ) -> Exchange:
        """Send a request, with `fresh` on a new connection, and wait for the head of its answer. Raises ServerLost, and
        Unavailable when the router is out of sockets. Cancelling closes the connection.
        """


async def read_all(exchange: Exchange, limit: int) -> bytes:
    """The whole body. Raises UpstreamError when it is longer than `limit` bytes, ServerLost when it breaks off."""
    parts: list[bytes] = []
    size = 0
    while part := await exchange.read():
        size += len(part)
        if size > limit:
            raise UpstreamError(f"a server's answer is longer than {limit} bytes; raise --max-payload-size")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
