"""What a hand-over cost, for Stats: timings since the last report, and what the data plane has counted."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from diptych.errors import Aborted, ClientGone, RoomInUse, TransferError
from diptych.transfer.incoming import Counters
from diptych.transfer.room import Timing, failure
from diptych.types import Finish, Stats


class HandoverFigures:
    """`counters`: what the data planes have counted so far."""

    def __init__(self, counters: Callable[[], Counters]) -> None:
        self._counters = counters
        self._timings: list[Timing] = []
        self._bootstrap_failures = 0
        self._transfer_failures = 0

    def succeeded(self, timing: Timing) -> None:
        self._timings.append(timing)

    def lost(self, error: Finish | None, *, met: bool) -> Finish:
        """How the request of a room that failed ends. `met`: the two servers had found each other before.

        What somebody asked for on the other side is so here too, and no failure: an abort, a room that was taken; nor
        is a client that left.
        """
        finish = error or failure("the hand-over between prefill and decode failed", TransferError.code)
        for kind in (Aborted, RoomInUse):
            if finish.code == kind.code:
                return msgspec.structs.replace(finish, status=kind.status)
        if finish.code != ClientGone.code:
            self._transfer_failures += met
            self._bootstrap_failures += not met
        return finish

    def add_to(self, report: Stats) -> None:
        """Fill in the hand-over's part; timings are handed out once."""
        timings, self._timings = self._timings, []
        moved = self._counters()
        report.num_bootstrap_failed_reqs_total = self._bootstrap_failures
        report.num_transfer_failed_reqs_total = self._transfer_failures
        report.kv_pages_sent_total = moved.pages_sent
        report.kv_pages_received_total = moved.pages_received
        report.kv_bytes_sent_total = moved.bytes_sent
        report.kv_bytes_received_total = moved.bytes_received
        report.kv_transfer_bootstrap_ms = [t.bootstrap_ms for t in timings]
        report.kv_transfer_alloc_ms = [t.alloc_ms for t in timings]
        report.kv_transfer_latency_ms = [t.latency_ms for t in timings]
        report.kv_transfer_speed_gb_s = [t.speed_gb_s for t in timings if t.num_bytes]
        report.kv_transfer_total_mb = [t.num_bytes / 1e6 for t in timings]
