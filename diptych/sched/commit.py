"""What the result of a step means: new tokens, finished sequences, pages complete."""

from __future__ import annotations

from diptych.errors import AuditError
from diptych.sched.events import ChunkDone, Event, Sampled, accept_token
from diptych.sched.pages import offer, pages_for
from diptych.sched.queue import release, retract
from diptych.sched.state import After, SchedState, Seq, Status
from diptych.types import Plan, Row, RowResult, StepResult

__all__ = ["ChunkDone", "Event", "Sampled", "cancel", "commit"]

THROUGHPUT_WINDOW_S = 1.0


def commit(state: SchedState, plan: Plan, result: StepResult, now: float) -> list[Event]:
    """Take the result of `plan`, the oldest in flight, into the state. Returns what happened, in the plan's order;
    ChunkDone before Sampled.

    Rows of sequences that ended meanwhile are dropped: those aborted, and those that a later step computes though this
    one's token is their last. What was asked for while a sequence was in flight (release, retract) is done once it no
    longer is. Finished sequences keep their pages until released. Raises AuditError if `plan` is not the oldest in
    flight or the result is not its.
    """
    if not state.flight or plan.step != state.flight[0].step or len(result.rows) != len(plan.rows):
        raise AuditError(f"the result of step {plan.step} does not belong to the oldest step in flight")
    del state.flight[0]
    events: list[Event] = []
    seqs, counters = state.seqs, state.counters
    num_before = counters.generation_tokens
    after: list[Seq] = []
    for row, row_result in zip(plan.rows, result.rows, strict=True):
        seq = seqs[row.rid]
        seq.in_flight -= 1
        seq.num_pending -= row.samples
        if seq.status is Status.RUNNING:
            _commit_row(state, seq, row, row_result, events)
        if seq.after_step is not After.NOTHING and not seq.in_flight:
            after.append(seq)
    counters.steps += 1
    counters.eager_steps += result.eager
    counters.forward_s += result.duration_s
    _measure(state, counters.generation_tokens - num_before, now)
    for seq in after:
        _do_after_step(state, seq, now)
    return events


def cancel(state: SchedState, plan: Plan, now: float) -> None:
    """Give up `plan`, the newest in flight: it is not run, or what it did is void. Its sequences will be planned again.

    Those it admitted stay in the batch. Raises AuditError for any other plan.
    """
    if not state.flight or plan.step != state.flight[-1].step:
        raise AuditError(f"step {plan.step} cannot be cancelled: it is not the newest in flight")
    state.flight.pop()
    for row in plan.rows:
        seq = state.seqs[row.rid]
        seq.in_flight -= 1
        seq.num_pending -= row.samples
        seq.num_planned -= row.num_new
        if seq.after_step is not After.NOTHING and not seq.in_flight:
            _do_after_step(state, seq, now)
    for earlier in state.flight:
        for index, row in enumerate(earlier.rows):
            state.seqs[row.rid].row = index


def _commit_row(state: SchedState, seq: Seq, row: Row, result: RowResult, events: list[Event]) -> None:
    seq.num_computed = row.num_cached + row.num_new
    if row.prompt_targets:
        _collect(seq, row.prompt_targets, result)
    page_size = state.config.page_size
    if seq.num_announced * page_size < seq.num_prompt:
        whole = seq.num_computed >= seq.num_prompt
        complete = pages_for(seq.num_prompt, page_size) if whole else seq.num_computed // page_size
        if complete > seq.num_announced:
            events.append(ChunkDone(seq, seq.num_announced, complete))
            seq.num_announced = complete
    if not row.samples:
        return
    if not seq.prefix_cached:
        offer(state, seq)
    events.append(accept_token(state, seq, result.token, result.logprob))


def _collect(seq: Seq, targets: list[int], result: RowResult) -> None:
    found = result.prompt_logprobs or []
    if [entry.token for entry in found] != targets or seq.prompt_logprobs is None:
        raise AuditError(
            f"the runner returned {len(found)} prompt logprobs of request {seq.rid} for {len(targets)} tokens"
        )
    seq.prompt_logprobs += found
    seq.next_target += len(targets)


def _do_after_step(state: SchedState, seq: Seq, now: float) -> None:
    action, seq.after_step = seq.after_step, After.NOTHING
    if action is After.RETRACT:
        if seq.status is Status.RUNNING:  # this step may have been its last
            retract(state, seq, now)
    else:
        release(state, seq, keep=action is After.RELEASE_AND_KEEP)


def _measure(state: SchedState, num_tokens: int, now: float) -> None:
    """Tokens per second, over windows of a second or more in which something runs all the time."""
    counters = state.counters
    if counters.window_at is None:
        counters.window_at, counters.window_tokens = now, 0
        return
    counters.window_tokens += num_tokens
    elapsed = now - counters.window_at
    if elapsed >= THROUGHPUT_WINDOW_S:
        counters.throughput = counters.window_tokens / elapsed
        counters.window_at, counters.window_tokens = now, 0
    if not state.running:
        counters.window_at = None
