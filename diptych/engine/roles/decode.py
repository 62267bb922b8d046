"""The decode side: reserves pages for a prompt, has them filled by the prefill server of the room, and goes on from there.

Queues in order of a request's life: `prealloc` (shaking hands, then waiting for free pages, first come first served),
`transfer` (pages reserved, being filled), then the scheduler's running batch. A request without a bootstrap is computed here.
"""

from __future__ import annotations

import msgspec

from diptych.engine.loop import Engine
from diptych.errors import DiptychError
from diptych.sched.events import ChunkDone, Sampled
from diptych.sched.queue import add, check_request, join, reserve
from diptych.sched.state import Seq
from diptych.transfer.receiver import Receiver, ReceiveHub
from diptych.transfer.states import KVPoll
from diptych.types import Finish, Request, Stats


class _Arrival(msgspec.Struct):
    """One request's way in. `seq` is None until its pages are reserved."""

    request: Request
    receiver: Receiver
    seq: Seq | None = None


class DecodeRole:
    """One Receiver a request."""

    def __init__(self, engine: Engine, hub: ReceiveHub) -> None:
        self._engine = engine
        self._hub = hub
        self._prealloc: dict[str, _Arrival] = {}
        self._transfer: dict[str, _Arrival] = {}
        engine.role = self

    def admit(self, request: Request, now: float) -> None:
        if request.bootstrap is None:
            add(self._engine.state, request, now)
            return
        check_request(self._engine.state, request)
        self._prealloc[request.rid] = _Arrival(request, self._hub.open(request.bootstrap))

    def advance(self, now: float) -> None:
        self._advance_prealloc(now)
        self._advance_transfer(now)

    def _advance_prealloc(self, now: float) -> None:
        full = False
        for rid, arrival in list(self._prealloc.items()):
            receiver = arrival.receiver
            if receiver.state == KVPoll.Failed:
                del self._prealloc[rid]
                self._engine.refuse(rid, receiver.error or DiptychError("the hand-over failed"))
            elif receiver.state == KVPoll.WaitingForInput and not full:
                seq = reserve(self._engine.state, arrival.request, now)
                if seq is None:
                    full = True  # first come first served: nobody overtakes a request that waits for memory
                    continue
                del self._prealloc[rid]
                self._transfer[rid] = arrival
                arrival.seq = seq
                self._tell_pages(seq, receiver)

    def _tell_pages(self, seq: Seq, receiver: Receiver) -> None:
        pool = self._engine.state.pool
        pages = seq.pages[seq.prefix_tokens // pool.page_size :]
        receiver.reserve(pages, [pool.generation[page] for page in pages], seq.prefix_tokens)

    def _advance_transfer(self, now: float) -> None:
        for rid, arrival in list(self._transfer.items()):
            state, seq = arrival.receiver.state, arrival.seq
            if state == KVPoll.Success and seq is not None and arrival.receiver.first is not None:
                del self._transfer[rid]
                for event in join(self._engine.state, seq, arrival.receiver.first, now):
                    self._engine.on_event(event)
            elif state == KVPoll.Failed:
                del self._transfer[rid]
                error = arrival.receiver.error or DiptychError("the hand-over failed")
                self._engine.end_early(
                    rid, Finish("abort", message=error.message, status=error.status, code=error.code)
                )

    def chunk_done(self, event: ChunkDone) -> None:
        pass

    def finished(self, seq: Seq, event: Sampled) -> bool:
        return True

    def abort(self, rid: str, finish: Finish) -> bool:
        arrival = self._prealloc.pop(rid, None) or self._transfer.pop(rid, None)
        if arrival is None:
            return False
        arrival.receiver.abort(finish.message, finish.code)
        return True

    def held(self) -> list[str]:
        return [*self._prealloc, *self._transfer]

    def add_stats(self, report: Stats) -> None:
        report.num_decode_prealloc_queue_reqs = len(self._prealloc)
        report.num_decode_transfer_queue_reqs = len(self._transfer)
        self._hub.add_stats(report)
