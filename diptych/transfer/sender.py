"""Prefill's side of the hand-over: one Sender a room, one SendHub a server (rank 0).

    Bootstrapping     until decode has said where the pages go (Reserve)
    WaitingForInput   until the first chunk's pages are handed over
    Transferring      until decode has everything (Done)
    Success, Failed

Prefill and decode get a request independently, so either may be first: what decode says about a room that is not open
here yet is kept for a while, and what became of a room is remembered for a while after its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from diptych.errors import Aborted, BadRequest, TransferError
from diptych.transfer import wire
from diptych.transfer.commands import AnyEvent, Cancel, Send, Sent, TransferFailed
from diptych.transfer.control import Conversation
from diptych.transfer.room import KVPoll, RoomEnd, failure
from diptych.types import Finish, FirstToken

if TYPE_CHECKING:
    from diptych.transfer.send_hub import SendHub


class Sender(RoomEnd):
    """Hands the pages of one request to decode. Created by SendHub.open; the owner reads `state` when on_change calls.

    Pages may be handed over before decode has reserved its own: they wait, and must stay as they are. Once the state is
    Success or Failed the owner may reuse its pages.
    """

    def __init__(self, hub: SendHub, room: int, num_pages: int, on_change: Callable[[int], None]) -> None:
        super().__init__(room, on_change, hub.options)
        self.num_pages = num_pages
        self.prefix_tokens = 0  # that decode has already; their pages are not sent. Known from WaitingForInput on
        self._hub = hub
        self._conversation: Conversation | None = None  # known from Open or Reserve on
        self._epoch = 0
        self._reserved: wire.Reserve | None = None
        self._held: list[tuple[list[int], int]] = []  # chunks handed over before the reservation
        self._num_handed = 0
        self._first: FirstToken | None = None
        self._sent: dict[int, Sent] = {}  # by rank
        self._commanded = False  # the data planes know the room

    # ---- what the engine calls ----

    def send(self, src_pages: Sequence[int], first_page: int) -> None:
        """Hand over pages first_page, first_page + 1, ... of the prompt, each once and in order. Returns at once.

        Does nothing once the room has ended. Raises TransferError for pages out of order.
        """
        if self.ended:
            return
        if first_page != self._num_handed or first_page + len(src_pages) > self.num_pages or self._first is not None:
            raise TransferError(f"pages {first_page}.. handed over after {self._num_handed} of {self.num_pages}")
        self._num_handed += len(src_pages)
        if self._reserved is None:
            self._held.append((list(src_pages), first_page))
        else:
            self._send_pages(self._reserved, list(src_pages), first_page)

    def finish(self, first: FirstToken) -> None:
        """All pages are handed over and this is the first token. Raises TransferError if pages are missing."""
        if self.ended:
            return
        if self._num_handed != self.num_pages:
            raise TransferError(f"finished after {self._num_handed} of {self.num_pages} pages")
        self._first = first
        if self._reserved is not None:
            self._send_last(self._reserved)

    def abort(self, reason: str, code: str = Aborted.code) -> None:
        """Give the room up; decode learns at once."""
        self._fail(failure(reason, code))

    # ---- what the hub calls ----

    def attach(self, conversation: Conversation, epoch: int) -> None:
        """Decode has the request too."""
        self._conversation, self._epoch = conversation, epoch
        self._extend(queued=True)  # until it has pages

    def speaks_with(self, conversation: Conversation, epoch: int | None = None) -> bool:
        return self._conversation is conversation and epoch in (None, self._epoch)

    @property
    def attached(self) -> bool:
        return self._conversation is not None

    def reserve(self, message: wire.Reserve) -> None:
        if self._reserved is not None:
            return
        page_size = self._hub.terms.page_size
        if len(message.pages) != self.num_pages or len(message.generations) != self.num_pages:
            self._fail(
                failure(
                    f"decode reserved {len(message.pages)} pages where the prompt has {self.num_pages}; "
                    "both servers must get the same prompt",
                    BadRequest.code,
                )
            )
            return
        if message.prefix_tokens % page_size or message.prefix_tokens // page_size > self.num_pages:
            self._fail(failure(f"a prefix of {message.prefix_tokens} tokens is no whole pages", TransferError.code))
            return
        self._reserved = message
        self.prefix_tokens = message.prefix_tokens
        self.timing.bootstrap_ms = self._enter(KVPoll.WaitingForInput, queued=True)
        held, self._held = self._held, []
        for src_pages, first_page in held:
            self._send_pages(message, src_pages, first_page)
        if self._first is not None:
            self._send_last(message)

    def handle_event(self, rank: int, event: AnyEvent) -> None:
        if self.ended or event.epoch != self._epoch:
            return
        if isinstance(event, TransferFailed):
            self._fail(failure(event.message, event.code))
        elif isinstance(event, Sent):
            self._sent[rank] = event
            if len(self._sent) == self._hub.num_ranks:
                self._all_sent()

    def done(self) -> None:
        """Decode has everything."""
        if self._first is None:
            self._fail(failure("decode was done before prefill", TransferError.code))
            return
        self.timing.latency_ms = self._enter(KVPoll.Success)
        self._leave(None)

    def fail(self, error: Finish) -> None:
        """The other side, or the link to it, has given the room up."""
        self._fail(error)

    # ---- inside ----

    def _send_pages(self, reserved: wire.Reserve, src_pages: list[int], first_page: int) -> None:
        skipped = max(0, reserved.prefix_tokens // self._hub.terms.page_size - first_page)
        begin, end = first_page + skipped, first_page + len(src_pages)
        if begin >= end:
            return
        self._command(reserved, src_pages[skipped:], reserved.pages[begin:end], reserved.generations[begin:end])

    def _send_last(self, reserved: wire.Reserve) -> None:
        self._command(reserved, [], [], [], last=True)

    def _command(
        self, reserved: wire.Reserve, src: list[int], dst: list[int], generations: list[int], last: bool = False
    ) -> None:
        conversation = self._conversation
        assert conversation is not None
        if self.state == KVPoll.WaitingForInput:
            self._enter(KVPoll.Transferring)
        else:
            self._extend()  # the engine goes on: what is limited is the wait for the next step
        self._commanded = True
        peers, pp_size = conversation.addresses, conversation.pp_size
        self._hub.broadcast(Send(self.room, reserved.epoch, peers, pp_size, src, dst, generations, last=last))

    def _all_sent(self) -> None:
        assert self._conversation is not None and self._first is not None
        frames = [sum(counts) for counts in zip(*(sent.frames for sent in self._sent.values()), strict=True)]
        self.timing.num_bytes = sum(sent.num_bytes for sent in self._sent.values())
        self._extend()
        self._conversation.post(wire.Final(self.room, self._epoch, self._first, frames))

    def _fail(self, error: Finish) -> None:
        if self.ended:
            return
        self.error = error
        self._enter(KVPoll.Failed)
        abort = wire.Abort(self.room, self._epoch, error.message[:1024], error.code)
        if self._conversation is not None:
            self._conversation.post(abort)
        self._leave(abort)

    def _leave(self, abort: wire.Abort | None) -> None:
        if self._commanded:
            self._hub.broadcast(Cancel(self.room, self._epoch))
        self._hub.ended(self, self._epoch if self.attached else None, abort)


class NobodySender(Sender):
    """A Sender to nobody (bootstrap host 2.2.2.2): takes everything and succeeds when finished."""

    def __init__(self, hub: SendHub, room: int, num_pages: int, on_change: Callable[[int], None]) -> None:
        super().__init__(hub, room, num_pages, on_change)
        self._enter(KVPoll.WaitingForInput, queued=True)

    def send(self, src_pages: Sequence[int], first_page: int) -> None:
        return None

    def finish(self, first: FirstToken) -> None:
        if not self.ended:
            self._enter(KVPoll.Success)

    def _fail(self, error: Finish) -> None:
        if not self.ended:
            self.error = error
            self._enter(KVPoll.Failed)
