"""The prefill side: computes a prompt and its first token, and hands both to the decode server of the request's room.

A request waits in `bootstrapping` (no pages yet) until decode has said where its pages are; then the scheduler computes it,
and every finished chunk leaves while the next one runs. After the first token it stays `inflight`, pages held, until
decode has everything.
"""

from __future__ import annotations

import msgspec

from diptych.engine.loop import Engine
from diptych.errors import BadRequest, DiptychError
from diptych.sched.events import ChunkDone, Sampled
from diptych.sched.queue import add, check_request
from diptych.sched.state import Seq
from diptych.transfer.sender import SendHub, Sender
from diptych.transfer.states import KVPoll
from diptych.types import Finish, FirstToken, Request, Stats


class _Handover(msgspec.Struct):
    """One request's way out. `seq` is None until decode has reserved its pages."""

    request: Request
    sender: Sender
    seq: Seq | None = None
    sent_pages: int = 0
    computed: bool = False  # the first token is there; only the transfer is still under way


class PrefillRole:
    """One Sender a request."""

    def __init__(self, engine: Engine, hub: SendHub) -> None:
        self._engine = engine
        self._hub = hub
        self._handovers: dict[str, _Handover] = {}
        engine.role = self

    def admit(self, request: Request, now: float) -> None:
        if request.bootstrap is None:
            raise BadRequest(
                "this is a prefill server: the request needs bootstrap_room (and bootstrap_host); send it through a router",
                param="bootstrap_room",
            )
        # Prefill makes one token whatever was asked: the rest is decode's.
        sampling = msgspec.structs.replace(request.sampling, max_new_tokens=1)
        request = msgspec.structs.replace(request, sampling=sampling)
        check_request(self._engine.state, request)
        num_pages = -(-len(request.prompt) // self._engine.state.config.page_size)
        sender = self._hub.open(request.bootstrap, num_pages)
        self._handovers[request.rid] = _Handover(request, sender)

    def advance(self, now: float) -> None:
        for rid, handover in list(self._handovers.items()):
            state = handover.sender.state
            if state == KVPoll.Failed:
                self._fail(rid, handover)
            elif handover.seq is None and state >= KVPoll.WaitingForInput:
                self._start(rid, handover, now)
            elif handover.computed and state == KVPoll.Success:
                self._complete(rid, handover)

    def _start(self, rid: str, handover: _Handover, now: float) -> None:
        try:
            handover.seq = add(self._engine.state, handover.request, now)
        except DiptychError as error:
            handover.sender.abort(error.message, error.code)
            del self._handovers[rid]
            self._engine.refuse(rid, error)
            return
        handover.sent_pages = handover.sender.prefix_tokens // self._engine.state.config.page_size

    def chunk_done(self, event: ChunkDone) -> None:
        # The first chunk also carries the pages that this server had in its own cache.
        handover = self._handovers.get(event.seq.rid)
        if handover is None or event.last_page <= handover.sent_pages:
            return
        handover.sender.send(event.seq.pages[handover.sent_pages : event.last_page], handover.sent_pages)
        handover.sent_pages = event.last_page

    def finished(self, seq: Seq, event: Sampled) -> bool:
        handover = self._handovers[seq.rid]
        handover.sender.finish(FirstToken(event.token, seq.cached_tokens, event.logprob))
        handover.computed = True
        return False

    def _complete(self, rid: str, handover: _Handover) -> None:
        del self._handovers[rid]
        assert handover.seq is not None
        # Decode decides how the request ends; towards the router this side always ends by length, after one token.
        self._engine.publish_end(handover.seq, Finish("length"))
        self._engine.end(handover.seq, keep=True)

    def _fail(self, rid: str, handover: _Handover) -> None:
        del self._handovers[rid]
        error = handover.sender.error or DiptychError("the hand-over failed")
        finish = Finish("abort", message=error.message, status=error.status, code=error.code)
        if handover.seq is None:
            self._engine.refuse(rid, error)
        elif handover.computed:
            self._engine.publish_end(handover.seq, finish)
            self._engine.end(handover.seq, keep=True)
        else:
            self._engine.end_early(rid, finish)

    def abort(self, rid: str, finish: Finish) -> bool:
        handover = self._handovers.pop(rid, None)
        if handover is None:
            return False
        handover.sender.abort(finish.message, finish.code)
        if handover.computed and handover.seq is not None:
            # The scheduler has finished with it: only the hand-over held its pages.
            self._engine.publish_end(handover.seq, finish)
            self._engine.end(handover.seq, keep=True)
            return False
        return True

    def held(self) -> list[str]:
        return list(self._handovers)

    def add_stats(self, report: Stats) -> None:
        report.num_prefill_bootstrap_queue_reqs = sum(h.seq is None for h in self._handovers.values())
        report.num_prefill_inflight_queue_reqs = sum(h.computed for h in self._handovers.values())
        self._hub.add_stats(report)
