"""What a prefill server, a decode server and a server of both phases do differently: the hooks of a role."""

from __future__ import annotations

from typing import Protocol

from diptych.sched.events import ChunkDone, Sampled
from diptych.sched.state import Seq
from diptych.types import Finish, Request, Stats


class Role(Protocol):
    """Called by the engine's loop, between steps."""

    retracts: bool  # running sequences may lose their pages at any time between two steps

    def admit(self, request: Request, now: float) -> None:
        """A new request. Raises DiptychError if it cannot be served; nothing is held then."""

    def advance(self, now: float) -> None:
        """Between steps: move hand-overs on."""

    def chunk_done(self, event: ChunkDone) -> None:
        """Some of a prompt's pages were filled."""

    def finished(self, seq: Seq, event: Sampled) -> bool:
        """The sequence has its last token. False: the role publishes the end and releases the pages later."""

    def abort(self, rid: str, finish: Finish) -> bool:
        """Forget a request that the role holds, and tell the other side. True if its end is still to be published."""

    def held(self) -> list[str]:
        """Requests that the role knows, in its queues or in a hand-over."""

    def add_stats(self, report: Stats) -> None:
        """Fill in the role's part of the report."""
