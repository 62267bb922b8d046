"""What rank 0's hubs tell every rank's data plane, and what the data planes answer.

Rank 0 relays commands to the other ranks over the engine's own channel, in order, and before any plan that reuses pages
of a cancelled room. Events come back the same way.
"""

from __future__ import annotations

import msgspec


class Command(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of commands."""


class Connect(Command, frozen=True):
    """prefill: open the data links to a decode server now, so that its first request does not wait for them."""

    peers: list[list[str]]  # addresses of each decode rank
    pp_size: int  # stages of the decode server


class Send(Command, frozen=True):
    """prefill: src_pages[i] of this rank's pool goes into dst_pages[i] of each decode rank's, in slices of kv heads
    and layers.

    A room's commands are carried out in order; `last` (with or without pages) makes the rank answer Sent.
    """

    room: int
    epoch: int
    peers: list[list[str]]
    pp_size: int
    src_pages: list[int]
    dst_pages: list[int]
    generations: list[int]
    last: bool = False


class Expect(Command, frozen=True):
    """decode: take frames for these pages of this room, each head of each layer exactly once. Answered by Expecting."""

    room: int
    epoch: int
    pages: list[int]
    generations: list[int]


class Cancel(Command, frozen=True):
    """Either side: forget the room. Once answered by Cancelled, no page of it is read or written any more."""

    room: int
    epoch: int


AnyCommand = Connect | Send | Expect | Cancel


class Event(msgspec.Struct, frozen=True, array_like=True, tag=True):
    room: int
    epoch: int


class Expecting(Event, frozen=True):
    """decode: frames will be taken from now on."""


class Received(Event, frozen=True):
    """decode: all that was expected is in the store. The room is forgotten; nothing writes to its pages any more."""

    frames: int
    num_bytes: int


class Sent(Event, frozen=True):
    """prefill: all frames were handed to links."""

    frames: list[int]  # to each decode rank
    num_bytes: int


class TransferFailed(Event, frozen=True):
    message: str
    code: str


class Cancelled(Event, frozen=True):
    pass


AnyEvent = Expecting | Received | Sent | TransferFailed | Cancelled
