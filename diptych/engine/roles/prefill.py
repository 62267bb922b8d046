"""The prefill side: computes a prompt and its first token, and hands both to the decode server of the request's room.

A request waits in the bootstrap queue (no pages yet) until decode has said where its pages are; then the scheduler
computes it, and every finished chunk leaves while the next one runs. After the first token it stays in flight, pages
held, until decode has everything.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from diptych.engine.requests import Requests
from diptych.engine.roles.figures import HandoverFigures
from diptych.errors import BadRequest
from diptych.sched.events import ChunkDone, Sampled
from diptych.sched.queue import add, check_request
from diptych.sched.state import Seq
from diptych.transfer.incoming import Counters
from diptych.transfer.room import KVPoll
from diptych.transfer.send_hub import SendHub
from diptych.transfer.sender import Sender
from diptych.types import FAKE_BOOTSTRAP_HOST, Finish, FirstToken, Request, Stats


class _Handover(msgspec.Struct):
    """One request's way out. `seq` is None until decode has reserved its pages."""

    request: Request
    sender: Sender
    seq: Seq | None = None
    computed: bool = False  # the first token is there; only the transfer is still under way


class PrefillRole:
    """One Sender a request."""

    retracts = False  # pages that are being sent must stay as they are

    def __init__(self, requests: Requests, hub: SendHub, counters: Callable[[], Counters]) -> None:
        self._requests = requests
        self._hub = hub
        self._figures = HandoverFigures(counters)
        self._handovers: dict[str, _Handover] = {}
        requests.role = self

    def admit(self, request: Request, now: float) -> None:
        if request.bootstrap is None:
            raise BadRequest(
                "this is a prefill server: a request needs bootstrap_host and bootstrap_room; send it through a router",
                param="bootstrap_room",
            )
        # Prefill makes one token whatever was asked: the rest is decode's.
        sampling = msgspec.structs.replace(request.sampling, max_new_tokens=1)
        request = msgspec.structs.replace(request, sampling=sampling)
        check_request(self._requests.state, request, self._num_bootstrapping())
        bootstrap = request.bootstrap
        assert bootstrap is not None
        num_pages = -(-len(request.prompt) // self._requests.state.config.page_size)
        sender = self._hub.open(bootstrap.room, num_pages, nobody=bootstrap.host == FAKE_BOOTSTRAP_HOST)
        self._handovers[request.rid] = _Handover(request, sender)

    def advance(self, now: float) -> None:
        for rid, handover in list(self._handovers.items()):
            state = handover.sender.state
            if state == KVPoll.Failed:
                self._lose(rid, handover)
            elif handover.seq is None and state >= KVPoll.WaitingForInput:
                handover.seq = add(self._requests.state, handover.request, now)
            elif handover.computed and handover.seq is not None and state == KVPoll.Success:
                del self._handovers[rid]
                self._figures.succeeded(handover.sender.timing)
                # How the request ends is decode's to say; this side's answer always ends by length, after one token.
                self._requests.publish_end(handover.seq, Finish("length"))
                self._requests.end(handover.seq, keep=True)

    def chunk_done(self, event: ChunkDone) -> None:
        handover = self._handovers.get(event.seq.rid)
        if handover is not None:
            handover.sender.send(event.seq.pages[event.first_page : event.last_page], event.first_page)

    def finished(self, seq: Seq, event: Sampled) -> bool:
        handover = self._handovers[seq.rid]
        handover.sender.finish(FirstToken(event.token, seq.cached_tokens, event.logprob))
        handover.computed = True
        return False

    def _lose(self, rid: str, handover: _Handover) -> None:
        """The hand-over failed: the request ends here with its reason."""
        del self._handovers[rid]
        finish = self._figures.lost(handover.sender.error, met=handover.seq is not None)
        if handover.seq is None:
            self._requests.refuse(rid, finish)
        elif handover.computed:
            self._requests.publish_end(handover.seq, finish)
            self._requests.end(handover.seq, keep=True)
        else:
            self._requests.end_early(rid, finish)

    def abort(self, rid: str, finish: Finish) -> bool:
        handover = self._handovers.pop(rid, None)
        if handover is None:
            return False
        handover.sender.abort(finish.message, finish.code)
        if handover.computed and handover.seq is not None:
            # The scheduler has finished with it: only the hand-over held its pages.
            self._requests.publish_end(handover.seq, finish)
            self._requests.end(handover.seq, keep=True)
            return False
        return True

    def held(self) -> list[str]:
        return list(self._handovers)

    def _num_bootstrapping(self) -> int:
        return sum(handover.seq is None for handover in self._handovers.values())

    def add_stats(self, report: Stats) -> None:
        report.num_prefill_bootstrap_queue_reqs = self._num_bootstrapping()
        report.num_prefill_inflight_queue_reqs = sum(h.computed for h in self._handovers.values())
        self._figures.add_to(report)
