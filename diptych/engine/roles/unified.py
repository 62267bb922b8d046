"""Both phases on one server: requests go straight to the scheduler and end when their last token is there."""

from __future__ import annotations

from diptych.engine.requests import Requests
from diptych.sched.events import ChunkDone, Sampled
from diptych.sched.queue import add, check_request
from diptych.sched.state import Seq
from diptych.types import Finish, Request, Stats


class UnifiedRole:
    """Nothing is handed over."""

    retracts = True

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        requests.role = self

    def admit(self, request: Request, now: float) -> None:
        check_request(self._requests.state, request)
        add(self._requests.state, request, now)

    def advance(self, now: float) -> None:
        pass

    def chunk_done(self, event: ChunkDone) -> None:
        pass

    def finished(self, seq: Seq, event: Sampled) -> bool:
        return True

    def abort(self, rid: str, finish: Finish) -> bool:
        return False

    def held(self) -> list[str]:
        return []

    def add_stats(self, report: Stats) -> None:
        pass
