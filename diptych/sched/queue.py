"""How sequences come and go: checking, queueing, reserving and joining, aborting, releasing, retracting."""

from __future__ import annotations

from diptych.errors import AuditError, BadRequest, ContextLengthExceeded, Overloaded
from diptych.sched.events import Event, accept_token
from diptych.sched.pages import drop_writer, fits, give_back, headroom, offer, take
from diptych.sched.state import After, SchedState, Seq, Status
from diptych.types import FirstToken, Request, TokenLogprob


def check_request(state: SchedState, request: Request, num_elsewhere: int = 0) -> None:
    """Raise if `request` can never run here, or not now; nothing is held yet. `num_elsewhere` requests wait besides
    those in the queue, for their hand-over.

    ContextLengthExceeded if the prompt leaves no room for a token in the context or in the whole pool (a larger
    `max_new_tokens` is cut to what fits, as SGLang does), BadRequest for other faults, Overloaded if the queue is full.
    """
    num_prompt, most = len(request.prompt), state.max_len - 1
    if not num_prompt:
        raise BadRequest("the prompt is empty: send at least one token", param="prompt")
    if num_prompt > most:
        limit = (
            f"the model's context of {state.config.context_len} tokens"
            if state.max_len == state.config.context_len
            else f"this server's KV pool of {state.pool.num_pages * state.pool.page_size} tokens"
        )
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt} tokens, but {limit} leaves room for at most {most}; shorten it",
            param="prompt",
        )
    if request.sampling.max_new_tokens < 1:  # none at all is the API's business: it throws a token away
        raise BadRequest(
            f"max_new_tokens must be at least 1, not {request.sampling.max_new_tokens}", param="max_new_tokens"
        )
    if request.logprobs is not None and request.logprobs.prompt_start >= num_prompt:
        raise BadRequest(
            f"logprob_start_len is {request.logprobs.prompt_start}, but the prompt has only {num_prompt} tokens",
            param="logprob_start_len",
        )
    if request.rid in state.seqs:
        raise BadRequest(f"request id {request.rid} is in use by another request", param="rid")
    num_waiting = len(state.waiting) + num_elsewhere
    if num_waiting >= state.config.max_queued:
        raise Overloaded(f"{num_waiting} requests are waiting already, which is the limit; try again later")


def add(state: SchedState, request: Request, now: float) -> Seq:
    """Put a checked request at the end of the waiting queue."""
    seq = _new_seq(state, request, now)
    _want_prompt_logprobs(seq)
    state.seqs[seq.rid] = seq
    state.waiting.append(seq)
    return seq


def reserve(state: SchedState, request: Request, arrival_at: float) -> Seq | None:
    """Pages for the whole prompt of a checked request now, to be filled from elsewhere; None if there is no room for it
    yet, or if it is not its turn.

    Room means: a place in the batch, and the pages besides the headroom of all that run or are reserved, after
    eviction. The first of the waiting queue goes before if it was retracted or came by `arrival_at`; the caller
    sets `reserving_since`, so that those that came later do not. The first `prefix_tokens` (whole pages) come from the
    tree and must not be written; the rest is held by ("writer", room) as well, until join or release. Status
    TRANSFERRING: not scheduled before join.
    """
    if len(state.running) + len(state.transferring) >= state.config.max_running:
        return None
    if state.waiting and (state.waiting[0].num_retractions or state.waiting[0].arrival_at <= arrival_at):
        return None
    seq = _new_seq(state, request, arrival_at)
    if not fits(state, seq, headroom(state)):
        return None
    fresh = take(state, seq)
    if seq.writer is not None:
        state.pool.share(fresh, seq.writer)
        seq.remote_pages = fresh
    seq.cached_tokens = seq.prefix_tokens
    seq.num_announced = len(seq.pages)  # the pages come from a sender; they are not sent on
    seq.move(Status.TRANSFERRING)
    state.seqs[seq.rid] = seq
    state.transferring.append(seq)
    return seq


def join(state: SchedState, seq: Seq, first: FirstToken, now: float) -> list[Event]:
    """A reserved sequence has all its pages and its first token: it decodes from the next step on, unless that token
    ends it.

    Raises AuditError if it is not TRANSFERRING (an aborted one must be released instead).
    """
    if seq.status is not Status.TRANSFERRING:
        raise AuditError(f"request {seq.rid} cannot join the batch: it is {seq.status.value}, not transferring")
    state.transferring.remove(seq)
    drop_writer(state, seq)
    seq.move(Status.RUNNING)
    state.running.append(seq)
    seq.num_computed = seq.num_planned = seq.num_prompt
    seq.cached_tokens = first.cached_tokens
    _admitted(state, seq, now)
    offer(state, seq)
    return [accept_token(state, seq, first.token, first.logprob)]


