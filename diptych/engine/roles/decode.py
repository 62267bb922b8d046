"""The decode side: reserves pages for a prompt, has prefill fill them, and goes on from there.

Queues in order of a request's life: `prealloc` (shaking hands, then waiting for free pages), `transfer` (pages
reserved, being filled), then the scheduler's running batch. A room that failed is `draining` until no rank can write to
its pages any more; its request is forgotten at once. A request without a bootstrap is computed here from the start.
Between the two kinds it is first come first served, from the moment in which the two servers have met.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from diptych.engine.requests import Requests
from diptych.engine.roles.figures import HandoverFigures
from diptych.sched.events import ChunkDone, Sampled
from diptych.sched.queue import (
    abort,
    add,
    check_request,
    join,
    leave_to_writer,
    release,
    reserve,
    writer_stopped,
)
from diptych.sched.state import Seq
from diptych.transfer.incoming import Counters
from diptych.transfer.receive_hub import ReceiveHub
from diptych.transfer.receiver import NobodyReceiver, Receiver
from diptych.transfer.room import KVPoll
from diptych.types import Finish, Request, Stats


class _Asking(msgspec.Struct):
    """One request without pages."""

    request: Request
    receiver: Receiver
    arrival_at: float


class _Arrival(msgspec.Struct):
    """One request with its pages reserved."""

    seq: Seq
    receiver: Receiver


class DecodeRole:
    """One Receiver a request."""

    retracts = True

    def __init__(self, requests: Requests, hub: ReceiveHub, counters: Callable[[], Counters]) -> None:
        self._requests = requests
        self._hub = hub
        self._figures = HandoverFigures(counters)
        self._prealloc: dict[str, _Asking] = {}
        self._transfer: dict[str, _Arrival] = {}
        self._draining: list[Receiver] = []
        requests.role = self

    def admit(self, request: Request, now: float) -> None:
        check_request(self._requests.state, request, len(self._prealloc))
        if request.bootstrap is None:
            add(self._requests.state, request, now)
            return
        receiver = self._hub.open(request.bootstrap)
        if isinstance(receiver, NobodyReceiver):  # pages that nobody fills must not pass for a prefix of others
            request = msgspec.structs.replace(request, namespace=f"\0nobody\0{request.rid}")
        self._prealloc[request.rid] = _Asking(request, receiver, now)

    def advance(self, now: float) -> None:
        for receiver in [receiver for receiver in self._draining if receiver.drained]:
            self._draining.remove(receiver)
            writer_stopped(self._requests.state, receiver.room)
        self._advance_transfer(now)
        self._advance_prealloc()

    def _advance_transfer(self, now: float) -> None:
        for rid, arrival in list(self._transfer.items()):
            receiver = arrival.receiver
            if receiver.state == KVPoll.Success and receiver.first is not None:
                del self._transfer[rid]
                self._figures.succeeded(receiver.timing)
                for event in join(self._requests.state, arrival.seq, receiver.first, now):
                    self._requests.on_event(event)
            elif receiver.state == KVPoll.Failed:
                self._give_up(rid, self._figures.lost(receiver.error, met=True), now)

    def _advance_prealloc(self) -> None:
        state = self._requests.state
        state.reserving_since = math.inf
        for rid, asking in list(self._prealloc.items()):
            receiver = asking.receiver
            if receiver.state == KVPoll.Failed:
                del self._prealloc[rid]
                self._requests.refuse(rid, self._figures.lost(receiver.error, met=False))
            elif receiver.state == KVPoll.WaitingForInput and state.reserving_since == math.inf:
                seq = reserve(state, asking.request, asking.arrival_at)
                if seq is None:
                    state.reserving_since = asking.arrival_at  # nobody overtakes a request that waits for memory
                    continue
                del self._prealloc[rid]
                self._transfer[rid] = _Arrival(seq, receiver)
                generation = state.pool.generation
                receiver.reserve(seq.pages, [generation[page] for page in seq.pages], seq.prefix_tokens)

    def _give_up(self, rid: str, finish: Finish, now: float) -> None:
        """A reserved request ends without its KV. Its pages come back when nobody can write to them any more."""
        arrival = self._transfer.pop(rid)
        abort(self._requests.state, rid, now)
        self._requests.publish_end(arrival.seq, finish)
        self._requests.forget(rid)
        if arrival.receiver.drained:
            release(self._requests.state, arrival.seq, keep=False)
        else:
            leave_to_writer(self._requests.state, arrival.seq)
            self._draining.append(arrival.receiver)

    def chunk_done(self, event: ChunkDone) -> None:
        """Pages computed here stay here."""

    def finished(self, seq: Seq, event: Sampled) -> bool:
        return True

    def abort(self, rid: str, finish: Finish) -> bool:
        waiting = self._prealloc.pop(rid, None)
        if waiting is not None:
            waiting.receiver.abort(finish.message, finish.code)
            return True
        if rid in self._transfer:
            self._transfer[rid].receiver.abort(finish.message, finish.code)
            self._give_up(rid, finish, self._requests.now())
        return False

    def held(self) -> list[str]:
        return [*self._prealloc, *self._transfer]

    def add_stats(self, report: Stats) -> None:
        report.num_decode_prealloc_queue_reqs = len(self._prealloc)
        report.num_decode_transfer_queue_reqs = len(self._transfer)
        self._figures.add_to(report)
