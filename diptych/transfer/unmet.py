"""Rooms of a prefill server in which nobody waits on its side: the request has not come yet, or is over.

What becomes of a room depends on who was first:

    who was first                              what becomes of it
    decode opens the room, the request comes   the Sender starts with what decode has said so far
    decode opens it, no request comes          decode is told so after the bootstrap timeout
    decode gives it up, the request comes      the request fails with decode's reason
    the request is over, decode opens it       decode is told why, if it failed
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from diptych.errors import DeadlineExceeded, Overloaded
from diptych.transfer import wire
from diptych.transfer.control import Conversation

MAX_EARLY = 8192  # rooms that decode knows and prefill does not (yet)
MAX_REMEMBERED = 16384  # rooms that are over


@dataclass
class Early:
    """A room that decode opened first."""

    conversation: Conversation
    epoch: int
    deadline: asyncio.TimerHandle
    reserve: wire.Reserve | None = None

    def is_of(self, conversation: Conversation, epoch: int) -> bool:
        return self.conversation is conversation and self.epoch == epoch


@dataclass
class _Over:
    """A room that is over, remembered for what may still be said about it."""

    at: float
    epoch: int | None  # None: decode had not been heard of
    abort: wire.Abort | None  # None: it succeeded
    given_up: bool = False  # by decode, before its request reached us


class Unmet:
    """`timeout_s`: how long the other half of a request may take to come. `len` counts what decode waits in."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._early: dict[int, Early] = {}
        self._over: OrderedDict[int, _Over] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._early)

    def take(self, room: int) -> Early | wire.Abort | None:
        """The request has come: what decode has said before, that it gave the room up, or None. Forgets the room."""
        over = self._over.pop(room, None)
        early = self._early.pop(room, None)
        if early is not None:
            early.deadline.cancel()
            return early
        return over.abort if over is not None and over.given_up else None

    def close(self) -> None:
        for early in self._early.values():
            early.deadline.cancel()
        self._early.clear()
        self._over.clear()

    # ---- what is said of such a room ----

    def open(self, conversation: Conversation, room: int, epoch: int) -> None:
        """Decode has the request. Opening a room again changes nothing."""
        over = self._over.get(room)
        if over is not None and over.epoch in (epoch, None):
            if over.abort is not None:
                refuse(conversation, room, epoch, over.abort.message, over.abort.code)
        elif room not in self._early and len(self._early) >= MAX_EARLY:
            message = "too many rooms wait for requests that have not reached the prefill server"
            refuse(conversation, room, epoch, message, Overloaded.code)
        elif room not in self._early:
            deadline = asyncio.get_running_loop().call_later(self._timeout_s, self._expire, room)
            self._early[room] = Early(conversation, epoch, deadline)

    def reserve(self, conversation: Conversation, message: wire.Reserve) -> None:
        """Decode has pages for it."""
        early = self._early.get(message.room)
        if early is not None and early.is_of(conversation, message.epoch):
            early.reserve = message

    def give_up(self, conversation: Conversation, message: wire.Abort) -> None:
        """Decode does not wait any more."""
        early = self._early.get(message.room)
        if early is not None:
            if not early.is_of(conversation, message.epoch):
                return
            self._drop(message.room)
        if message.room not in self._over:
            self._remember(message.room, message.epoch, message, given_up=True)

    def end(self, room: int, epoch: int | None, abort: wire.Abort | None) -> None:
        """The request is over. `epoch` None: decode has not been heard of; `abort` None: it succeeded."""
        self._remember(room, epoch, abort)

    def lose(self, conversation: Conversation) -> None:
        """The decode server is gone."""
        for room in [room for room, early in self._early.items() if early.conversation is conversation]:
            self._drop(room)

    # ---- inside ----

    def _drop(self, room: int) -> None:
        self._early.pop(room).deadline.cancel()

    def _expire(self, room: int) -> None:
        early = self._early.pop(room)
        message = f"the prefill server got no request for the room within {self._timeout_s:g} s"
        refuse(early.conversation, room, early.epoch, message, DeadlineExceeded.code)

    def _remember(self, room: int, epoch: int | None, abort: wire.Abort | None, *, given_up: bool = False) -> None:
        """Long enough for the other half of the request to arrive, if it ever does."""
        now = asyncio.get_running_loop().time()
        self._over[room] = _Over(now, epoch, abort, given_up)
        self._over.move_to_end(room)
        while self._over:
            oldest_room, oldest = next(iter(self._over.items()))
            if oldest.at + self._timeout_s > now and len(self._over) <= MAX_REMEMBERED:
                break
            del self._over[oldest_room]


def refuse(conversation: Conversation, room: int, epoch: int, message: str, code: str) -> None:
    """Tell decode that nothing will come of a room."""
    conversation.post(wire.Abort(room, epoch, message, code))
