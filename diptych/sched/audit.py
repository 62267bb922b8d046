"""The audit of a whole scheduler: every sequence is where its status says, every page has the holders that follow."""

from __future__ import annotations

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


def _audit_seq(state: SchedState, seq: Seq) -> None:
    page_size = state.config.page_size
    if seq.table[: len(seq.pages)].tolist() != seq.pages:
        raise AuditError(f"the page table of request {seq.rid} differs from its pages")
    if seq.status is Status.WAITING and (seq.pages or seq.num_computed or seq.match or seq.in_flight):
        raise AuditError(f"request {seq.rid} waits but holds {len(seq.pages)} pages")
    if pages_for(seq.num_computed, page_size) > len(seq.pages) or seq.num_computed > len(seq.tokens):
        raise AuditError(f"request {seq.rid} has computed {seq.num_computed} tokens in {len(seq.pages)} pages")
    if seq.in_flight and not state.computing:
        raise AuditError(f"request {seq.rid} is in flight, but no step is")
