"""Decode's side of the hand-over: one Receiver a room.

    Bootstrapping     until the prefill server is connected and fits
    WaitingForInput   until this server has reserved pages
    Transferring      until every rank has all pages, whole, and the first token is here
    Success, Failed

Whatever ends a room ends it on both servers; only the pages' writers may outlive it, and are waited for (`drained`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diptych.errors import Aborted, BadRequest, ProtocolError, TransferError
from diptych.transfer import wire
from diptych.transfer.commands import AnyEvent, Cancel, Cancelled, Expect, Expecting, Received, TransferFailed
from diptych.transfer.room import KVPoll, RoomEnd, failure
from diptych.types import Finish, FirstToken, TokenLogprob

if TYPE_CHECKING:
    from diptych.transfer.peer import Peer
    from diptych.transfer.receive_hub import ReceiveHub


class Receiver(RoomEnd):
    """Gets the pages of one request from prefill. Created by ReceiveHub.open; read `state` when on_change calls.

    The pages reserved must not be reused before `drained`, even when the room has failed: until then a rank may write.
    """

    def __init__(self, hub: ReceiveHub, peer: Peer | None, room: int, epoch: int) -> None:
        super().__init__(room, hub.on_change, hub.options)
        self.first: FirstToken | None = None  # with Success
        self._hub = hub
        self._peer = peer
        self._epoch = epoch
        self._reserve: wire.Reserve | None = None
        self._expecting: set[int] = set()  # ranks that take frames
        self._writers: set[int] = set()  # ranks that may write to the pages
        self._received: dict[int, Received] = {}  # by rank
        self._final: wire.Final | None = None

    @property
    def drained(self) -> bool:
        """No rank writes to the reserved pages any more. Follows the end of the room; on_change calls then too."""
        return not self._writers

    # ---- what the engine calls ----

    def reserve(self, pages: Sequence[int], generations: Sequence[int], prefix_tokens: int = 0) -> None:
        """pages[i] is for page i of the prompt; the first `prefix_tokens` tokens (whole pages) are there already.

        Does nothing once the room has ended. Raises TransferError if called twice, with a page twice or a wrong prefix.
        More pages than a message may name fail the room: prefill would hang up on all rooms.
        """
        if self.ended:
            return
        if len(pages) > wire.MAX_PAGES:
            message = f"the prompt has {len(pages)} pages, and {wire.MAX_PAGES} can be handed over; raise --page-size"
            self._fail(failure(message, BadRequest.code, BadRequest.status))
            return
        num_prefix = prefix_tokens // self._hub.terms.page_size
        once = len(set(pages)) == len(pages) == len(generations)
        whole = prefix_tokens % self._hub.terms.page_size == 0 and num_prefix <= len(pages)
        if self._reserve is not None or not once or not whole:
            raise TransferError(f"cannot reserve {len(pages)} pages with a prefix of {prefix_tokens} tokens")
        self._reserve = wire.Reserve(self.room, self._epoch, list(pages), list(generations), prefix_tokens)
        if self.state == KVPoll.WaitingForInput:
            self._expect(self._reserve)

    def abort(self, reason: str, code: str = Aborted.code) -> None:
        """Give the room up; prefill learns at once."""
        self._fail(failure(reason, code))

    # ---- what the peer and the hub call ----

    def meet(self) -> None:
        """The prefill server is connected."""
        if self.state != KVPoll.Bootstrapping:
            return
        self._post(wire.Open(self.room, self._epoch))
        self.timing.bootstrap_ms = self._enter(KVPoll.WaitingForInput, queued=True)
        if self._reserve is not None:
            self._expect(self._reserve)

    def on_final(self, message: wire.Final) -> None:
        if message.epoch != self._epoch or self._final is not None:
            return
        if self.state != KVPoll.Transferring or len(message.frames) != self._hub.num_ranks:
            self._fail(failure("the prefill server ended a transfer that had not begun", ProtocolError.code))
            return
        self._final = message
        self._check_complete()

    def on_abort(self, message: wire.Abort) -> None:
        if message.epoch == self._epoch:
            self._fail(failure(message.message, message.code), tell=False)

    def handle_event(self, rank: int, event: AnyEvent) -> None:
        if event.epoch != self._epoch:
            return
        match event:
            case Expecting():
                self._on_expecting(rank)
            case Received():
                self._received[rank] = event
                self._on_drained(rank)
                self._check_complete()
            case TransferFailed():
                self._fail(failure(event.message, event.code))
            case Cancelled():
                self._on_drained(rank)

    def fail(self, error: Finish) -> None:
        """The prefill server cannot be reached, does not fit, or is lost."""
        self._fail(error)

    # ---- inside ----

    def _expect(self, reserve: wire.Reserve) -> None:
        """Have every rank ready before prefill learns where the pages are."""
        # Prefill's queue lies before the first page. Prefill is the one that sees whether a transfer gets on.
        self.timing.alloc_ms = self._enter(KVPoll.Transferring, queued=True)
        skipped = reserve.prefix_tokens // self._hub.terms.page_size
        self._writers = set(range(self._hub.num_ranks))
        self._hub.broadcast(Expect(self.room, self._epoch, reserve.pages[skipped:], reserve.generations[skipped:]))

    def _on_expecting(self, rank: int) -> None:
        self._expecting.add(rank)
        if len(self._expecting) == self._hub.num_ranks and self._reserve is not None and not self.ended:
            self._post(self._reserve)

    def _on_drained(self, rank: int) -> None:
        self._writers.discard(rank)
        if self.drained and self.ended:
            self._leave()
            self._changed()

    def _check_complete(self) -> None:
        if self.ended or self._final is None or len(self._received) < self._hub.num_ranks:
            return
        frames = [self._received[rank].frames for rank in range(self._hub.num_ranks)]
        if frames != self._final.frames:
            message = f"KV corruption: {self._final.frames} frames were sent, {frames} received"
            self._fail(failure(message, "kv_transfer_corruption"))
            return
        self.first = self._final.first
        self.timing.num_bytes = sum(received.num_bytes for received in self._received.values())
        self.timing.latency_ms = self._enter(KVPoll.Success)
        self._post(wire.Done(self.room, self._epoch))
        self._leave()

    def _fail(self, error: Finish, tell: bool = True) -> None:
        if self.ended:
            return
        self.error = error
        self._enter(KVPoll.Failed)
        if tell:
            self._post(wire.Abort(self.room, self._epoch, error.message[:1024], error.code))
        if self._writers:
            self._hub.broadcast(Cancel(self.room, self._epoch))
        self._leave()

    def _leave(self) -> None:
        """The peer has nothing more to say to an ended room; the hub knows it until it is drained."""
        if self._peer is not None:
            self._peer.leave(self)
        if self.drained:
            self._hub.forget(self)

    def _post(self, message: wire.Message) -> None:
        if self._peer is not None:
            self._peer.post(message)


class NobodyReceiver(Receiver):
    """A Receiver of nothing (bootstrap host 2.2.2.2, or the fake backend): succeeds as soon as pages are reserved.

    The first token follows from the room number alone.
    """

    def __init__(self, hub: ReceiveHub, room: int, vocab_size: int) -> None:
        super().__init__(hub, None, room, 0)
        digest = hashlib.sha256(room.to_bytes(8, "big")).digest()
        self._token = int.from_bytes(digest[:8], "big") % vocab_size
        self._enter(KVPoll.WaitingForInput, queued=True)

    def reserve(self, pages: Sequence[int], generations: Sequence[int], prefix_tokens: int = 0) -> None:
        if not self.ended:
            self.first = FirstToken(self._token, 0, TokenLogprob(None, self._token))
            self._enter(KVPoll.Success)

    def _fail(self, error: Finish, tell: bool = True) -> None:
        if not self.ended:
            self.error = error
            self._enter(KVPoll.Failed)
