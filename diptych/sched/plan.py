"""What the next step computes, and who gives way when pages are short."""

from __future__ import annotations

import math
from itertools import islice

from diptych.errors import AuditError
from diptych.sched.pages import add_pages, fits, headroom, make_room, peek
from diptych.sched.queue import admit, retract
from diptych.sched.rows import build
from diptych.sched.state import After, SchedState, Seq
from diptych.types import Plan

MAX_IN_FLIGHT = 2
NOTHING = After.NOTHING
LPM_WINDOW = 32  # waiting requests whose cached prefixes are compared
LPM_PATIENCE = 16  # admissions the first of the queue lets pass before it is next itself


def schedule(state: SchedState, now: float) -> Plan | None:
    """The next step: one token for each decoding sequence, then chunks of prompts. None if there is nothing to compute.

    Tokens: decode rows are never held back. Prompts get what `chunk_tokens` leaves, but at least one page of tokens, so
    that a full decode batch cannot starve them; first those already begun, in order of admission, then those admitted
    now, as long as a page's worth is left. Every chunk but a prompt's last ends at a page boundary.
    Pages: a sequence is admitted with pages for all its tokens (`pages.fits`), so that only decode rows ask for more.
    If none is free the tree is evicted from, then the last admitted sequence is retracted, and so on. The oldest is
    never retracted; alone, it can run out of pages only because of pages that are being transferred or not yet
    released, and then sits out the step. In a step that retracts nobody is admitted.

    While one step is in flight, the next is planned ahead of its result: what it computes counts as computed, and a
    token that it samples has the id -1 - r, r being its row there. A sequence whose last token that surely is, by
    length, is left out; one that it ends otherwise computes a token in vain. Nothing is planned ahead if a page is
    missing (nobody is retracted), or if a sampled token is needed at once (`needs_tokens`): those would else wait while
    the others go on.

    None while paused, if nothing is to be planned ahead, or when all that runs waits for pages of others: then call
    again after a commit, a join or a release. Raises AuditError if two steps are in flight.
    """
    if len(state.flight) == MAX_IN_FLIGHT:
        raise AuditError(f"step {state.flight[0].step} has not been committed")
    if state.paused or not (state.running or state.waiting):
        return None
    retractions = state.counters.retractions
    decoding = _decode(state, now)
    if decoding is None:
        return None
    budget = _prefill_budget(state, len(decoding))
    chunks: list[tuple[Seq, int]] = []
    if len(decoding) < len(state.running):
        budget = _continue_prompts(state, budget, chunks)
    if state.waiting and state.counters.retractions == retractions:
        _admit(state, now, budget, chunks)
    if not decoding and not chunks:
        return None
    state.step += 1
    plan = build(state, decoding, chunks)
    state.flight.append(plan)
    return plan


def _decode(state: SchedState, now: float) -> list[Seq] | None:
    """The running sequences with one token to compute, each with a page for it. None: no step can be planned ahead."""
    page_size = state.config.page_size
    ahead = bool(state.flight)
    running = state.running
    decoding: list[Seq] = []
    index = 0
    while index < len(running):  # retracting takes from the end, never from those already seen
        seq = running[index]
        index += 1
        pending = seq.num_pending
        length = len(seq.tokens) + pending
        if length - seq.num_planned != 1 or length >= seq.max_tokens or seq.after_step is not NOTHING:
            continue
        if pending and seq.needs_tokens:
            return None
        if length <= len(seq.pages) * page_size or _grow(state, seq, now):
            decoding.append(seq)
        elif ahead:
            return None
    return decoding


def _grow(state: SchedState, seq: Seq, now: float) -> bool:
    """One more page for `seq`, whatever it costs the younger ones. False if it was retracted itself or has to wait, as
    it has if a step is in flight."""
    while not make_room(state, 1):
        if state.flight:
            return False
        victim = state.running[-1]
        if victim is state.running[0]:
            return False
        retract(state, victim, now)
        if victim is seq:
            return False
    add_pages(state, seq, state.pool.alloc(1, seq.holder))
    return True


def _prefill_budget(state: SchedState, num_decoding: int) -> int:
    if state.config.chunk_tokens < 0:
        return state.max_len * max(1, state.config.max_running)
    return max(state.config.chunk_tokens - num_decoding, state.config.page_size)


def _continue_prompts(state: SchedState, budget: int, chunks: list[tuple[Seq, int]]) -> int:
    """Add a chunk for each prompt already begun. Returns the budget that is left."""
    for seq in state.running:
        if budget < state.config.page_size:
            break
        if len(seq.tokens) + seq.num_pending - seq.num_planned > 1 and seq.after_step is NOTHING:
            budget -= _add_chunk(state, seq, budget, chunks)
    return budget


def _admit(state: SchedState, now: float, budget: int, chunks: list[tuple[Seq, int]]) -> None:
    """Admit, and add first chunks, until budget, places or pages are used up. Nobody jumps one that lacks pages, be it
    in the queue or at the door (`reserving_since`); only a retracted one goes before the latter.
    """
    free_places = state.config.max_running - len(state.running) - len(state.transferring)
    while state.waiting and budget >= state.config.page_size and free_places > 0:
        reserve = headroom(state)
        if state.pool.num_free + state.tree.evictable_pages <= reserve:
            return  # everyone needs a page of its own: no use in asking the tree about each
        seq = _next(state)
        if seq.arrival_at > state.reserving_since and not seq.num_retractions:
            return
        if not fits(state, seq, reserve):
            return
        if seq is not state.waiting[0]:
            state.waiting[0].num_passed_over += 1
        admit(state, seq, now)
        budget -= _add_chunk(state, seq, budget, chunks)
        free_places -= 1


def _next(state: SchedState) -> Seq:
    """Whose turn it is. lpm: the longest cached prefix among the first, unless the very first waits long or again, or
    somebody waits for a reservation: between those and the queue it is first come first served.
    """
    head = state.waiting[0]
    patient = head.num_passed_over < LPM_PATIENCE and state.reserving_since == math.inf
    if state.config.policy != "lpm" or head.num_retractions or not patient:
        return head
    return max(islice(state.waiting, LPM_WINDOW), key=lambda seq: peek(state, seq)[0])


def _add_chunk(state: SchedState, seq: Seq, budget: int, chunks: list[tuple[Seq, int]]) -> int:
    """Add the next chunk of `seq`, at most `budget` tokens (at least a page). Returns its length."""
    page_size = state.config.page_size
    start = seq.num_planned
    end = start + budget
    if end >= len(seq.tokens):
        end = len(seq.tokens)
    else:
        end -= end % page_size
    chunks.append((seq, end - start))
    return end - start
