"""What a way to reach another process must offer. Every transport passes tests/transfer/test_link_conformance.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from diptych.errors import TransferError

if TYPE_CHECKING:
    from diptych.kv.store import Lending, PageStore


class LinkClosed(TransferError):
    """The link is broken or was closed; from now on every call on it raises this."""


class Link(Protocol):
    """Two-way, ordered, reliable, made of messages: a header and, if wanted, a payload.

    `send` returns when the transport has taken the message over (the payload may then be reused) and waits while the
    other side does not keep up. Sends of several tasks take turns, message by message. If a `send` is cancelled
    half-way, the link is closed, since the other side has half a message.
    `recv` is for one task at a time. Its payload is valid until the next `recv` or `close`, and may be memory that the
    sender owns. A cancelled `recv` loses nothing.
    Both raise LinkClosed once the link is closed from either side, and ProtocolError (closing the link) for what is
    beyond the limits or no message at all. Messages already sent when one side closes may be lost.
    """

    max_header_bytes: int  # what this side accepts; small until the peer has proved itself (diptych/transfer/auth.py)
    max_payload_bytes: int

    async def send(self, header: bytes, payload: memoryview | None = None) -> None: ...

    async def recv(self) -> tuple[bytes, memoryview]: ...

    def close(self) -> None:
        """Give everything back at once: sockets, memory, tasks. Calling it again does nothing."""


class Listener(Protocol):
    address: str  # `<scheme>://...`, what `connect` takes

    def close(self) -> None:
        """Accept no more. Links already made stay."""


class Transport(Protocol):
    scheme: str

    async def listen(self, host: str, on_link: Callable[[Link], None]) -> Listener:
        """Accept links; the kernel chooses the port. `on_link` owns each link. Raises ConfigError."""

    async def connect(self, address: str, timeout_s: float) -> Link:
        """Open a link. Raises LinkClosed if nobody is there or it takes longer than `timeout_s`."""

    def lending(self, store: PageStore) -> Lending | None:
        """None: pages travel over the links. Otherwise only messages do, and the side that listens copies pages out of
        the caller's pool. Raises ConfigError if that cannot be done with this store."""
