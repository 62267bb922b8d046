"""What the result of a step means: new tokens, finished sequences, pages complete."""

from __future__ import annotations

from diptych.errors import AuditError
from diptych.sched.events import ChunkDone, Event, Sampled, accept_token
from diptych.sched.pages import offer, pages_for
from diptych.sched.queue import release, retract
from diptych.sched.state import After, SchedState, Seq, Status
from diptych.types import Plan, Row, RowResult, StepResult

__all__ = ["ChunkDone", "Event", "Sampled", "commit"]

THROUGHPUT_WINDOW_S = 1.0


def commit(state: SchedState, plan: Plan, result: StepResult, now: float) -> list[Event]:
    """Take the result of `plan` into the state. Returns what happened, in the plan's order; ChunkDone before Sampled.

    Rows of sequences aborted meanwhile are dropped. What was asked for while the step ran (release, retract) is done
    now. Finished sequences keep their pages until released. Raises AuditError if `plan` is not the one being computed
    or the result is not its.
    """
    if not state.computing or plan.step != state.step or len(result.rows) != len(plan.rows):
        raise AuditError(f"the result of step {plan.step} does not belong to the step being computed, {state.step}")
    events: list[Event] = []
    for row, row_result in zip(plan.rows, result.rows, strict=True):
        seq = state.seqs[row.rid]
        if seq.status is Status.RUNNING:
            _commit_row(state, seq, row, row_result, events)
    state.counters.steps += 1
    state.counters.forward_s += result.duration_s
    _measure(state, sum(isinstance(event, Sampled) for event in events), now)
    state.computing = False
    for row in plan.rows:
        seq = state.seqs[row.rid]
        seq.in_flight = False
        if seq.after_step is not After.NOTHING:
            _do_after_step(state, seq, now)
    return events


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