def abort(state: SchedState, rid: str, now: float) -> Seq | None:
    """Take a request out of all queues; the caller tells the client and calls release. None if unknown or ended."""
    seq = state.seqs.get(rid)
    if seq is None or seq.status in (Status.FINISHED, Status.ABORTED):
        return None
    if seq.status is Status.WAITING:
        state.waiting.remove(seq)
    elif seq.status is Status.RUNNING:
        state.running.remove(seq)
    else:
        state.transferring.remove(seq)
    seq.move(Status.ABORTED)
    state.counters.aborted += 1
    return seq


def complete(state: SchedState, rid: str) -> Seq | None:
    """End a sequence whose text is complete though the model would go on; the caller releases it. None: it is over."""
    seq = state.seqs.get(rid)
    if seq is None or seq.status not in (Status.RUNNING, Status.WAITING):
        return None
    if seq.status is Status.RUNNING:
        state.running.remove(seq)
        seq.move(Status.FINISHED)
    else:  # retracted: it holds nothing that could be kept
        state.waiting.remove(seq)
        seq.move(Status.ABORTED)
    return seq


def release(state: SchedState, seq: Seq, *, keep: bool) -> None:
    """Give back the pages of a sequence that has finished or was aborted, and forget it. Raises AuditError for any
    other.

    With `keep`, full pages go to the tree first. While steps in flight compute the sequence, this happens when the last
    of them is committed. It ends the remote writer's lease too: for one that has not stopped see `leave_to_writer`.
    """
    if seq.status not in (Status.FINISHED, Status.ABORTED) or state.seqs.get(seq.rid) is not seq:
        raise AuditError(f"request {seq.rid} cannot be released: it is {seq.status.value}")
    if seq.in_flight:
        seq.after_step = After.RELEASE_AND_KEEP if keep else After.RELEASE
        return
    give_back(state, seq, keep=keep)
    seq.move(Status.RELEASED)
    del state.seqs[seq.rid]


def leave_to_writer(state: SchedState, seq: Seq) -> None:
    """Release an aborted TRANSFERRING sequence whose pages are still being written from elsewhere.

    Those pages stay the writer's until `writer_stopped`; the rest is given back, and the request id is free.
    """
    if seq.writer is not None and seq.remote_pages:
        state.draining[seq.writer], seq.remote_pages = seq.remote_pages, []
    release(state, seq, keep=False)


def writer_stopped(state: SchedState, room: int) -> None:
    """Nobody writes any more to what was left to this room's writer."""
    writer = ("writer", room)
    state.pool.release(state.draining.pop(writer, []), writer)


def retract(state: SchedState, seq: Seq, now: float) -> None:
    """Take the pages of a running sequence away: it waits at the front of the queue with all its tokens.

    What it has computed goes to the tree, so that computing it again is cheap if memory lasts. While steps in flight
    compute the sequence, this happens when the last of them is committed. Raises AuditError if it is not running.
    """
    if seq.status is not Status.RUNNING:
        raise AuditError(f"request {seq.rid} cannot be retracted: it is {seq.status.value}, not running")
    if seq.in_flight:
        seq.after_step = After.RETRACT
        return
    give_back(state, seq, keep=True)
    state.running.remove(seq)
    seq.move(Status.WAITING)
    seq.num_retractions += 1
    state.counters.retractions += 1
    state.waiting.appendleft(seq)


def admit(state: SchedState, seq: Seq, now: float) -> None:
    """Move a waiting sequence that fits to the batch, with pages for all its tokens."""
    state.waiting.remove(seq)
    take(state, seq)
    seq.move(Status.RUNNING)
    state.running.append(seq)
    if seq.first_admitted_at is None:
        seq.cached_tokens = seq.prefix_tokens
        _admitted(state, seq, now)


def _admitted(state: SchedState, seq: Seq, now: float) -> None:
    seq.first_admitted_at = now
    state.counters.queue_time_s.append(max(0.0, now - seq.arrival_at))


def _new_seq(state: SchedState, request: Request, now: float) -> Seq:
    num_prompt = len(request.prompt)
    sampling = request.sampling
    return Seq(
        request=request,
        tokens=list(request.prompt),
        num_prompt=num_prompt,
        max_tokens=min(num_prompt + sampling.max_new_tokens, state.max_len),
        arrival_at=now,
        stops=frozenset(() if sampling.ignore_eos else (*state.config.eos_token_ids, *sampling.stop_token_ids)),
        min_tokens=num_prompt + sampling.min_new_tokens,
        needs_history=sampling.penalized,
        needs_tokens=sampling.penalized or sampling.grammar is not None,
        next_target=num_prompt,
    )


def _want_prompt_logprobs(seq: Seq) -> None:
    """Logprobs of prompt positions prompt_start.. are to be collected; position 0 has none."""
    spec = seq.request.logprobs
    if spec is None or spec.prompt_start < 0:
        return
    seq.prompt_logprobs = [TokenLogprob(None, seq.tokens[0])] if spec.prompt_start == 0 else []
    seq.next_target = max(1, spec.prompt_start)
