"""The audit of a whole scheduler: every sequence is where its status says, every page has the holders that follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from diptych.errors import AuditError
from diptych.kv.audit import audit as audit_ledger
from diptych.kv.pool import Holder
from diptych.sched.pages import pages_for
from diptych.sched.state import SchedState, Seq, Status


def audit(state: SchedState) -> None:
    """Raise AuditError if queues, sequences and page ledger disagree. Changes nothing; costs O(pages + tokens)."""
    _audit_queues(state)
    expected: dict[Holder, set[int]] = {}
    _audit_flight(state)
    for seq in state.seqs.values():
        _audit_seq(state, seq)
        expected[seq.holder] = set(seq.pages)
        if seq.writer is not None and seq.remote_pages:
            expected.setdefault(seq.writer, set()).update(seq.remote_pages)
    for writer, pages in state.draining.items():
        expected.setdefault(writer, set()).update(pages)
    audit_ledger(state.pool, state.tree, expected, [seq.match for seq in state.seqs.values() if seq.match is not None])


def _audit_queues(state: SchedState) -> None:
    queues: list[tuple[Status, Iterable[Seq]]] = [
        (Status.WAITING, state.waiting),
        (Status.RUNNING, state.running),
        (Status.TRANSFERRING, state.transferring),
    ]
    queued = 0
    for status, queue in queues:
        for seq in queue:
            queued += 1
            if seq.status is not status or state.seqs.get(seq.rid) is not seq:
                raise AuditError(f"request {seq.rid} is {seq.status.value} but queued as {status.value}")
    ended = sum(seq.status in (Status.FINISHED, Status.ABORTED) for seq in state.seqs.values())
    if queued + ended != len(state.seqs):
        raise AuditError(f"{len(state.seqs)} requests are known, {queued} queued and {ended} ended")


def _table_is(state: SchedState, seq: Seq) -> bool:
    row = state.tables.array[seq.table]
    return row[: len(seq.pages)].tolist() == seq.pages and not row[len(seq.pages) :].any()


def _audit_flight(state: SchedState) -> None:
    """What sequences know of the steps in flight is what is in them."""
    rows = [(row, index) for plan in state.flight for index, row in enumerate(plan.rows)]
    known = Counter(row.rid for row, _ in rows)
    sampled = Counter(row.rid for row, _ in rows if row.samples)
    last = {row.rid: (row.num_cached + row.num_new, index) for row, index in rows}
    gone = known.keys() - state.seqs.keys()
    if gone:
        raise AuditError(f"a step in flight computes requests that are gone: {', '.join(sorted(gone))}")
    for rid, seq in state.seqs.items():
        if (seq.in_flight, seq.num_pending) != (known[rid], sampled[rid]):
            raise AuditError(
                f"request {rid} counts {seq.in_flight} steps in flight that sample {seq.num_pending} tokens; there are "
                f"{known[rid]} that sample {sampled[rid]}"
            )
        ended = seq.status in (Status.FINISHED, Status.ABORTED)
        if not ended and (seq.num_planned, seq.row) != last.get(rid, (seq.num_computed, seq.row)):
            raise AuditError(f"request {rid} expects {seq.num_planned} computed tokens of the steps in flight")


def _audit_seq(state: SchedState, seq: Seq) -> None:
    page_size = state.config.page_size
    if seq.table >= 0 and not _table_is(state, seq):
        raise AuditError(f"the page table of request {seq.rid} differs from its pages")
    if seq.status is Status.WAITING and (seq.pages or seq.num_computed or seq.match or seq.in_flight):
        raise AuditError(f"request {seq.rid} waits but holds {len(seq.pages)} pages")
    if pages_for(seq.num_computed, page_size) > len(seq.pages) or seq.num_computed > len(seq.tokens):
        raise AuditError(f"request {seq.rid} has computed {seq.num_computed} tokens in {len(seq.pages)} pages")
    if pages_for(seq.num_planned, page_size) > len(seq.pages) or seq.num_planned > len(seq.tokens) + seq.num_pending:
        raise AuditError(f"request {seq.rid} is to have computed {seq.num_planned} tokens in {len(seq.pages)} pages")
